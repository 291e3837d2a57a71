'use strict';

/** What is looked at, in the address after "#": it survives reloading, and can be sent to others who have the folder. */
(() => {
  const {STEPS, KINDS, SIZES} = Explorer;

  const isIndex = count => value => Number.isInteger(value) && value >= 0 && value < count;
  const isOne = (...values) => value => values.includes(value);
  const isShare = value => typeof value === 'number' && value >= 0 && value <= 1;
  const isBoolean = value => typeof value === 'boolean';
  const isList = (test, least = 0, most = Infinity) => value => Array.isArray(value) && value.length >= least && value.length <= most && value.every(test);

  /** What each setting may be; anything else in an address is ignored. */
  function tests(view) {
    const {detectors, data} = view;
    return {
      tab: isOne('plane', 'curves', 'confusion', 'classes', 'changes'),
      sides: isList(isIndex(detectors.length), 1, 2),
      steps: isList(isIndex(STEPS + 1), detectors.length, detectors.length),
      linked: isBoolean,
      population: isOne('detections', 'best'),
      label: isIndex(data.classes.length),
      sizes: isList(isIndex(SIZES.length)),
      kinds: isList(isIndex(KINDS.length)),
      search: value => typeof value === 'string',
      from: isShare,
      to: isShare,
      sort: isOne('difference', 'mistakes', 'missed', 'name'),
      zoom: isBoolean,
      objects: isBoolean,
    };
  }

  class Address {
    /** @param initial settings that an address need not name */
    constructor(view, initial) {
      this.tests = tests(view);
      this.initial = {...view.settings, ...initial};
      // Only of an address that somebody has put there: replaceState does not cause it.
      window.addEventListener('hashchange', () => location.reload());
    }

    /** The settings that the address names. */
    read() {
      const found = {};
      for (const [key, text] of new URLSearchParams(location.hash.slice(1))) {
        try {
          const value = JSON.parse(text);
          if (this.tests[key]?.(value)) found[key] = value;
        } catch {
          // Not of this page's making.
        }
      }
      return found;
    }

    update(view) {
      const parameters = new URLSearchParams();
      for (const key of Object.keys(this.tests)) {
        const text = JSON.stringify(view.settings[key]);
        if (text !== JSON.stringify(this.initial[key])) parameters.set(key, text);
      }
      const hash = parameters.size ? `#${parameters}` : location.pathname;
      clearTimeout(this.waiting);
      this.waiting = setTimeout(() => history.replaceState(null, '', hash), 300);
    }
  }

  Explorer.Address = Address;
})();
