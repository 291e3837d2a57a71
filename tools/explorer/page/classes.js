'use strict';

/** A row for each class; headings sort, rows filter. */
(() => {
  const {node, NUMBER} = Explorer;

  class Classes {
    constructor(host, view) {
      this.view = view;
      this.sorted = {key: 'AP A', down: false};
      this.table = node('table', {className: 'classes'});
      const about = 'AP in percent, over IoU 0.50 to 0.95; P, R and F1 in percent at the threshold, IoU 0.50. A heading sorts, a row shows the pictures of its class.';
      host.append(node('div', {className: 'scroll'}, this.table), node('p', {className: 'hint'}, about));
    }

    /** name, title and value(label) of each column. */
    columns() {
      const {view} = this;
      const {shown, data} = view;
      const percent = value => (value === null ? null : 100 * value);
      const tally = (side, label) => shown[side].tally(view.step(side), label);
      const columns = [
        {key: 'class', title: 'name', value: label => data.classes[label], text: value => value},
        {key: 'n', title: 'annotated objects', value: label => data.perClass[label], text: value => NUMBER.format(value)},
      ];
      const number = (key, title, value) => columns.push({key, title, value, text: v => (v === null ? '–' : v.toFixed(1))});
      if (shown.length === 1) {
        ['AP', 'AP50', 'AP75'].forEach((name, which) => number(name, `${name} in percent`, label => shown[0].ap(which, label)));
        for (const [key, name] of [['P', 'precision'], ['R', 'recall'], ['F1', 'f1']]) number(key, `${name} in percent`, label => percent(tally(0, label)[name]));
        return columns;
      }
      const minus = (b, a) => (a === null || b === null ? null : b - a);
      for (const [key, of] of [['AP', (side, label) => shown[side].ap(0, label)], ['F1', (side, label) => percent(tally(side, label).f1)]]) {
        number(`${key} A`, `${key} of A in percent`, label => of(0, label));
        number(`${key} B`, `${key} of B in percent`, label => of(1, label));
        columns.push({key: `Δ${key}`, title: `${key} of B minus that of A`, value: label => minus(of(1, label), of(0, label)), text: v => (v === null ? '–' : `${v < 0 ? '−' : '+'}${Math.abs(v).toFixed(1)}`)});
      }
      return columns;
    }

    update(view) {
      if (view.settings.tab !== 'classes') return;
      const columns = this.columns();
      const sorting = columns.find(column => column.key === this.sorted.key) ?? columns[2];
      const sign = this.sorted.down ? -1 : 1;
      const rows = [...view.data.classes.keys()].map(label => ({label, values: columns.map(column => column.value(label))}));
      const at = columns.indexOf(sorting);
      rows.sort((a, b) => {
        const [x, y] = [a.values[at], b.values[at]];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === 'string' ? x.localeCompare(y, 'en') : x - y) || a.label - b.label;
      });
      const heads = columns.map(column => this.head(column, column === sorting));
      const lines = rows.map(({label, values}) => {
        const cells = values.map((value, i) => (i ? node('td', {}, columns[i].text(value)) : node('th', {scope: 'row'}, this.name(label, value))));
        return node('tr', {className: view.settings.label === label ? 'chosen' : ''}, ...cells);
      });
      this.table.replaceChildren(node('thead', {}, node('tr', {}, ...heads)), node('tbody', {}, ...lines));
    }

    head(column, sorts) {
      const arrow = sorts ? (this.sorted.down ? ' ↓' : ' ↑') : '';
      const button = node('button', {type: 'button', title: column.title}, column.key + arrow);
      button.addEventListener('click', () => {
        this.sorted = {key: column.key, down: sorts ? !this.sorted.down : column.key !== 'class'};
        this.update(this.view);
      });
      const head = node('th', {scope: 'col'}, button);
      head.setAttribute('aria-sort', sorts ? (this.sorted.down ? 'descending' : 'ascending') : 'none');
      return head;
    }

    name(label, text) {
      const button = node('button', {type: 'button'}, text);
      button.addEventListener('click', () => {
        const {label: chosen} = this.view.settings;
        this.view.set({label: chosen === label ? null : label, selection: null});
      });
      return button;
    }
  }

  Explorer.Classes = Classes;
})();
