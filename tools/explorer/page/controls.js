'use strict';

/** Detectors, thresholds and filters: what is set at the top of the page. */
(() => {
  const {KINDS, SIZES, STEPS, node, NUMBER} = Explorer;

  /** The mark of a kind, as the plane draws it. */
  function symbol(kind) {
    const canvas = node('canvas', {width: 28, height: 28, className: 'symbol'});
    const context = canvas.getContext('2d');
    context.translate(14, 14);
    context.fillStyle = context.strokeStyle = kind.colour;
    if (kind.shape === 'dashes') {
      context.setLineDash([4, 3]);
      context.lineWidth = 2.5;
      context.stroke(Explorer.shape('dashes', 9));
    } else context.fill(Explorer.shape(kind.shape, 9));
    return canvas;
  }

  const toggled = (values, value) => (values.includes(value) ? values.filter(other => other !== value) : [...values, value]);

  class Controls {
    constructor(view) {
      this.view = view;
      this.find = id => document.getElementById(id);
      this.fillSelects();
      this.thresholds = [0, 1].map(side => this.threshold(side));
      this.find('thresholds').prepend(...this.thresholds.map(row => row.host));
      this.kinds = KINDS.map((kind, k) => this.chip(kind, () => view.set({kinds: toggled(view.settings.kinds, k)}), symbol(kind)));
      this.sizes = SIZES.map((size, s) => this.chip(size, () => view.set({sizes: toggled(view.settings.sizes, s)})));
      this.find('kinds').append(...this.kinds.map(chip => chip.button));
      this.find('sizes').append(...this.sizes.map(chip => chip.button));
      this.listen();
    }

    fillSelects() {
      const {view, find} = this;
      const {detectors, data} = view;
      const options = () => detectors.map((detector, index) => node('option', {value: index}, detector.name));
      find('first').append(...options());
      find('second').append(node('option', {value: ''}, 'none'), ...options());
      find('second-model').hidden = detectors.length < 2;
      find('only').textContent = detectors.length < 2 ? detectors[0].name : '';
      find('first').hidden = find('badge0').hidden = detectors.length < 2;
      find('class').append(node('option', {value: ''}, 'all classes'), ...data.classes.map((name, label) => node('option', {value: label}, name)));
    }

    threshold(side) {
      const range = node('input', {type: 'range', min: 0, max: STEPS, step: 1, id: `threshold${side}`});
      range.setAttribute('aria-label', `threshold of ${'AB'[side]}`);
      const value = node('output', {className: 'value'});
      const numbers = node('span', {className: 'numbers'});
      const best = node('button', {type: 'button', title: 'the threshold with the highest F1 of all classes, IoU 0.50'}, 'best F1');
      range.addEventListener('input', () => this.view.setStep(side, Number(range.value)));
      best.addEventListener('click', () => this.view.setStep(side, this.view.shown[side].bestStep(this.view.settings.label)));
      const badge = node('span', {className: `badge side${side}`}, 'AB'[side]);
      const host = node('div', {className: 'threshold'}, badge, range, value, best, numbers);
      return {host, range, value, numbers};
    }

    chip(about, click, ...before) {
      const count = node('span', {className: 'count'});
      const button = node('button', {type: 'button', className: 'chip', title: about.help}, ...before, about.name, count);
      button.addEventListener('click', click);
      return {button, count};
    }

    listen() {
      const {view, find} = this;
      const pick = () => {
        const second = find('second').value;
        const sides = [Number(find('first').value), ...(second === '' ? [] : [Number(second)])];
        view.set({sides, sort: view.settings.sort === 'difference' && sides.length < 2 ? 'mistakes' : view.settings.sort});
      };
      find('first').addEventListener('change', pick);
      find('second').addEventListener('change', pick);
      find('class').addEventListener('change', event => view.set({label: event.target.value === '' ? null : Number(event.target.value)}));
      find('search').addEventListener('input', event => view.set({search: event.target.value}));
      find('sort').addEventListener('change', event => view.set({sort: event.target.value}));
      find('zoom').addEventListener('change', event => view.set({zoom: event.target.checked}));
      find('objects').addEventListener('change', event => view.set({objects: event.target.checked}));
      find('linked').addEventListener('change', event => {
        view.set({linked: event.target.checked});
        view.setStep(0, view.step(0));
      });
      const share = (input, other) => (input.value === '' || !Number.isFinite(Number(input.value)) ? other : Math.min(1, Math.max(0, Number(input.value))));
      for (const [id, empty] of [['from', 0], ['to', 1]]) find(id).addEventListener('input', event => view.set({[id]: share(event.target, empty)}));
      find('reset').addEventListener('click', () => this.reset());
      find('clear').addEventListener('click', () => view.set({selection: null}));
    }

    /** Put into the fields for text what they stand for: they are not touched while somebody writes. */
    fill() {
      const {search, from, to} = this.view.settings;
      this.find('search').value = search;
      this.find('from').value = from > 0 ? from : '';
      this.find('to').value = to < 1 ? to : '';
    }

    /** Drop selection and filters, but not thresholds and detectors. */
    reset() {
      this.view.set({label: null, sizes: [], kinds: [], search: '', from: 0, to: 1, selection: null});
      this.fill();
    }

    update(view) {
      const {settings, shown, tallies} = view;
      const {find} = this;
      find('first').value = settings.sides[0];
      find('second').value = settings.sides[1] ?? '';
      find('class').value = settings.label ?? '';
      find('sort').value = settings.sort;
      find('sort').parentElement.hidden = Boolean(settings.selection);
      find('sort').querySelector('[value=difference]').hidden = shown.length < 2;
      find('zoom').checked = settings.zoom;
      find('objects').checked = settings.objects;
      find('linked').checked = settings.linked;
      find('linked-label').hidden = shown.length < 2;
      find('reset').hidden = !view.filtered && !settings.search && !settings.selection;
      [0, 1].forEach(side => this.updateThreshold(side));
      this.kinds.forEach(({button, count}, k) => {
        count.textContent = tallies.map(tally => NUMBER.format(tally[k])).join(' | ');
        button.setAttribute('aria-pressed', settings.kinds.includes(k));
      });
      this.sizes.forEach(({button}, s) => button.setAttribute('aria-pressed', settings.sizes.includes(s)));
      for (const side of [0, 1]) this.averages(side);
    }

    updateThreshold(side) {
      const {view} = this;
      const row = this.thresholds[side];
      row.host.hidden = side >= view.shown.length;
      row.host.classList.toggle('single', view.shown.length === 1);
      if (row.host.hidden) return;
      const step = view.step(side);
      row.range.value = step;
      row.value.textContent = (step / STEPS).toFixed(3);
      const {right, wrong, objects, precision, recall, f1} = view.shown[side].tally(step, view.settings.label);
      const percent = share => (share === null ? '–' : `${(100 * share).toFixed(1)}\u00a0%`);
      row.numbers.textContent = `precision ${percent(precision)} · recall ${percent(recall)} · F1 ${percent(f1)}`;
      row.numbers.title = `${right} of ${objects} objects found, ${wrong} boxes wrong`;
    }

    averages(side) {
      const place = this.find(`ap${side}`);
      const detector = this.view.shown[side];
      const text = which => (value => (value === null ? '–' : value.toFixed(1)))(detector.ap(which));
      place.textContent = detector ? `AP ${text(0)} · AP50 ${text(1)} · AP75 ${text(2)}` : '';
      place.title = detector ? detector.source : '';
    }
  }

  Explorer.Controls = Controls;
})();
