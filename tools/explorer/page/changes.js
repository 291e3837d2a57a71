'use strict';

/** What differs between two detectors, object by object. */
(() => {
  const {Plane, node, NUMBER, short} = Explorer;

  /** Each says of an object that both or one of the two find how much it has changed; 0 for not at all. */
  const CHANGES = [
    {name: 'only A finds', style: {colour: '#1d1d1f', shape: 'triangle'}, help: 'objects found by A at its threshold, and not by B'},
    {name: 'only B finds', style: {colour: '#7a3fb0', shape: 'square'}, help: 'objects found by B at its threshold, and not by A'},
    {name: 'score moved', style: {colour: '#0072B2', shape: 'circle'}, help: 'objects that both find, by the difference of the scores'},
    {name: 'box moved', style: {colour: '#0072B2', shape: 'circle'}, help: 'objects that both find, by the difference of the IoUs'},
  ];
  const AXES = ['score', 'iou'];

  class Changes {
    constructor(host, view) {
      this.view = view;
      this.axis = 0;
      this.list = node('div', {className: 'changes', role: 'group', 'aria-label': 'what changed'});
      this.toggle = node('div', {className: 'segments', role: 'group', 'aria-label': 'axes'});
      const plane = node('div');
      const about = 'Each object that A or B finds at its threshold; 0 on an axis for the one that does not find it. A list sorts the pictures by what changed most, the plane picks objects.';
      host.append(this.list, this.toggle, plane, node('p', {className: 'hint'}, about));
      this.plane = new Plane(plane, {x: 'A', y: 'B', name: 'objects by their score in A and in B', pick: region => this.brush(region), hover: o => this.hover(o)});
    }

    /** The change of each object by a list: [number of objects], 0 where it is not in it. */
    amounts(view, change) {
      const [a, b] = view.shown;
      const amounts = new Float64Array(view.data.numObjects);
      for (let o = 0; o < amounts.length; o++) {
        if (!view.passesObject(o)) continue;
        const [inA, inB] = [a.isFound(o, view.step(0)), b.isFound(o, view.step(1))];
        const [x, y] = [a.foundBy[o], b.foundBy[o]];
        if (change === 0 && inA && !inB) amounts[o] = a.score[x] + 1;
        if (change === 1 && inB && !inA) amounts[o] = b.score[y] + 1;
        if (change === 2 && inA && inB) amounts[o] = Math.abs(a.score[x] - b.score[y]);
        if (change === 3 && inA && inB) amounts[o] = Math.abs(a.iou[x] - b.iou[y]);
      }
      return amounts;
    }

    update(view) {
      if (view.settings.tab !== 'changes' || view.shown.length < 2) return;
      const chosen = view.settings.selection?.change;
      this.list.replaceChildren(...CHANGES.map(({name, help}, change) => {
        const count = this.amounts(view, change).reduce((sum, amount) => sum + +(amount > 0), 0);
        const button = node('button', {type: 'button', title: help}, node('strong', {}, NUMBER.format(count)), ` ${name}`);
        button.setAttribute('aria-pressed', chosen === change);
        button.addEventListener('click', () => this.choose(change));
        return button;
      }));
      this.toggle.replaceChildren(...AXES.map((axis, i) => {
        const button = node('button', {type: 'button'}, axis === 'iou' ? 'IoU' : 'score');
        button.setAttribute('aria-pressed', i === this.axis);
        button.addEventListener('click', () => {
          this.axis = i;
          this.update(view);
        });
        return button;
      }));
      this.plane.options.x = `${this.axis ? 'IoU' : 'score'} of A, ${view.shown[0].name}`;
      this.plane.options.y = `${this.axis ? 'IoU' : 'score'} of B, ${view.shown[1].name}`;
      const picked = view.settings.selection?.objects;
      const styles = CHANGES.map(change => change.style);
      const shown = {styles, allowed: [1, 1, 1, 1], threshold: null, levels: []};
      this.plane.update({...this.points(view), ...shown, marks: picked ? view.picked.marks : null, region: picked?.region ?? null});
    }

    /** Objects as points of the plane; the group says who finds them. */
    points(view) {
      const [a, b] = view.shown.map((detector, side) => Uint8Array.from(detector.foundBy, (_, o) => +detector.isFound(o, view.step(side))));
      const values = (detector, found) => Uint16Array.from(found, (is, o) => (is ? detector[AXES[this.axis]][detector.foundBy[o]] : 0));
      return {
        x: values(view.shown[0], a), y: values(view.shown[1], b), scale: view.data.scale,
        group: Uint8Array.from(a, (inA, o) => (!b[o] ? 0 : !inA ? 1 : 2)),
        mask: Uint8Array.from(a, (inA, o) => +((inA || b[o]) && view.passesObject(o))),
      };
    }

    choose(change) {
      if (this.view.settings.selection?.change === change) {
        this.view.set({selection: null});
        return;
      }
      const pick = view => {
        const amounts = this.amounts(view, change);
        return {side: 'objects', marks: Uint8Array.from(amounts, amount => +(amount > 0)), weight: o => amounts[o]};
      };
      const note = change < 2 ? `objects that ${CHANGES[change].name}` : `objects whose ${CHANGES[change].name}, most first`;
      this.view.set({selection: {note, change, pick}});
    }

    brush(region) {
      if (!region) {
        this.view.set({selection: null});
        return;
      }
      const within = ({x, y, mask, scale}, o) => mask[o] && (region.point === undefined
        ? x[o] >= region.x0 * scale && x[o] <= region.x1 * scale && y[o] >= region.y0 * scale && y[o] <= region.y1 * scale
        : o === region.point);
      const pick = view => {
        const points = this.points(view);
        const marks = Uint8Array.from(points.mask, (_, o) => +within(points, o));
        return {side: 'objects', marks, weight: o => Math.abs(points.x[o] - points.y[o])};
      };
      const note = region.point === undefined ? 'objects in the rectangle' : this.hover(region.point);
      this.view.set({selection: {note, objects: {region: region.point === undefined ? region : null}, pick}});
    }

    hover(o) {
      const {data, shown} = this.view;
      const text = (detector, side) => {
        const d = detector.foundBy[o];
        return d < 0 ? `${'AB'[side]} nothing` : `${'AB'[side]} ${short(detector.score[d] / data.scale)}, IoU ${short(detector.iou[d] / data.scale)}`;
      };
      return `${data.classes[data.label[o]]} · ${shown.map(text).join(' · ')}`;
    }
  }

  Explorer.Changes = Changes;
})();
