'use strict';

/** A picture with the boxes of one detector: an SVG in the pixels of the image. */
(() => {
  const {KINDS} = Explorer;
  const NAMESPACE = 'http://www.w3.org/2000/svg';
  /** Share of its own size that is shown around a box when a picture is zoomed to it. */
  const CONTEXT = 0.75;
  const CONFIDENT = [{colour: '#009E73', name: 'among the most confident'}, {colour: '#D55E00', name: 'not among the most confident'}];

  function element(name, attributes, ...children) {
    const node = document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }

  const short = value => value.toFixed(2).replace(/^0/, '');

  /** "dog .93 · IoU .42 · place" */
  function describe(view, side, d) {
    const {data} = view;
    const detector = view.shown[side];
    const score = short(detector.score[d] / data.scale);
    const words = [`${data.classes[detector.label[d]]} ${score}`, `IoU ${short(detector.iou[d] / data.scale)}`];
    return [...words, KINDS[detector.kind[d]].name].join(' · ');
  }

  function describeBest(view, side, i) {
    const {data} = view;
    const points = view.points[side];
    const numbers = `${data.classes[points.label[i]]} ${short(points.score[i] / data.scale)} · IoU ${short(points.iou[i] / data.scale)}`;
    return `${numbers} · ${CONFIDENT[points.kind[i]].name}`;
  }

  /** The boxes to draw, the weakest first: {box, colour, weight, label, title, dashed}. */
  function boxesOf(view, side, image) {
    const {data, settings} = view;
    const detector = view.shown[side];
    const boxes = [];
    if (settings.objects) {
      for (let o = data.first[image]; o < data.first[image + 1]; o++) {
        const name = data.classes[data.label[o]];
        const found = detector.isFound(o, view.step(side));
        const state = data.crowd[o] ? 'crowd' : found ? 'found' : 'not found';
        boxes.push({
          box: data.corners(data, o, image), colour: '#ffffff', weight: view.objectIsStrong(side, o) ? 'strong' : 'object',
          label: view.objectIsStrong(side, o) && !found ? name : '', title: `${name}, annotated, ${state}`, object: o,
          dashed: true, missed: !found && !data.crowd[o] && (view.objectIsStrong(side, o) || !(view.picked || view.filtered)),
        });
      }
    }
    for (let d = detector.first[image + 1] - 1; detector.box && d >= detector.first[image]; d--) {
      const weight = view.weight(side, d);
      if (!weight) continue;
      const kind = KINDS[detector.kind[d]];
      const score = short(detector.score[d] / data.scale);
      const label = weight === 'faint' ? '' : `${data.classes[detector.label[d]]} ${score}${kind.letter ? ` ${kind.letter}` : ''}`;
      boxes.push({box: data.corners(detector, d, image), colour: kind.colour, weight, label, title: describe(view, side, d), detection: d});
    }
    const points = view.points[side];
    if (points !== detector) {
      for (let i = points.first[image]; i < points.first[image + 1]; i++) {
        if (!(view.picked && view.picked.side === side && view.picked.marks[i])) continue;
        const label = `${data.classes[points.label[i]]} ${short(points.score[i] / data.scale)}`;
        const {colour} = CONFIDENT[points.kind[i]];
        boxes.push({box: data.corners(points, i, image), colour, weight: 'strong', label, title: describeBest(view, side, i)});
      }
    }
    const order = ['faint', 'object', 'plain', 'strong'];
    return boxes.sort((a, b) => order.indexOf(a.weight) - order.indexOf(b.weight));
  }

  /** [left, top, width, height]: all of an image, or the surroundings of what is strong in it. */
  function frame(view, image, boxes) {
    const [height, width] = view.data.images[image].size.map(side => side || 1);
    const strong = boxes.filter(box => box.weight === 'strong').map(box => box.box);
    if (!view.settings.zoom || !strong.length) return [0, 0, width, height];
    const [left, top] = [0, 1].map(i => Math.min(...strong.map(box => box[i])));
    const [right, bottom] = [2, 3].map(i => Math.max(...strong.map(box => box[i])));
    const side = Math.min(Math.max(width, height), Math.max(right - left, bottom - top, 8) * (1 + 2 * CONTEXT));
    const [w, h] = [Math.min(width, side), Math.min(height, side)];
    const clip = (middle, extent, whole) => Math.min(whole - extent, Math.max(0, middle - extent / 2));
    return [clip((left + right) / 2, w, width), clip((top + bottom) / 2, h, height), w, h];
  }

  /** One box: a dark halo under its colour, so that it is seen on any picture. */
  function drawn(box) {
    const [left, top, right, bottom] = box.box;
    const place = {x: left, y: top, width: Math.max(0, right - left), height: Math.max(0, bottom - top)};
    const group = element('g', {class: `box ${box.weight}${box.missed ? ' missed' : ''}${box.dashed ? ' annotated' : ''}`});
    if (box.detection !== undefined) group.dataset.detection = box.detection;
    if (box.object !== undefined) group.dataset.object = box.object;
    group.append(element('title', {}, box.title), element('rect', {...place, class: 'halo'}), element('rect', {...place, stroke: box.colour}));
    return group;
  }

  const measuring = document.createElement('canvas').getContext('2d');

  function textWidth(text) {
    measuring.font = `600 11px ${Explorer.FONT}`;
    return measuring.measureText(text).width;
  }

  /** Text on the upper edge of a box, or inside it where there is no room above. */
  function caption(box, unit, view) {
    const [left, top] = box.box;
    const size = 11 * unit;
    const width = (textWidth(box.label) + 6) * unit;
    const x = Math.max(view[0], Math.min(left, view[0] + view[2] - width));
    const y = top - size * 1.35 >= view[1] ? top - size * 1.35 : Math.max(top, view[1]);
    const dark = box.colour === '#0072B2' || box.colour === '#222222';
    return element('g', {class: 'caption'},
      element('rect', {x, y, width, height: size * 1.35, fill: box.colour}),
      element('text', {x: x + 3 * unit, y: y + size, 'font-size': size, fill: dark ? '#fff' : '#111'}, box.label));
  }

  /** The image itself; what is drawn anew takes the loaded element along, so that nothing flickers. */
  function pixels(image, kept, key, width, height) {
    if (!kept.has(key)) {
      const href = `pictures/${String(image).padStart(6, '0')}.jpg`;
      kept.set(key, element('image', {href, width, height, preserveAspectRatio: 'none'}));
    }
    return kept.get(key);
  }

  /**
   * @param width of the drawing on the screen in pixels
   * @param kept loaded images of earlier drawings by side and image
   * @param captions 'strong', or 'all' for plain boxes too
   */
  function picture(view, side, image, width, kept, captions = 'strong') {
    const {data} = view;
    const about = data.images[image];
    const [fullHeight, fullWidth] = about.size.map(length => length || 1);
    const boxes = boxesOf(view, side, image);
    const visible = frame(view, image, boxes);
    const unit = visible[2] / width;
    const svg = element('svg', {viewBox: visible.join(' '), class: 'picture', role: 'img', 'aria-label': about.name});
    if (about.readable) {
      svg.append(pixels(image, kept, `${side}:${image}`, fullWidth, fullHeight));
    } else {
      svg.append(element('rect', {width: fullWidth, height: fullHeight, fill: '#8a8a8a'}));
      svg.append(element('text', {x: 8 * unit, y: 20 * unit, 'font-size': 13 * unit, fill: '#fff'}, 'cannot be read'));
    }
    svg.append(...boxes.map(box => drawn(box)));
    const labelled = boxes.filter(box => box.label && (box.weight === 'strong' || (captions === 'all' && box.weight === 'plain')));
    svg.append(...labelled.map(box => caption(box, unit, visible)));
    return svg;
  }

  Object.assign(Explorer, {picture, describe, describeBest, short, CONFIDENT});
})();
