'use strict';

/** Score against IoU: of all detections, or of the best-regressed queries; one plane for each shown detector. */
(() => {
  const {Plane, KINDS, describe, describeBest, CONFIDENT, node, NUMBER} = Explorer;
  const BEST_STYLES = [{...CONFIDENT[0], shape: 'circle'}, {...CONFIDENT[1], shape: 'cross'}];
  const POPULATIONS = {detections: 'all detections', best: 'best-regressed queries'};

  /** Spearman's correlation of x[i] and y[i], whole numbers up to `scale`, over the points i; null where one is constant. */
  function rankCorrelation(x, y, points, scale) {
    const ranks = values => {
      const counts = new Float64Array(scale + 1);
      for (const i of points) counts[values[i]]++;
      let before = 0;
      return counts.map(count => {
        const rank = before + (count + 1) / 2;
        before += count;
        return rank;
      });
    };
    const [rankX, rankY] = [ranks(x), ranks(y)];
    const mean = (points.length + 1) / 2;
    let [sxx, syy, sxy] = [0, 0, 0];
    for (const i of points) {
      const [dx, dy] = [rankX[x[i]] - mean, rankY[y[i]] - mean];
      sxx += dx * dx;
      syy += dy * dy;
      sxy += dx * dy;
    }
    return sxx > 0 && syy > 0 ? sxy / Math.sqrt(sxx * syy) : null;
  }

  class Planes {
    constructor(host, view) {
      this.view = view;
      this.toggle = node('div', {className: 'segments', role: 'group', 'aria-label': 'what the points are'});
      for (const [population, name] of Object.entries(POPULATIONS)) {
        const button = node('button', {type: 'button'}, name);
        button.dataset.population = population;
        button.addEventListener('click', () => view.set({population}));
        this.toggle.append(button);
      }
      this.row = node('div', {className: 'planes'});
      this.hint = node('p', {className: 'hint'});
      host.append(this.toggle, this.row, this.hint);
      this.sides = [0, 1].map(side => this.makeSide(side));
    }

    makeSide(side) {
      const heading = node('h3');
      const host = node('div');
      const reading = node('p', {className: 'reading'});
      const section = node('section', {className: 'plane-of'}, heading, host, reading);
      this.row.append(section);
      const plane = new Plane(host, {
        x: 'score', y: 'IoU', name: `score and IoU of the boxes of ${'AB'[side]}`,
        pick: region => this.pick(side, region),
        hover: i => this.describe(side, i),
      });
      return {section, heading, reading, plane};
    }

    describe(side, i) {
      const {view} = this;
      return view.points[side] === view.shown[side] ? describe(view, side, i) : describeBest(view, side, i);
    }

    pick(side, region) {
      const {view} = this;
      if (!region) {
        view.set({selection: null});
        return;
      }
      const of = view.shown.length > 1 ? ` of ${'AB'[side]}` : '';
      if (region.point !== undefined) {
        const {point} = region;
        const pick = now => {
          const marks = new Uint8Array(now.points[side].length);
          marks[point] = 1;
          return {side, marks, weight: () => 1};
        };
        view.set({selection: {note: `${this.describe(side, point)}${of}`, on: side, pick}});
        return;
      }
      const range = (a, b) => `${a.toFixed(2)} to ${b.toFixed(2)}`;
      const note = `boxes${of} of score ${range(region.x0, region.x1)}, IoU ${range(region.y0, region.y1)}`;
      view.set({selection: {note, on: side, region, pick: now => this.within(now, side, region)}});
    }

    within(view, side, {x0, x1, y0, y1}) {
      const points = view.points[side];
      const allowed = this.allowed(view, side);
      const {scale} = view.data;
      const {score, iou, kind} = points;
      const mask = view.pointMasks[side];
      const marks = new Uint8Array(points.length);
      for (let i = 0; i < marks.length; i++) {
        marks[i] = +(mask[i] && allowed[kind[i]] && score[i] >= x0 * scale && score[i] <= x1 * scale && iou[i] >= y0 * scale && iou[i] <= y1 * scale);
      }
      return {side, marks, weight: i => score[i]};
    }

    allowed(view, side) {
      return view.points[side] === view.shown[side] ? view.allowed : [1, 1];
    }

    /** Ring the boxes of an image, from the threshold on, as long as its picture is pointed at; null for none. */
    point(image) {
      const {view} = this;
      if (view.settings.tab !== 'plane' || image === this.pointed) return;
      this.pointed = image;
      this.sides.forEach((part, side) => {
        if (side >= view.shown.length) return;
        const points = view.points[side];
        const rings = [];
        if (image !== null) {
          for (let i = points.first[image]; i < points.first[image + 1]; i++) {
            if (points !== view.shown[side] || view.shown[side].reaches(i, view.step(side))) rings.push(i);
          }
        }
        part.plane.ring(rings);
      });
    }

    update(view) {
      if (view.settings.tab !== 'plane') return;
      const {population, selection} = view.settings;
      this.toggle.hidden = !view.shown.some(detector => detector.best);
      for (const button of this.toggle.children) button.setAttribute('aria-pressed', button.dataset.population === population);
      this.row.classList.toggle('two', view.shown.length > 1);
      this.sides.forEach((part, side) => {
        part.section.hidden = side >= view.shown.length;
        if (part.section.hidden) return;
        const [points, detector] = [view.points[side], view.shown[side]];
        const best = points !== detector;
        part.heading.replaceChildren(...(view.shown.length > 1 ? [node('span', {className: `badge side${side}`}, 'AB'[side]), ' '] : []), detector.name);
        const own = selection?.on === side;
        const allowed = this.allowed(view, side);
        const mask = view.pointMasks[side];
        part.plane.update({
          x: points.score, y: points.iou, scale: view.data.scale, group: points.kind, styles: best ? BEST_STYLES : KINDS.slice(0, 6),
          mask, allowed, threshold: best ? null : view.step(side) / Explorer.STEPS, levels: best ? [] : [0.1, 0.5],
          marks: own ? view.picked.marks : null, region: own ? selection.region ?? null : null,
        });
        this.read(part.reading, view, side, best, allowed, mask);
      });
      this.hint.textContent = this.explain(view);
    }

    read(reading, view, side, best, allowed, mask) {
      const points = view.points[side];
      const detector = view.shown[side];
      const step = view.step(side);
      const shown = [];
      const add = i => { if (mask[i] && allowed[points.kind[i]]) shown.push(i); };
      if (best) for (let i = 0; i < points.length; i++) add(i);
      else detector.forReached(step, add);
      const rho = rankCorrelation(points.score, points.iou, shown, view.data.scale);
      const without = !best && view.settings.population === 'best' ? 'No queries were saved, so all detections: ' : '';
      const where = best ? 'queries' : 'boxes from the threshold on';
      reading.textContent = `${without}${NUMBER.format(shown.length)} ${where}, rank correlation ${rho === null ? '–' : rho.toFixed(2).replace('-', '−')}`;
      if (best) {
        let [all, top] = [0, 0];
        for (let i = 0; i < points.length; i++) if (mask[i] && points.iou[i] > 0) { all++; top += +(points.kind[i] === 0); }
        if (all) reading.textContent += `; ${((100 * top) / all).toFixed(1)}\u00a0% among the most confident`;
      }
    }

    explain(view) {
      const how = 'Click a point or drag a rectangle to see its pictures.';
      const best = view.points.some((points, side) => points !== view.shown[side]);
      if (best) return `${how} Of each object the query that overlaps it most. Circles are among the N most confident queries of their image with N objects, crosses are not.`;
      return `${how} IoU is with the object that a box is judged by. Where points are too many, a cell has the colour of most of its boxes and the strength of their number.`;
    }
  }

  Object.assign(Explorer, {Planes, rankCorrelation});
})();
