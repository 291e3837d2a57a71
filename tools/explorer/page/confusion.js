'use strict';

/** Which class is taken for which: rows are objects, columns what was said of them; cells pick their boxes. */
(() => {
  const {CORRECT, CLASSIFICATION, node, NUMBER} = Explorer;
  /** More classes than this are too many for the eye; those with the most errors are shown. */
  const MOST = 40;

  class Confusion {
    constructor(host, view) {
      this.view = view;
      this.side = 0;
      this.toggle = node('div', {className: 'segments', role: 'group', 'aria-label': 'detector'});
      this.about = node('p', {className: 'hint'});
      this.canvas = node('canvas', {className: 'matrix', 'aria-label': 'confusion matrix'});
      this.canvas.setAttribute('role', 'img');
      this.reading = node('output', {className: 'reading'});
      const scroll = node('div', {className: 'scroll'}, this.canvas);
      host.append(this.toggle, scroll, this.reading, this.about);
      this.canvas.addEventListener('pointermove', event => this.read(this.cellAt(event)));
      this.canvas.addEventListener('click', event => this.pick(this.cellAt(event)));
      new ResizeObserver(() => this.draw()).observe(host);
    }

    update(view) {
      if (view.settings.tab !== 'confusion') return;
      this.side = Math.min(this.side, view.shown.length - 1);
      this.toggle.hidden = view.shown.length < 2;
      this.toggle.replaceChildren(...view.shown.map((detector, side) => {
        const button = node('button', {type: 'button'}, `${'AB'[side]} ${detector.name}`);
        button.setAttribute('aria-pressed', side === this.side);
        button.addEventListener('click', () => {
          this.side = side;
          this.update(view);
        });
        return button;
      }));
      this.count();
      this.draw();
    }

    /** Cells [rows][columns] of the classes in `labels`, with a last row for "no object" and a last column for "missed". */
    count() {
      const {view, side} = this;
      const detector = view.shown[side];
      const step = view.step(side);
      const classes = view.data.classes.length;
      const all = new Map();
      const add = (row, column) => all.set(row * (classes + 1) + column, (all.get(row * (classes + 1) + column) ?? 0) + 1);
      detector.forReached(step, d => add(this.rowOf(detector, d), detector.label[d]));
      for (let o = 0; o < view.data.numObjects; o++) if (this.isLost(detector, o, step)) add(view.data.label[o], classes);
      const errors = new Float64Array(classes);
      for (const [key, count] of all) {
        const [row, column] = [Math.floor(key / (classes + 1)), key % (classes + 1)];
        if (row !== column && row < classes) errors[row] += count;
        if (row !== column && column < classes) errors[column] += count;
      }
      const worst = [...errors.keys()].sort((a, b) => errors[b] - errors[a]).slice(0, MOST);
      this.labels = classes > MOST ? worst.sort((a, b) => a - b) : [...errors.keys()];
      const axis = [...this.labels, classes];
      this.cells = axis.map(row => axis.map(column => all.get(row * (classes + 1) + column) ?? 0));
      const chosen = classes > MOST ? `The ${MOST} classes with the most errors. ` : '';
      this.about.textContent = `${chosen}Boxes from the threshold ${(step / Explorer.STEPS).toFixed(3)} on, IoU 0.50. In the last row boxes that are no object's: misplaced, ` +
        'duplicates, background. In the last column objects that no box of their class finds. Shades are shares of the row. A click picks the boxes of a cell.';
    }

    rowOf(detector, d) {
      const {data} = this.view;
      return detector.kind[d] === CORRECT || detector.kind[d] === CLASSIFICATION ? data.label[detector.object[d]] : data.classes.length;
    }

    isLost(detector, object, step) {
      return !this.view.data.crowd[object] && !detector.isFound(object, step);
    }

    names() {
      const {classes} = this.view.data;
      const rows = [...this.labels.map(label => classes[label]), 'no object'];
      return {rows, columns: [...rows.slice(0, -1), 'missed']};
    }

    draw() {
      if (!this.cells || this.view.settings.tab !== 'confusion') return;
      const count = this.cells.length;
      const {rows, columns} = this.names();
      const context = this.canvas.getContext('2d');
      const available = this.canvas.parentElement.clientWidth;
      context.font = `12px ${Explorer.FONT}`;
      const margin = Math.min(130, Math.max(...[...rows, ...columns].map(name => context.measureText(name).width)) + 12);
      const cell = Math.max(9, Math.min(64, (available - margin - 2) / count));
      const upright = cell >= Math.max(...columns.map(name => context.measureText(name).width)) + 6;
      const top = upright ? 22 : margin;
      const size = {width: margin + cell * count + 1, height: top + cell * count + 1};
      Object.assign(this, {margin, top, cell});
      const ratio = window.devicePixelRatio || 1;
      for (const side of ['width', 'height']) {
        this.canvas.style[side] = `${size[side]}px`;
        this.canvas[side] = Math.round(size[side] * ratio);
      }
      context.scale(ratio, ratio);
      const font = Math.min(12, cell * 0.9);
      this.cells.forEach((row, r) => {
        const total = row.reduce((a, b) => a + b, 0);
        row.forEach((value, c) => this.drawCell(context, r, c, value, total));
      });
      context.fillStyle = '#1d1d1f';
      context.font = `${font}px ${Explorer.FONT}`;
      context.textAlign = 'right';
      context.textBaseline = 'middle';
      rows.forEach((name, r) => context.fillText(name, margin - 6, top + (r + 0.5) * cell, margin - 8));
      context.textAlign = upright ? 'center' : 'left';
      columns.forEach((name, c) => {
        context.save();
        context.translate(margin + (c + 0.5) * cell, top - (upright ? 10 : 6));
        if (!upright) context.rotate(-Math.PI / 2);
        context.fillText(name, 0, 0, margin - 8);
        context.restore();
      });
      context.strokeStyle = '#8b8d92';
      const last = (count - 1) * cell;
      context.beginPath();
      context.moveTo(margin, top + last);
      context.lineTo(size.width, top + last);
      context.moveTo(margin + last, top);
      context.lineTo(margin + last, size.height);
      context.stroke();
    }

    drawCell(context, r, c, value, total) {
      const {margin, top, cell} = this;
      const [x, y] = [margin + c * cell, top + r * cell];
      const share = total ? Math.sqrt(value / total) : 0;
      const mix = (from, to) => Math.round(from + (to - from) * share);
      context.fillStyle = value ? `rgb(${mix(240, 8)}, ${mix(244, 64)}, ${mix(248, 120)})` : '#faf9f7';
      context.fillRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
      if (cell < 24 || !value) return;
      context.fillStyle = share > 0.55 ? '#ffffff' : '#1d1d1f';
      context.font = `${Math.min(13, cell * 0.36)}px ${Explorer.FONT}`;
      context.textAlign = 'center';
      context.textBaseline = 'middle';
      context.fillText(value < 10000 ? value : `${Math.round(value / 1000)}k`, x + cell / 2, y + cell / 2);
    }

    cellAt(event) {
      const box = this.canvas.getBoundingClientRect();
      const at = offset => Math.floor(offset / this.cell);
      const [r, c] = [at(event.clientY - box.top - this.top), at(event.clientX - box.left - this.margin)];
      const inside = r >= 0 && c >= 0 && r < this.cells.length && c < this.cells.length;
      return inside ? {r, c} : null;
    }

    describe({r, c}) {
      const {rows, columns} = this.names();
      const last = this.cells.length - 1;
      if (c === last) return `${rows[r]} missed`;
      return r === last ? `${columns[c]} where there is none` : r === c ? `${rows[r]} found` : `${rows[r]} taken for ${columns[c]}`;
    }

    read(cell) {
      this.canvas.style.cursor = cell ? 'pointer' : 'default';
      this.reading.textContent = cell ? `${this.describe(cell)}: ${NUMBER.format(this.cells[cell.r][cell.c])}` : '';
    }

    pick(cell) {
      if (!cell || !this.cells[cell.r][cell.c]) return;
      const {side} = this;
      const classes = this.view.data.classes.length;
      const [row, column] = [this.labels[cell.r] ?? classes, this.labels[cell.c] ?? classes];
      const note = `${this.describe(cell)}${this.view.shown.length > 1 ? ` by ${'AB'[side]}` : ''}`;
      this.view.set({population: 'detections', selection: {note, pick: view => this.picked(view, side, row, column)}});
    }

    picked(view, side, row, column) {
      const detector = view.shown[side];
      const step = view.step(side);
      const classes = view.data.classes.length;
      if (column === classes) {
        const lost = o => this.isLost(detector, o, step) && view.data.label[o] === row;
        return {side: 'objects', marks: Uint8Array.from({length: view.data.numObjects}, (_, o) => +lost(o)), weight: o => detector.nearScore[o]};
      }
      const marks = new Uint8Array(detector.length);
      detector.forReached(step, d => { marks[d] = +(detector.label[d] === column && this.rowOf(detector, d) === row); });
      return {side, marks, weight: d => detector.score[d]};
    }
  }

  Explorer.Confusion = Confusion;
})();
