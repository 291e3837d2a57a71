'use strict';

/** One picture large, with its boxes as a list. */
(() => {
  const {KINDS, node, short} = Explorer;

  class Detail {
    constructor(dialog) {
      this.dialog = dialog;
      this.title = dialog.querySelector('h2');
      this.body = dialog.querySelector('.large');
      this.place = 0;
      this.kept = new Map();
      for (const button of dialog.querySelectorAll('[data-turn]')) button.addEventListener('click', () => this.turn(Number(button.dataset.turn)));
      dialog.querySelector('.close').addEventListener('click', () => dialog.close());
      dialog.addEventListener('click', event => event.target === dialog && dialog.close());
      dialog.addEventListener('keydown', event => {
        const turn = {ArrowLeft: -1, ArrowRight: 1, k: -1, j: 1}[event.key];
        if (turn) this.turn(turn);
      });
    }

    get isOpen() {
      return this.dialog.open;
    }

    update(view) {
      this.view = view;
      if (this.isOpen) this.draw();
    }

    open(place) {
      this.place = place;
      if (!this.isOpen) this.dialog.showModal();
      this.draw();
    }

    turn(by) {
      const place = this.place + by;
      if (place >= 0 && place < this.view.entries.length) this.open(place);
    }

    draw() {
      const {view} = this;
      const entry = view.entries[this.place];
      if (!entry) {
        this.dialog.close();
        return;
      }
      const about = view.data.images[entry.image];
      this.title.textContent = `${about.name}`;
      this.dialog.querySelector('.where').textContent = `${this.place + 1} of ${view.entries.length} · ${about.size[1]} × ${about.size[0]} pixels`;
      this.body.replaceChildren(...view.shown.map((detector, side) => this.column(detector, side, entry.image)));
    }

    column(detector, side, image) {
      const {view} = this;
      const pair = view.shown.length > 1;
      const narrow = window.innerWidth < 760;
      const width = Math.min(window.innerWidth - 70, 1200) / (pair && !narrow ? 2 : 1) - 12;
      const [height, full] = view.data.images[image].size;
      const room = (pair ? 0.6 : 0.8) * window.innerHeight;
      const shownWidth = Math.min(pair || narrow ? width : 0.62 * width, (room * (full || 1)) / (height || 1));
      const svg = Explorer.picture(view, side, image, shownWidth, this.kept, 'all');
      svg.style.width = `${shownWidth}px`;
      const heading = node('h3', {}, ...(pair ? [node('span', {className: `badge side${side}`}, 'AB'[side]), ' '] : []), detector.name);
      const list = this.list(detector, side, image, svg);
      return node('section', {className: pair ? 'column' : 'column single'}, heading, node('div', {className: 'beside'}, svg, list));
    }

    /** The boxes from the threshold on, and the objects that nothing finds; pointing at a row points at the box. */
    list(detector, side, image, svg) {
      const {view} = this;
      const {data} = view;
      const rows = [];
      for (let d = detector.first[image]; d < detector.first[image + 1]; d++) {
        const weight = view.weight(side, d);
        if (!weight) continue;
        const kind = KINDS[detector.kind[d]];
        const cells = [data.classes[detector.label[d]], short(detector.score[d] / data.scale), short(detector.iou[d] / data.scale), kind.name];
        rows.push(this.row(cells, kind.colour, weight, svg, `[data-detection="${d}"]`));
      }
      for (let o = data.first[image]; o < data.first[image + 1]; o++) {
        if (data.crowd[o] || detector.isFound(o, view.step(side))) continue;
        const d = detector.foundBy[o];
        const score = d < 0 ? '–' : short(detector.score[d] / data.scale);
        const state = d < 0 ? 'not found at any threshold' : 'found below the threshold';
        rows.push(this.row([data.classes[data.label[o]], score, '–', state], '#222222', 'object', svg, `[data-object="${o}"]`));
      }
      const head = node('tr', {}, ...['class', 'score', 'IoU', 'what it is'].map(name => node('th', {scope: 'col'}, name)));
      return node('div', {className: 'scroll'}, node('table', {}, node('thead', {}, head), node('tbody', {}, ...rows)));
    }

    row(cells, colour, weight, svg, selector) {
      const [name, ...rest] = cells;
      const swatch = node('span', {className: 'swatch'});
      swatch.style.background = colour;
      const row = node('tr', {className: weight}, node('td', {}, swatch, name), ...rest.map(text => node('td', {}, text)));
      row.addEventListener('pointerenter', () => svg.querySelector(selector)?.classList.add('pointed'));
      row.addEventListener('pointerleave', () => svg.querySelector(selector)?.classList.remove('pointed'));
      return row;
    }
  }

  Explorer.Detail = Detail;
})();
