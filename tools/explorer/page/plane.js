'use strict';

/** A square of points, both coordinates in [0, 1]: a click picks the nearest, dragging a rectangle picks those within. */
(() => {
  const {shape, prepare, drawGrid, drawLines} = Explorer;
  const MARGIN = {left: 44, right: 10, top: 8, bottom: 38};
  /** More points than this are drawn as cells. */
  const MOST_DOTS = 12000;
  const MOST_RINGS = 500;
  const CELL = 3;
  const RADIUS = 3.2;
  /** Pixels from a point within which a click still means it. */
  const REACH = 14;

  class Plane {
    /**
     * @param host element that the canvas is put into
     * @param options {x, y: names of the axes; name: for screen readers; pick(region): called with {x0, y0, x1, y1} in
     *   [0, 1] for a rectangle and {point} for a click, null for a click beside all points; hover(point): text for one}
     */
    constructor(host, options) {
      this.options = options;
      this.canvas = document.createElement('canvas');
      this.canvas.className = 'plane';
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute('role', 'img');
      this.canvas.setAttribute('aria-label', options.name);
      this.tip = document.createElement('output');
      this.tip.className = 'tip';
      this.tip.hidden = true;
      host.classList.add('plane-host');
      host.append(this.canvas, this.tip);
      this.content = null;
      this.brush = null;
      this.rings = [];
      this.canvas.addEventListener('pointerdown', event => this.down(event));
      this.canvas.addEventListener('pointermove', event => this.move(event));
      this.canvas.addEventListener('pointerup', event => this.up(event));
      this.canvas.addEventListener('pointercancel', () => this.cancel());
      this.canvas.addEventListener('pointerleave', () => { this.tip.hidden = true; });
      new ResizeObserver(() => this.canvas.clientWidth !== this.drawnWidth && this.draw()).observe(host);
    }

    /**
     * @param content {x, y: arrays; scale: what stands for 1; group: array; styles: {colour, shape} of each group; mask and
     *   allowed: which points and groups are shown; threshold: of x, or null; levels: of y; marks: picked points or
     *   null; region: rectangle picked, or null}
     */
    update(content) {
      this.content = content;
      this.rings = [];
      this.draw();
    }

    /** Ring some points until told otherwise, or updated. */
    ring(points) {
      this.rings = points;
      this.draw();
    }

    get area() {
      const {width} = this.canvas.getBoundingClientRect();
      return {width: width - MARGIN.left - MARGIN.right, height: width * 0.94 - MARGIN.top - MARGIN.bottom};
    }

    toPixels(x, y) {
      const {width, height} = this.area;
      return [MARGIN.left + x * width, MARGIN.top + (1 - y) * height];
    }

    fromPixels(left, top) {
      const {width, height} = this.area;
      const clip = value => Math.min(1, Math.max(0, value));
      return [clip((left - MARGIN.left) / width), clip(1 - (top - MARGIN.top) / height)];
    }

    draw() {
      const {width} = this.canvas.getBoundingClientRect();
      if (!this.content || width < 60) return;
      this.drawnWidth = this.canvas.clientWidth;
      const context = prepare(this.canvas, width, width * 0.94);
      this.drawAxes(context);
      const {mask, allowed, group} = this.content;
      let count = 0;
      for (let i = 0; i < mask.length; i++) count += mask[i] && allowed[group[i]];
      if (count > MOST_DOTS) this.drawCells(context);
      else this.drawDots(context);
      this.drawPicked(context);
      this.drawRegion(context);
    }

    drawAxes(context) {
      const at = (x, y) => this.toPixels(x, y);
      drawGrid(context, at, this.options);
      const [left, bottom] = at(0, 0);
      const [right, top] = at(1, 1);
      context.strokeStyle = '#c9c7c1';
      context.setLineDash([2, 3]);
      const levels = this.content.levels.map(level => at(0, level)[1]);
      drawLines(context, [[left, bottom, right, top], ...levels.map(y => [left, y, right, y])]);
      context.setLineDash([]);
      if (this.content.threshold === null) return;
      const [x] = at(this.content.threshold, 0);
      context.strokeStyle = '#1d1d1f';
      drawLines(context, [[x, top, x, bottom]]);
    }

    drawDots(context) {
      const {x, y, scale, mask, allowed, group, styles, threshold} = this.content;
      const paths = styles.map(style => shape(style.shape, RADIUS));
      const least = threshold === null ? -1 : threshold * scale;
      const {width, height} = this.area;
      for (let i = 0; i < mask.length; i++) {
        if (!mask[i] || !allowed[group[i]]) continue;
        const [left, top] = [MARGIN.left + (x[i] / scale) * width, MARGIN.top + (1 - y[i] / scale) * height];
        context.translate(left, top);
        context.globalAlpha = x[i] < least ? 0.22 : 0.75;
        context.fillStyle = styles[group[i]].colour;
        context.fill(paths[group[i]]);
        context.translate(-left, -top);
      }
      context.globalAlpha = 1;
    }

    /** How many points of each group lie in each cell; kept as long as the points shown stay the same. */
    countCells(columns, rows) {
      const {x, y, scale, mask, allowed, group, styles} = this.content;
      const key = [x, y, mask, columns, rows, ...allowed];
      if (this.cells?.key.length === key.length && key.every((part, i) => part === this.cells.key[i])) return this.cells;
      const groups = styles.length;
      const counts = new Uint32Array(columns * rows * groups);
      const [perColumn, perRow] = [columns / scale, rows / scale];
      for (let i = 0; i < mask.length; i++) {
        if (!mask[i] || !allowed[group[i]]) continue;
        const column = Math.min(columns - 1, Math.floor(x[i] * perColumn));
        const row = Math.min(rows - 1, Math.floor(rows - y[i] * perRow));
        counts[(row * columns + column) * groups + group[i]]++;
      }
      this.cells = {key, counts, most: counts.reduce((a, b) => Math.max(a, b), 1)};
      return this.cells;
    }

    /** Cells of a few pixels: the colour is that of the most frequent group, its strength the logarithm of the number. */
    drawCells(context) {
      const {styles, threshold} = this.content;
      const {width, height} = this.area;
      const [columns, rows, groups] = [Math.ceil(width / CELL), Math.ceil(height / CELL), styles.length];
      const {counts, most} = this.countCells(columns, rows);
      for (let cell = 0; cell < columns * rows; cell++) {
        let [total, best] = [0, 0];
        for (let g = 0; g < groups; g++) {
          const count = counts[cell * groups + g];
          total += count;
          if (count > counts[cell * groups + best]) best = g;
        }
        if (!total) continue;
        const column = cell % columns;
        const dim = threshold !== null && (column + 1) / columns <= threshold ? 0.5 : 1;
        context.globalAlpha = dim * (0.25 + 0.75 * Math.min(1, Math.log1p(total) / Math.log1p(most)));
        context.fillStyle = styles[best].colour;
        context.fillRect(MARGIN.left + column * CELL, MARGIN.top + Math.floor(cell / columns) * CELL, CELL, CELL);
      }
      context.globalAlpha = 1;
    }

    drawPicked(context) {
      const {x, y, scale, marks, region} = this.content;
      const picked = [...this.rings];
      if (marks && !region) {
        for (let i = 0; i < marks.length && picked.length < MOST_RINGS; i++) if (marks[i]) picked.push(i);
      }
      const ring = shape('circle', RADIUS + 3.5);
      context.strokeStyle = '#1d1d1f';
      context.lineWidth = 2;
      for (const i of picked) {
        const [left, top] = this.toPixels(x[i] / scale, y[i] / scale);
        context.translate(left, top);
        context.stroke(ring);
        context.translate(-left, -top);
      }
    }

    drawRegion(context) {
      const region = this.brush?.region ?? this.content.region;
      if (!region) return;
      const [left, top] = this.toPixels(region.x0, region.y1);
      const [right, bottom] = this.toPixels(region.x1, region.y0);
      context.fillStyle = 'rgba(11, 93, 173, 0.10)';
      context.strokeStyle = '#0b5dad';
      context.lineWidth = 1.5;
      context.fillRect(left, top, right - left, bottom - top);
      context.strokeRect(left, top, right - left, bottom - top);
    }

    /** Index of the shown point nearest to a place of the canvas, −1 if none is within reach. */
    nearest(left, top) {
      const {x, y, scale, mask, allowed, group} = this.content;
      const {width, height} = this.area;
      let [best, least] = [-1, REACH * REACH];
      for (let i = 0; i < mask.length; i++) {
        if (!mask[i] || !allowed[group[i]]) continue;
        const dx = MARGIN.left + (x[i] / scale) * width - left;
        const dy = MARGIN.top + (1 - y[i] / scale) * height - top;
        const distance = dx * dx + dy * dy;
        if (distance < least) [best, least] = [i, distance];
      }
      return best;
    }

    place(event) {
      const box = this.canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    }

    down(event) {
      if (event.button || !this.content) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.brush = {from: this.place(event), region: null};
    }

    move(event) {
      const [left, top] = this.place(event);
      if (!this.brush) {
        this.showTip(left, top);
        return;
      }
      const [x0, y0] = this.brush.from;
      if (!this.brush.region && Math.hypot(left - x0, top - y0) < 5) return;
      const [a, b] = [this.fromPixels(x0, y0), this.fromPixels(left, top)];
      const [low, high] = [i => Math.min(a[i], b[i]), i => Math.max(a[i], b[i])];
      this.brush.region = {x0: low(0), y0: low(1), x1: high(0), y1: high(1)};
      this.tip.hidden = true;
      this.draw();
    }

    up(event) {
      if (!this.brush) return;
      const {region} = this.brush;
      this.brush = null;
      if (region) {
        this.options.pick(region);
        return;
      }
      const point = this.nearest(...this.place(event));
      this.options.pick(point < 0 ? null : {point});
    }

    cancel() {
      this.brush = null;
      this.draw();
    }

    showTip(left, top) {
      const point = this.content ? this.nearest(left, top) : -1;
      this.tip.hidden = point < 0;
      if (point < 0) return;
      this.tip.textContent = this.options.hover(point);
      const {width} = this.canvas.getBoundingClientRect();
      this.tip.style.left = `${Math.min(left + 12, width - 150)}px`;
      this.tip.style.top = `${top + 14}px`;
    }
  }

  Explorer.Plane = Plane;
})();
