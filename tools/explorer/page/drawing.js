'use strict';

/** What planes and charts draw alike: marks, axes, sharp canvases. */
(() => {
  const SHAPES = {
    circle: (p, r) => p.arc(0, 0, r, 0, 2 * Math.PI),
    square: (p, r) => p.rect(-r * 0.85, -r * 0.85, 1.7 * r, 1.7 * r),
    triangle: (p, r) => polygon(p, [[0, -1.2 * r], [1.1 * r, 0.8 * r], [-1.1 * r, 0.8 * r]]),
    diamond: (p, r) => polygon(p, [[0, -1.3 * r], [1.1 * r, 0], [0, 1.3 * r], [-1.1 * r, 0]]),
    plus: (p, r) => polygon(p, bars(r, 0)),
    cross: (p, r) => polygon(p, bars(r, Math.PI / 4)),
    dashes: (p, r) => p.rect(-r, -r, 2 * r, 2 * r),
  };

  function polygon(path, corners) {
    corners.forEach(([x, y], i) => (i ? path.lineTo(x, y) : path.moveTo(x, y)));
    path.closePath();
  }

  function bars(r, turn) {
    const [a, b] = [1.3 * r, 0.45 * r];
    const corners = [[b, a], [b, b], [a, b], [a, -b], [b, -b], [b, -a], [-b, -a], [-b, -b], [-a, -b], [-a, b], [-b, b], [-b, a]];
    return corners.map(([x, y]) => [x * Math.cos(turn) - y * Math.sin(turn), x * Math.sin(turn) + y * Math.cos(turn)]);
  }

  /** The mark of a name as a path around (0, 0). */
  function shape(name, radius) {
    const path = new Path2D();
    SHAPES[name](path, radius);
    return path;
  }

  /** The context of a canvas of so many CSS pixels, sharp on any screen. */
  function prepare(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    const context = canvas.getContext('2d');
    context.scale(ratio, ratio);
    return context;
  }

  function drawLines(context, lines) {
    context.lineWidth = 1;
    context.beginPath();
    for (const [x0, y0, x1, y1] of lines) {
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
    }
    context.stroke();
  }

  /** Grid, numbers and names of both axes over [0, 1]; `at(x, y)` is the place of a point in pixels. */
  function drawGrid(context, at, names) {
    const [left, bottom] = at(0, 0);
    const [right, top] = at(1, 1);
    context.font = `11px ${Explorer.FONT}`;
    for (const t of [0, 0.25, 0.5, 0.75, 1]) {
      const [x, y] = at(t, t);
      context.strokeStyle = '#ecebe7';
      drawLines(context, [[x, top, x, bottom], [left, y, right, y]]);
      const text = t.toFixed(2).replace(/0$/, '');
      context.fillStyle = '#5c5f66';
      context.textAlign = t === 0 ? 'left' : t === 1 ? 'right' : 'center';
      context.fillText(text, x, bottom + 15);
      context.textAlign = 'right';
      context.fillText(text, left - 6, y + (t === 1 ? 8 : t === 0 ? 0 : 4));
    }
    context.fillStyle = '#1d1d1f';
    context.textAlign = 'center';
    context.fillText(names.x, (left + right) / 2, bottom + 31);
    context.save();
    context.translate(11, (top + bottom) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(names.y, 0, 0);
    context.restore();
  }

  Object.assign(Explorer, {shape, prepare, drawLines, drawGrid});
})();
