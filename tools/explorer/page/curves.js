'use strict';

/** Precision over recall, and F1, precision and recall over the threshold, of the shown detectors. */
(() => {
  const {STEPS, node} = Explorer;
  const MARGIN = {left: 44, right: 12, top: 10, bottom: 36};
  const INK = ['#1d1d1f', '#7a3fb0'];
  const DASHES = [[], [6, 3]];
  const OVERLAPS = ['mean of IoU 0.50 to 0.95', 'IoU 0.50', 'IoU 0.75'];

  /** Lines over [0, 1] × [0, 1]; dragging along it calls `seek` with x, and with true where it begins. */
  class Chart {
    constructor(host, {title, x, y, seek}) {
      this.axes = {x, y};
      this.canvas = node('canvas', {className: 'chart', 'aria-label': title});
      this.canvas.setAttribute('role', 'img');
      this.reading = node('output', {className: 'reading'});
      host.append(node('h3', {}, title), this.canvas, this.reading);
      this.lines = [];
      this.canvas.addEventListener('pointerdown', event => {
        this.canvas.setPointerCapture(event.pointerId);
        seek(this.at(event), true);
      });
      this.canvas.addEventListener('pointermove', event => {
        this.read(this.at(event));
        if (event.buttons & 1) seek(this.at(event), false);
      });
      new ResizeObserver(() => this.draw()).observe(host);
    }

    at(event) {
      const box = this.canvas.getBoundingClientRect();
      return Math.min(1, Math.max(0, (event.clientX - box.left - MARGIN.left) / (box.width - MARGIN.left - MARGIN.right)));
    }

    /** @param lines {name, values: evenly spaced over x, colour, dash, width}; marks: {x, y, colour}, y null for a vertical */
    update(lines, marks) {
      Object.assign(this, {lines, marks});
      this.draw();
    }

    read(x) {
      const texts = this.lines.filter(line => line.name).map(line => {
        const value = line.values[Math.round(x * (line.values.length - 1))];
        return `${line.name} ${value === null ? '–' : value.toFixed(3)}`;
      });
      this.reading.textContent = `${this.axes.x} ${x.toFixed(2)}: ${texts.join(' · ')}`;
    }

    draw() {
      const {width} = this.canvas.getBoundingClientRect();
      if (!width) return;
      const height = Math.min(300, Math.max(200, width * 0.5));
      const context = Explorer.prepare(this.canvas, width, height);
      const px = x => MARGIN.left + x * (width - MARGIN.left - MARGIN.right);
      const py = y => MARGIN.top + (1 - y) * (height - MARGIN.top - MARGIN.bottom);
      Explorer.drawGrid(context, (x, y) => [px(x), py(y)], this.axes);
      for (const {values, colour, dash, width: stroke} of this.lines) {
        context.strokeStyle = colour;
        context.lineWidth = stroke;
        context.setLineDash(dash);
        context.beginPath();
        let pen = false;
        values.forEach((value, i) => {
          if (value === null) pen = false;
          else {
            context[pen ? 'lineTo' : 'moveTo'](px(i / (values.length - 1)), py(value));
            pen = true;
          }
        });
        context.stroke();
      }
      context.setLineDash([]);
      for (const mark of this.marks ?? []) this.mark(context, mark, px, py);
    }

    mark(context, mark, px, py) {
      context.strokeStyle = context.fillStyle = mark.colour;
      context.lineWidth = 1;
      context.beginPath();
      if (mark.y === null) {
        context.moveTo(px(mark.x), py(0));
        context.lineTo(px(mark.x), py(1));
        context.stroke();
      } else {
        context.arc(px(mark.x), py(mark.y), 4, 0, 2 * Math.PI);
        context.fill();
      }
    }
  }

  class Curves {
    constructor(host, view) {
      this.view = view;
      this.overlap = 1;
      const select = node('select', {'aria-label': 'IoU of the precision-recall curve'}, ...OVERLAPS.map((name, i) => node('option', {value: i}, name)));
      select.value = this.overlap;
      select.addEventListener('change', () => {
        this.overlap = Number(select.value);
        this.update(view);
      });
      const about = 'Drag in a chart to set thresholds: in the first one the nearest, in the second one those of both at the same recall. Classes are pooled in the first; the second is the mean over classes, as in AP.';
      this.legend = node('p', {className: 'legend'});
      host.append(this.legend);
      this.confidence = new Chart(host, {title: 'F1 over the threshold, IoU 0.50', x: 'threshold', y: 'F1', seek: (x, begins) => this.seekThreshold(Math.round(x * STEPS), begins)});
      host.append(node('label', {className: 'inline'}, 'Precision-recall at ', select));
      this.recall = new Chart(host, {title: 'Precision over recall', x: 'recall', y: 'precision', seek: x => this.seekRecall(x)});
      host.append(node('p', {className: 'hint'}, about));
    }

    /** Move the threshold that was nearest where the dragging began (both, where they are one). */
    seekThreshold(step, begins) {
      const {view} = this;
      const distance = side => Math.abs(view.step(side) - step);
      if (begins) this.dragged = view.shown.length > 1 && distance(1) < distance(0) ? 1 : 0;
      view.setStep(this.dragged, step);
    }

    /** Give each detector the threshold at which it finds so much: that can be compared, other than scores. */
    seekRecall(recall) {
      const {view} = this;
      const steps = [...view.settings.steps];
      view.settings.sides.forEach((index, side) => { steps[index] = this.stepOfRecall(side, recall); });
      view.set({steps, linked: false});
    }

    /** The highest threshold at which so much is found (or the lowest of all). */
    stepOfRecall(side, recall) {
      const {label} = this.view.settings;
      let step = STEPS;
      while (step > 0 && (this.view.shown[side].tally(step, label).recall ?? 0) < recall) step--;
      return step;
    }

    update(view) {
      if (view.settings.tab !== 'curves') return;
      const {label} = view.settings;
      const pair = view.shown.length > 1;
      const subject = label === null ? 'all classes' : view.data.classes[label];
      this.legend.replaceChildren(`${subject}: `, ...view.shown.flatMap((detector, side) => [...(pair ? [node('span', {className: `badge side${side}`}, 'AB'[side])] : []), ` ${detector.name} `]),
        node('span', {className: 'muted'}, '· bold F1, fine precision and recall'));
      const [lines, marks, recallLines, recallMarks] = [[], [], [], []];
      view.shown.forEach((detector, side) => {
        const [colour, dash] = [INK[side], DASHES[side]];
        const whose = pair ? `${'AB'[side]} ` : '';
        const tallies = Array.from({length: STEPS + 1}, (_, step) => detector.tally(step, label));
        const line = (name, width) => ({name: `${whose}${name}`, values: tallies.map(t => t[name.toLowerCase()]), colour, dash, width});
        lines.push(line('F1', 2.4), line('precision', 0.9), line('recall', 0.9));
        marks.push({x: view.step(side) / STEPS, y: null, colour});
        recallLines.push({name: `${whose}precision`, values: this.precision(detector, label), colour, dash, width: 2});
        const now = detector.tally(view.step(side), label);
        if (label !== null && this.overlap === 1 && now.precision !== null && now.recall !== null) recallMarks.push({x: now.recall, y: now.precision, colour});
      });
      this.confidence.update(lines, marks);
      this.recall.update(recallLines, recallMarks);
      this.confidence.read(view.step(0) / STEPS);
    }

    /** Precision at 101 recalls of a class, or the mean over classes with objects. */
    precision(detector, label) {
      const rows = label === null ? detector.about.classes : [detector.about.classes[label]];
      const curves = rows.filter(row => row.precision).map(row => row.precision[this.overlap]);
      return Array.from({length: 101}, (_, i) => (curves.length ? curves.reduce((sum, curve) => sum + curve[i], 0) / curves.length : null));
    }
  }

  Explorer.Curves = Curves;
})();
