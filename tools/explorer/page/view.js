'use strict';

/** What is looked at: settings, and what follows from them. Every part of the page draws from one `View`. */
(() => {
  const {STEPS, CORRECT, LOCALISATION, MISSED} = Explorer;

  const DEFAULTS = {
    sides: [0], // the detectors that are shown: [A] or [A, B]
    steps: [], // threshold of each detector, in 1/STEPS
    linked: false, // one threshold for both
    population: 'detections', // or 'best': the best-regressed queries
    label: null, // class, null for all
    sizes: [], // none means all, as for kinds
    kinds: [],
    search: '',
    from: 0, // range of the score
    to: 1,
    sort: 'mistakes',
    zoom: false,
    objects: true, // whether annotated boxes are drawn
    tab: 'plane',
    selection: null, // {note, pick(view) → {side | 'objects', marks, weight(id)}}
  };
  /** A change of these leaves a selection without meaning. */
  const RESETTING = ['sides', 'population'];

  class View {
    constructor(data, detectors) {
      this.data = data;
      this.detectors = detectors;
      this.settings = {...DEFAULTS, steps: detectors.map(() => 0)};
      this.listeners = [];
      this.scheduled = false;
      this.shown = [];
      this.kept = new Map(); // masks by what they depend on
    }

    /** Call `listener(view)` after every change. */
    watch(listener) {
      this.listeners.push(listener);
    }

    /** Change settings; everything is drawn anew before the next frame. */
    set(patch) {
      if (RESETTING.some(key => key in patch)) patch = {selection: null, ...patch};
      Object.assign(this.settings, patch);
      if (this.scheduled) return;
      this.scheduled = true;
      requestAnimationFrame(() => {
        this.scheduled = false;
        this.refresh();
      });
    }

    setStep(side, step) {
      const {settings} = this;
      const steps = [...settings.steps];
      const clipped = Math.min(STEPS, Math.max(0, step));
      for (const s of settings.linked ? settings.sides.keys() : [side]) steps[settings.sides[s]] = clipped;
      this.set({steps});
    }

    step(side) {
      return this.settings.steps[this.settings.sides[side]];
    }

    get filtered() {
      const {label, sizes, kinds, from, to} = this.settings;
      return label !== null || sizes.length > 0 || kinds.length > 0 || from > 0 || to < 1;
    }

    refresh() {
      const {settings, data} = this;
      this.shown = settings.sides.map(index => this.detectors[index]);
      this.allowed = Uint8Array.from(Explorer.KINDS, (_, k) => +(!settings.kinds.length || settings.kinds.includes(k)));
      const wanted = settings.search.trim().toLowerCase();
      this.imageMask = Uint8Array.from(data.names, name => +name.includes(wanted));
      this.points = this.shown.map(detector => (settings.population === 'best' && detector.best) || detector);
      this.masks = this.shown.map(detector => this.keptMask(detector));
      this.pointMasks = this.points.map(points => this.keptMask(points));
      this.tallies = this.shown.map((detector, side) => this.tally(detector, side));
      this.picked = settings.selection ? settings.selection.pick(this) : null;
      this.pickedObjects = this.picked ? this.objectsOf(this.picked) : null;
      this.entries = this.listEntries();
      for (const listener of this.listeners) listener(this);
    }

    /** The mask of `points`, made anew only where a filter has changed. */
    keptMask(points) {
      const {label, sizes, from, to, search} = this.settings;
      const key = JSON.stringify([label, sizes, from, to, search]);
      const kept = this.kept.get(points);
      if (kept?.key === key) return kept.mask;
      const mask = this.mask(points);
      this.kept.set(points, {key, mask});
      return mask;
    }

    /** Which points pass all filters but that of kinds: [N] of 0 and 1. */
    mask(points) {
      const {label, sizes, from, to} = this.settings;
      const {scale} = this.data;
      const {label: labels, size, score, image} = points;
      const {imageMask} = this;
      const mask = new Uint8Array(points.length);
      if (label === null && !sizes.length && from <= 0 && to >= 1 && imageMask.every(Boolean)) return mask.fill(1);
      const [low, high] = [from * scale - 1e-6, to * scale + 1e-6];
      const sized = Uint8Array.from(Explorer.SIZES, (_, s) => +(!sizes.length || sizes.includes(s)));
      for (let d = 0; d < mask.length; d++) {
        mask[d] = +((label === null || labels[d] === label) && sized[size[d]] && score[d] >= low && score[d] <= high && imageMask[image[d]]);
      }
      return mask;
    }

    passesObject(object) {
      const {label, sizes} = this.settings;
      const {data} = this;
      return (label === null || data.label[object] === label) && (!sizes.length || sizes.includes(data.size[object])) &&
        this.imageMask[data.image[object]] && !data.crowd[object];
    }

    /** Number of detections, from the threshold on, of each kind, and of missed objects. */
    tally(detector, side) {
      const counts = new Array(Explorer.KINDS.length).fill(0);
      const [mask, step] = [this.masks[side], this.step(side)];
      detector.forReached(step, d => { counts[detector.kind[d]] += mask[d]; });
      for (let o = 0; o < this.data.numObjects; o++) if (detector.isMissed(o, step) && this.passesObject(o)) counts[MISSED]++;
      return counts;
    }

    /** The objects that a selection is about: [number of objects] of 0 and 1. */
    objectsOf({side, marks}) {
      if (side === 'objects') return marks;
      const objects = new Uint8Array(this.data.numObjects);
      const points = this.points[side];
      for (let d = 0; d < marks.length; d++) if (marks[d] && points.object[d] >= 0) objects[points.object[d]] = 1;
      return objects;
    }

    /** How a detection is drawn: 'strong', 'plain', 'faint', or null for not at all. */
    weight(side, d) {
      const detector = this.shown[side];
      const reached = detector.reaches(d, this.step(side));
      if (this.picked) {
        const own = this.picked.side === side && this.points[side] === detector;
        if (own && this.picked.marks[d]) return 'strong';
        const object = detector.object[d];
        if (!own && reached && object >= 0 && this.pickedObjects[object] && detector.kind[d] <= LOCALISATION) return 'strong';
        return reached ? 'faint' : null;
      }
      if (!reached) return null;
      if (!this.filtered) return 'plain';
      return this.masks[side][d] && this.allowed[detector.kind[d]] ? 'strong' : 'faint';
    }

    /** Whether an object is what the page is asked about: picked, or missed where missed ones are asked for. */
    objectIsStrong(side, object) {
      if (this.picked) return Boolean(this.pickedObjects[object]);
      const asked = this.settings.kinds.includes(MISSED);
      return asked && this.shown[side].isMissed(object, this.step(side)) && this.passesObject(object);
    }

    /** The pictures to show, first the most telling: {image, key}. */
    listEntries() {
      const keys = new Float64Array(this.data.images.length).fill(-Infinity);
      if (this.picked) this.pickedKeys(keys);
      else this.filteredKeys(keys);
      const entries = [];
      keys.forEach((key, image) => {
        if (key > -Infinity && this.imageMask[image]) entries.push({image, key});
      });
      if (!this.picked && this.settings.sort === 'name') {
        return entries.sort((a, b) => this.data.names[a.image].localeCompare(this.data.names[b.image], 'en', {numeric: true}));
      }
      return entries.sort((a, b) => b.key - a.key || a.image - b.image);
    }

    pickedKeys(keys) {
      const {side, marks, weight} = this.picked;
      const {image} = side === 'objects' ? this.data : this.points[side];
      for (let i = 0; i < marks.length; i++) if (marks[i]) keys[image[i]] = Math.max(keys[image[i]], weight(i));
    }

    filteredKeys(keys) {
      const {data, settings} = this;
      if (!this.filtered) keys.fill(0);
      const {sort, kinds} = settings;
      const onlyCorrect = kinds.length === 1 && kinds[0] === CORRECT;
      this.shown.forEach((detector, side) => {
        const [mask, step] = [this.masks[side], this.step(side)];
        detector.forReached(step, (d, image) => {
          if (!mask[d] || !this.allowed[detector.kind[d]]) return;
          const telling = sort === 'mistakes' && (onlyCorrect || detector.kind[d] !== CORRECT);
          keys[image] = Math.max(keys[image], telling ? detector.score[d] : 0);
        });
        for (let o = 0; o < data.numObjects; o++) {
          if (!this.allowed[MISSED] || !this.passesObject(o)) continue;
          const missed = detector.isMissed(o, step);
          if (missed || !this.filtered) keys[data.image[o]] = Math.max(0, keys[data.image[o]]) + +(missed && sort === 'missed');
        }
      });
      if (sort === 'difference' && this.shown.length > 1) this.addDifferences(keys);
    }

    /** Objects that only one of the two finds count one, moved scores and boxes their share of it. */
    addDifferences(keys) {
      const [a, b] = this.shown;
      for (let o = 0; o < this.data.numObjects; o++) {
        const [inA, inB] = [a.isFound(o, this.step(0)), b.isFound(o, this.step(1))];
        if (!(inA || inB) || !this.passesObject(o)) continue;
        const [x, y] = [a.foundBy[o], b.foundBy[o]];
        const moved = inA && inB ? 0.5 * Math.abs(a.iou[x] - b.iou[y]) / this.data.scale : 1;
        if (keys[this.data.image[o]] > -Infinity) keys[this.data.image[o]] += moved;
      }
    }
  }

  Explorer.View = View;
})();
