'use strict';

/** Load the data, put the parts together, listen to the keyboard. */
(() => {
  const {STEPS, plural} = Explorer;
  const TABS = ['plane', 'curves', 'confusion', 'classes', 'changes'];
  const find = id => document.getElementById(id);

  function showTab(view, tab) {
    view.set({tab});
  }

  function updateTabs(view) {
    const {tab} = view.settings;
    for (const name of TABS) {
      const button = find(`tab-${name}`);
      button.setAttribute('aria-selected', name === tab);
      button.tabIndex = name === tab ? 0 : -1;
      button.hidden = name === 'changes' && view.shown.length < 2;
      find(`panel-${name}`).hidden = name !== tab;
    }
  }

  function listenToTabs(view) {
    for (const name of TABS) {
      const button = find(`tab-${name}`);
      button.addEventListener('click', () => showTab(view, name));
      button.addEventListener('keydown', event => {
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (!step) return;
        const visible = TABS.filter(other => !find(`tab-${other}`).hidden);
        const next = visible[(visible.indexOf(name) + step + visible.length) % visible.length];
        showTab(view, next);
        find(`tab-${next}`).focus();
      });
    }
  }

  /** What each key does; letters are those of the help. */
  function keys(view, controls, detail) {
    const both = by => view.set({steps: view.settings.steps.map((step, i) => (view.settings.sides.includes(i) ? Math.min(STEPS, Math.max(0, step + by)) : step))});
    const tabs = Object.fromEntries(TABS.map((name, i) => [String(i + 1), () => !find(`tab-${name}`).hidden && showTab(view, name)]));
    return {
      ...tabs,
      '[': () => both(-2),
      ',': () => both(-2),
      ']': () => both(2),
      '.': () => both(2),
      '0': () => controls.reset(),
      '/': () => find('search').focus(),
      '?': () => find('help').showModal(),
      z: () => view.set({zoom: !view.settings.zoom}),
      o: () => view.set({objects: !view.settings.objects}),
      b: () => view.set({population: view.settings.population === 'best' ? 'detections' : 'best'}),
      x: () => view.shown.length > 1 && view.set({sides: [...view.settings.sides].reverse()}),
      j: () => detail.open(0),
      Escape: () => view.set({selection: null}),
    };
  }

  function listenToKeys(actions) {
    document.addEventListener('keydown', event => {
      if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) {
        const thresholds = ['[', ']', ',', '.', 'z', 'o'].includes(event.key);
        if (!thresholds || event.ctrlKey || event.metaKey || event.altKey) return;
      }
      const typing = event.target.matches('input[type=text], input[type=search], input[type=number], select');
      if (typing && event.key === 'Escape') event.target.blur();
      const action = actions[event.key];
      if (typing || !action) return;
      action();
      event.preventDefault();
    });
  }

  function describeData(data) {
    find('title').textContent = data.title;
    document.title = `${data.title}: explore detections`;
    find('about').textContent = [plural(data.images.length, 'picture'), plural(data.asked, 'object'), plural(data.classes.length, 'class').replace('classs', 'classes')].join(' · ');
  }

  /** Resolves when what was changed before is on the screen. */
  const nextFrame = () => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));

  async function start() {
    const about = await Explorer.load('about');
    const objects = Explorer.loadColumns('objects');
    const columns = about.detectors.map((_, index) => Explorer.loadColumns(`detections${index}`));
    const best = about.detectors.map((one, index) => (one.best ? Explorer.loadColumns(`best${index}`) : null));
    const data = new Explorer.Dataset(about, await objects);
    describeData(data);
    const detectors = [];
    for (const [index, one] of about.detectors.entries()) {
      find('loading').textContent = `Reading ${one.label} …`;
      const detector = new Explorer.Detector(one, await columns[index], data);
      if (one.best) detector.best = new Explorer.BestRegressed(await best[index], data);
      detectors.push(detector);
    }
    const view = new Explorer.View(data, detectors);
    const pair = detectors.length > 1;
    const detail = new Explorer.Detail(find('detail'));
    const controls = new Explorer.Controls(view);
    const planes = new Explorer.Planes(find('panel-plane'), view);
    const gallery = new Explorer.Gallery(find('pictures'), place => detail.open(place), image => planes.point(image));
    const parts = [
      controls,
      planes,
      new Explorer.Curves(find('panel-curves'), view),
      new Explorer.Confusion(find('panel-confusion'), view),
      new Explorer.Classes(find('panel-classes'), view),
      new Explorer.Changes(find('panel-changes'), view),
      gallery,
      detail,
    ];
    view.watch(updateTabs);
    for (const part of parts) view.watch(now => part.update(now));
    listenToTabs(view);
    listenToKeys(keys(view, controls, detail));
    for (const button of document.querySelectorAll('[data-help]')) button.addEventListener('click', () => find('help').showModal());
    find('help').querySelector('.close').addEventListener('click', () => find('help').close());
    const measure = () => document.documentElement.style.setProperty('--controls-height', `${find('controls').offsetHeight}px`);
    new ResizeObserver(measure).observe(find('controls'));
    if (window.innerWidth <= 900) find('filters').open = false;
    let resizing;
    window.addEventListener('resize', () => {
      clearTimeout(resizing);
      resizing = setTimeout(() => gallery.update(view), 150);
    });
    find('loading').hidden = true;
    document.body.classList.remove('waiting');
    const initial = {sides: pair ? [0, 1] : [0], steps: detectors.map(detector => detector.bestStep()), sort: pair ? 'difference' : 'mistakes'};
    const address = new Explorer.Address(view, initial);
    view.watch(now => address.update(now));
    view.set({...initial, ...address.read()});
    controls.fill();
    await nextFrame();
    performance.mark('drawn');
    for (const [index, detector] of detectors.entries()) {
      detector.box = (await Explorer.loadColumns(`boxes${index}`)).box;
      view.set({});
    }
    await nextFrame();
    performance.mark('complete');
  }

  start().catch(error => {
    find('loading').textContent = `This page cannot be shown: ${error.message}`;
    console.error(error);
  });
})();
