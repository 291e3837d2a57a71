'use strict';

/** The only global of the page. Data files call `Explorer.receive`; every other script adds its part. */
const Explorer = {};

(() => {
  /** What a detection can be, in the order of `kind` (analysis/error_types.py); the last is of objects.
      Colours are Okabe and Ito's: they differ for the colour-blind; shape and letter say the same again. */
  const KINDS = [
    {name: 'correct', letter: '', colour: '#009E73', shape: 'circle', help: 'class right, IoU of at least 0.5, object not taken'},
    {name: 'classification', letter: 'C', colour: '#CC79A7', shape: 'triangle', help: 'IoU of at least 0.5 with an object of another class'},
    {name: 'localisation', letter: 'L', colour: '#E69F00', shape: 'square', help: 'class right, but IoU of 0.1 to 0.5 only'},
    {name: 'both', letter: 'CL', colour: '#56B4E9', shape: 'diamond', help: 'neither class nor place is right: too little overlap, and with another class'},
    {name: 'duplicate', letter: 'D', colour: '#0072B2', shape: 'plus', help: 'the object is found by a more confident box'},
    {name: 'background', letter: 'B', colour: '#D55E00', shape: 'cross', help: 'IoU with every object is at most 0.1'},
    {name: 'missed', letter: 'M', colour: '#222222', shape: 'dashes', help: 'object without a box that finds it, or nearly does'},
  ];
  const [CORRECT, CLASSIFICATION, LOCALISATION, , , , MISSED] = KINDS.keys();
  /** COCO's bounds of the area, in square pixels. */
  const SIZES = [{name: 'small', help: 'below 32² pixels'}, {name: 'medium', help: '32² to 96² pixels'}, {name: 'large', help: 'from 96² pixels'}];
  /** Thresholds are multiples of 1/STEPS. */
  const STEPS = 200;

  /** Of text on canvases; that of the style sheet. */
  const FONT = '-apple-system, "Segoe UI", "Helvetica Neue", "Liberation Sans", Arial, sans-serif';

  const received = new Map();
  Explorer.receive = (name, content) => received.set(name, content);

  /** Run data/NAME.js and return what it hands over. (Pages from disk may run scripts, but not read files.) */
  function load(name) {
    return new Promise((resolve, reject) => {
      const script = document.createElement('script');
      script.src = `data/${name}.js`;
      script.onload = () => {
        const content = received.get(name);
        received.delete(name);
        script.remove();
        resolve(content);
      };
      script.onerror = () => reject(new Error(`data/${name}.js is missing`));
      document.head.append(script);
    });
  }

  async function decoded([type, text]) {
    const bytes = Uint8Array.fromBase64 ? Uint8Array.fromBase64(text) : Uint8Array.from(atob(text), c => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'));
    return new globalThis[type](await new Response(stream).arrayBuffer());
  }

  async function loadColumns(name) {
    const content = await load(name);
    const names = Object.keys(content);
    const arrays = await Promise.all(names.map(key => decoded(content[key])));
    return Object.fromEntries(names.map((key, i) => [key, arrays[i]]));
  }

  /** Where the entries of each image begin, and the end of all. */
  function starts(count) {
    const first = new Uint32Array(count.length + 1);
    for (let i = 0; i < count.length; i++) first[i + 1] = first[i] + count[i];
    return first;
  }

  /** The image of each entry. */
  function owners(first) {
    const image = new Uint32Array(first[first.length - 1]);
    for (let i = 0; i + 1 < first.length; i++) image.fill(i, first[i], first[i + 1]);
    return image;
  }

  /** Images and their objects. */
  class Dataset {
    constructor(about, objects) {
      this.title = about.title;
      this.scale = about.scale;
      this.edge = about.edge;
      this.classes = about.classes;
      this.images = about.images;
      this.names = about.images.map(image => image.name.toLowerCase());
      const {count, label, size, crowd, box} = objects;
      this.first = starts(count);
      this.image = owners(this.first);
      Object.assign(this, {label, size, crowd, box, numObjects: label.length});
      this.perClass = new Uint32Array(this.classes.length);
      for (let o = 0; o < label.length; o++) this.perClass[label[o]] += 1 - crowd[o];
      this.asked = this.perClass.reduce((a, b) => a + b, 0);
    }

    /** Objects of an image that are no crowds. */
    singles(image) {
      let count = 0;
      for (let o = this.first[image]; o < this.first[image + 1]; o++) count += 1 - this.crowd[o];
      return count;
    }

    /** [left, top, right, bottom] in pixels of the image, of entry `i` of columns with `box`. */
    corners(columns, i, image) {
      const [height, width] = this.images[image].size;
      const [x, y] = [(width || 1) / this.edge, (height || 1) / this.edge];
      const b = columns.box.subarray(4 * i, 4 * i + 4);
      return [b[0] * x, b[1] * y, b[2] * x, b[3] * y];
    }
  }

  /** The detections of one checkpoint; arrays have an entry for each detection, image after image, best first. */
  class Detector {
    constructor(about, columns, data) {
      this.name = about.label;
      this.source = about.source;
      this.about = about;
      this.data = data;
      const {count, score, iou, label, kind, target, size} = columns;
      Object.assign(this, {score, iou, label, kind, size, length: score.length});
      /** Corners of the boxes, which arrive later than the rest. */
      this.box = null;
      this.first = starts(count);
      this.image = owners(this.first);
      this.object = new Int32Array(this.length);
      /** By object: the detection that finds it, −1 for none; and the best score of one that finds it or nearly does. */
      this.foundBy = new Int32Array(data.numObjects).fill(-1);
      this.nearScore = new Uint16Array(data.numObjects);
      this.hasNear = new Uint8Array(data.numObjects);
      this.right = new Uint32Array(data.classes.length * (STEPS + 1));
      this.wrong = new Uint32Array(data.classes.length * (STEPS + 1));
      for (let i = 0; i < data.images.length; i++) this.derive(i, target);
      this.accumulate();
    }

    derive(i, target) {
      const {data, score, kind} = this;
      for (let d = this.first[i]; d < this.first[i + 1]; d++) {
        const object = target[d] < 0 ? -1 : data.first[i] + target[d];
        this.object[d] = object;
        if (kind[d] === CORRECT) this.foundBy[object] = d;
        if (kind[d] <= LOCALISATION) {
          this.nearScore[object] = Math.max(this.nearScore[object], score[d]);
          this.hasNear[object] = 1;
        }
        const bin = this.label[d] * (STEPS + 1) + Math.floor((score[d] * STEPS) / data.scale);
        (kind[d] === CORRECT ? this.right : this.wrong)[bin]++;
      }
    }

    /** Turn the numbers in each bin of the score into numbers from each threshold on. */
    accumulate() {
      for (const counts of [this.right, this.wrong]) {
        for (let start = 0; start < counts.length; start += STEPS + 1) {
          for (let bin = start + STEPS - 1; bin >= start; bin--) counts[bin] += counts[bin + 1];
        }
      }
    }

    /** Detections from a threshold on, of one class or of all (null) together. */
    tally(step, label = null) {
      let right = 0, wrong = 0;
      const labels = label === null ? this.data.classes.keys() : [label];
      for (const l of labels) {
        right += this.right[l * (STEPS + 1) + step];
        wrong += this.wrong[l * (STEPS + 1) + step];
      }
      const objects = label === null ? this.data.asked : this.data.perClass[label];
      const precision = right + wrong ? right / (right + wrong) : null;
      const recall = objects ? right / objects : null;
      const f1 = objects + right + wrong ? (2 * right) / (objects + right + wrong) : null;
      return {right, wrong, objects, precision, recall, f1};
    }

    /** The threshold, in steps, at which F1 is highest. */
    bestStep(label = null) {
      const values = Array.from({length: STEPS + 1}, (_, step) => this.tally(step, label).f1 ?? 0);
      return values.indexOf(Math.max(...values));
    }

    isFound(object, step) {
      const d = this.foundBy[object];
      return d >= 0 && this.reaches(d, step);
    }

    isMissed(object, step) {
      return !this.data.crowd[object] && !(this.hasNear[object] && this.nearScore[object] >= this.least(step));
    }

    reaches(d, step) {
      return this.score[d] >= this.least(step);
    }

    /** The least stored score from a threshold on: a whole number, as STEPS divides the scale. */
    least(step) {
      return (step * this.data.scale) / STEPS;
    }

    /** Call `visit(detection, image)` for all from a threshold on. Images have their best first, so that few are looked at. */
    forReached(step, visit) {
      const {score, first} = this;
      const least = this.least(step);
      for (let image = 0; image + 1 < first.length; image++) {
        for (let d = first[image]; d < first[image + 1] && score[d] >= least; d++) visit(d, image);
      }
    }

    /** Mean AP, AP50 and AP75 over classes with objects, or those of one class; null where there is none. */
    ap(which, label = null) {
      const rows = label === null ? this.about.classes : [this.about.classes[label]];
      const values = rows.filter(row => row.ap).map(row => row.ap[which]);
      return values.length ? values.reduce((a, b) => a + b, 0) / values.length : null;
    }
  }

  /** The best-regressed query of each object that is no crowd: shaped as detections, one for each object. */
  class BestRegressed {
    constructor(columns, data) {
      const {score, iou, confident, box} = columns;
      Object.assign(this, {score, iou, box, length: score.length});
      this.object = Int32Array.from(data.label.keys()).filter(o => !data.crowd[o]);
      this.image = Uint32Array.from(this.object, o => data.image[o]);
      this.first = starts(data.images.map((_, i) => data.singles(i)));
      this.label = Uint16Array.from(this.object, o => data.label[o]);
      this.size = Uint8Array.from(this.object, o => data.size[o]);
      /** 0: among the N most confident queries of its image with N objects; 1: not. */
      this.kind = confident.map(value => 1 - value);
    }
  }

  Object.assign(Explorer, {
    FONT, KINDS, SIZES, STEPS, CORRECT, CLASSIFICATION, LOCALISATION, MISSED,
    load, loadColumns, Dataset, Detector, BestRegressed,
  });
})();
