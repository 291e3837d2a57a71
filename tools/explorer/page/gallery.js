'use strict';

/** The pictures of what is asked for: more of them are drawn as the page is scrolled. */
(() => {
  const BATCH = 24;
  const NUMBER = new Intl.NumberFormat('en');

  function node(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in made && key !== 'list') made[key] = value;
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  }

  const plural = (count, word) => `${NUMBER.format(count)} ${word}${count === 1 ? '' : 's'}`;

  class Gallery {
    /** @param open called with the place of an entry to see it large; point: with the image pointed at, or null */
    constructor(host, open, point) {
      this.host = host;
      this.open = open;
      this.heading = host.querySelector('#how-many');
      this.note = host.querySelector('#note');
      this.clear = host.querySelector('#clear');
      this.grid = host.querySelector('#grid');
      this.end = host.querySelector('#end');
      this.drawn = 0;
      this.kept = new Map();
      new IntersectionObserver(seen => seen.some(entry => entry.isIntersecting) && this.more(), {rootMargin: '600px'}).observe(this.end);
      this.grid.addEventListener('click', event => {
        const card = event.target.closest('.card');
        if (card) this.open(Number(card.dataset.place));
      });
      this.grid.addEventListener('pointerover', event => {
        const card = event.target.closest('.card');
        point(card ? Number(card.dataset.image) : null);
      });
      this.grid.addEventListener('pointerleave', () => point(null));
    }

    /** Draw at once; but while a slider is dragged over many boxes, only when it rests. */
    update(view) {
      this.view = view;
      clearTimeout(this.waiting);
      const resting = performance.now() - (this.asked ?? -Infinity) > 250;
      this.asked = performance.now();
      if (resting || this.cost < 25) {
        this.draw();
        return;
      }
      this.grid.setAttribute('aria-busy', 'true');
      this.waiting = setTimeout(() => this.draw(), 90);
    }

    draw() {
      const {view} = this;
      const start = performance.now();
      this.grid.setAttribute('aria-busy', 'false');
      const {entries, settings} = view;
      this.heading.textContent = plural(entries.length, 'picture');
      this.note.textContent = settings.selection ? `with ${settings.selection.note}` : view.filtered ? 'with boxes that pass the filters' : '';
      this.clear.hidden = !settings.selection;
      this.grid.classList.toggle('pairs', view.shown.length > 1);
      if (this.kept.size > 40 * BATCH) this.kept.clear();
      this.grid.replaceChildren();
      this.drawn = 0;
      this.more();
      if (!entries.length) this.grid.append(node('p', {className: 'nothing'}, 'Nothing passes. Press Esc to drop the selection, or 0 to drop all filters.'));
      this.cost = performance.now() - start;
    }

    more() {
      if (!this.view || this.drawn >= this.view.entries.length) return;
      const until = Math.min(this.drawn + BATCH, this.view.entries.length);
      const cards = [];
      for (let place = this.drawn; place < until; place++) cards.push(this.card(place));
      this.grid.append(...cards);
      this.drawn = until;
      // A tall screen may still see the end.
      if (this.end.getBoundingClientRect().top < window.innerHeight + 600) requestAnimationFrame(() => this.more());
    }

    card(place) {
      const {view} = this;
      const {image} = view.entries[place];
      const pictures = view.shown.map((_, side) => {
        const width = this.measure();
        const parts = [Explorer.picture(view, side, image, width, this.kept)];
        if (view.shown.length > 1) parts.push(node('span', {className: `badge side${side}`}, 'AB'[side]));
        return node('span', {className: 'framed'}, ...parts);
      });
      const {name} = view.data.images[image];
      const card = node('button', {className: 'card', type: 'button', title: name}, node('span', {className: 'row'}, ...pictures),
        node('span', {className: 'name'}, name), node('span', {className: 'outcome'}, this.outcome(image)));
      card.dataset.place = place;
      card.dataset.image = image;
      return card;
    }

    /** Width in pixels at which a picture is shown: what text on it is scaled by. */
    measure() {
      const columns = getComputedStyle(this.grid).gridTemplateColumns.split(' ');
      const width = parseFloat(columns[0]) || 220;
      return Math.max(80, (width - (this.view.shown.length > 1 ? 4 : 0)) / this.view.shown.length);
    }

    /** "3 of 5 found, 1 wrong", for each detector. */
    outcome(image) {
      const {view} = this;
      const texts = view.shown.map((detector, side) => {
        const {data} = view;
        let [found, wrong] = [0, 0];
        for (let o = data.first[image]; o < data.first[image + 1]; o++) found += +detector.isFound(o, view.step(side));
        for (let d = detector.first[image]; d < detector.first[image + 1]; d++) {
          wrong += +(detector.kind[d] !== Explorer.CORRECT && detector.reaches(d, view.step(side)));
        }
        return `${found}/${data.singles(image)} found, ${wrong} wrong`;
      });
      return texts.length > 1 ? `A ${texts[0]} · B ${texts[1]}` : texts[0];
    }
  }

  Object.assign(Explorer, {Gallery, node, plural, NUMBER});
})();
