// The filter gallery and its controls. Text from data goes to the page as text only.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const PAGE = 24;
  const SIDE = 112;
  const OUTLINE = [255, 212, 0];
  const OUTSIDE = 0.75; // brightness where a filter is not active

  // --- filters: one object each, with the fields for searching and sorting ---
  const filters = [];
  data.layers.forEach((layer, layerNumber) => {
    const removed = new Set(layer.removed);
    const order = layer.scores.map((_, n) => n);
    order.sort((a, b) => layer.scores[b] - layer.scores[a] || a - b);
    const rank = [];
    order.forEach((filter, place) => { rank[filter] = place + 1; });
    const kept = layer.scores.length - removed.size;
    layer.scores.forEach((_, number) => {
      const concepts = layer.concepts ? layer.concepts[number] : [];
      filters.push({
        layer: layerNumber,
        number,
        rank: rank[number],
        of: layer.scores.length,
        kept,
        removed: removed.has(number),
        concepts,
        iou: concepts.length ? concepts[0][1] : 0,
        word: layer.names ? layer.names[number] : null, // and its similarity
        text: [layer.name, number, ...concepts.map(([concept]) => data.concepts[concept]),
          ...(layer.names && layer.names[number] ? [layer.names[number][0]] : [])]
          .join(" ").toLowerCase(),
      });
    });
  });
  const orders = {
    layer: (a, b) => a.layer - b.layer || a.number - b.number,
    best: (a, b) => a.rank / a.of - b.rank / b.of || a.layer - b.layer,
    worst: (a, b) => b.rank / b.of - a.rank / a.of || a.layer - b.layer,
    iou: (a, b) => b.iou - a.iou || a.layer - b.layer || a.number - b.number,
    limit: (a, b) => distance(a) - distance(b) || a.layer - b.layer || a.rank - b.rank,
  };
  // Places between a filter and the limit of its layer; a layer that keeps all has none.
  const distance = (filter) => (filter.kept === filter.of
    ? filter.of + filter.of - filter.rank
    : Math.abs(filter.rank - 0.5 - filter.kept));

  // --- pictures: an image, darkened where the filter is not active, with the active region outlined ---
  const loaded = new Map();
  const load = (place) => {
    if (!loaded.has(place)) {
      const image = new Image();
      const ready = new Promise((done, fail) => { image.onload = () => done(image); image.onerror = fail; });
      image.src = `data:image/jpeg;base64,${data.images[place]}`;
      loaded.set(place, ready);
    }
    return loaded.get(place);
  };
  const unpacked = new Map();
  const bytesOf = (layerNumber) => {
    if (!unpacked.has(layerNumber)) {
      const text = atob(data.layers[layerNumber].regions);
      unpacked.set(layerNumber, Uint8Array.from(text, (letter) => letter.charCodeAt(0)));
    }
    return unpacked.get(layerNumber);
  };
  const regionOf = (filter, place) => {
    const layer = data.layers[filter.layer];
    const [rows, columns] = layer.grid;
    const size = Math.ceil((rows * columns) / 8);
    const start = (filter.number * layer.images[filter.number].length + place) * size;
    const bytes = bytesOf(filter.layer);
    return (row, column) => {
      const r = Math.min(Math.max(row, 0), rows - 1);
      const c = Math.min(Math.max(column, 0), columns - 1);
      const bit = r * columns + c;
      return (bytes[start + (bit >> 3)] >> (7 - (bit & 7))) & 1;
    };
  };
  // Bilinear between the centres of cells, with a threshold of one half.
  const insideOf = (filter, place) => {
    const [rows, columns] = data.layers[filter.layer].grid;
    const at = regionOf(filter, place);
    const inside = new Uint8Array(SIDE * SIDE);
    for (let y = 0; y < SIDE; y += 1) {
      const v = ((y + 0.5) * rows) / SIDE - 0.5;
      const r = Math.floor(v);
      for (let x = 0; x < SIDE; x += 1) {
        const u = ((x + 0.5) * columns) / SIDE - 0.5;
        const c = Math.floor(u);
        const upper = at(r, c) * (c + 1 - u) + at(r, c + 1) * (u - c);
        const lower = at(r + 1, c) * (c + 1 - u) + at(r + 1, c + 1) * (u - c);
        inside[y * SIDE + x] = upper * (r + 1 - v) + lower * (v - r) >= 0.5 ? 1 : 0;
      }
    }
    return inside;
  };
  const draw = async (canvas, filter, place) => {
    const image = await load(data.layers[filter.layer].images[filter.number][place]);
    const paper = canvas.getContext("2d", { willReadFrequently: true });
    paper.drawImage(image, 0, 0, SIDE, SIDE);
    const pixels = paper.getImageData(0, 0, SIDE, SIDE);
    const inside = insideOf(filter, place);
    const at = (x, y) => x >= 0 && y >= 0 && x < SIDE && y < SIDE && inside[y * SIDE + x];
    for (let y = 0; y < SIDE; y += 1) {
      for (let x = 0; x < SIDE; x += 1) {
        const start = 4 * (y * SIDE + x);
        if (!at(x, y)) {
          for (let c = 0; c < 3; c += 1) pixels.data[start + c] *= OUTSIDE;
        } else if (!at(x - 2, y) || !at(x + 2, y) || !at(x, y - 2) || !at(x, y + 2)) {
          pixels.data.set(OUTLINE, start);
        }
      }
    }
    paper.putImageData(pixels, 0, 0);
    canvas.dataset.drawn = "yes";
  };
  // Draw a picture when it scrolls into view, and the others while nothing else is to be done, so
  // that a printed page has them.
  const waiting = new Map();
  const viewer = new IntersectionObserver((entries) => {
    entries.filter((entry) => entry.isIntersecting).forEach(({ target }) => {
      viewer.unobserve(target);
      draw(target, ...waiting.get(target));
      waiting.delete(target);
    });
  }, { rootMargin: "200px" });
  const whenIdle = window.requestIdleCallback || ((task) => setTimeout(task, 50));
  let isIdle = true;
  const drawWaiting = async () => {
    for (const [canvas, place] of waiting) {
      waiting.delete(canvas);
      viewer.unobserve(canvas);
      await draw(canvas, ...place);
      if (waiting.size) await new Promise(whenIdle);
    }
    isIdle = true;
  };
  const drawLater = () => {
    if (isIdle) {
      isIdle = false;
      whenIdle(drawWaiting);
    }
  };

  // --- cards ---
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const overlap = ([concept, iou]) => `${data.concepts[concept]} (IoU ${iou.toFixed(3)})`;
  const card = (filter) => {
    const layer = data.layers[filter.layer];
    const item = make("li", "", filter.removed ? "removed" : "kept");
    item.append(make("h3", `${layer.name}, filter ${filter.number}`));
    const fate = filter.removed ? "Removed" : "Kept";
    item.append(make("p", fate, "fate"));
    const below = Math.round((100 * (filter.of - filter.rank)) / filter.of);
    item.append(make("p",
      `Rank ${filter.rank} of ${filter.of} by ${data.criterion}, above ${below} % of the layer; ` +
      `the plan keeps the best ${filter.kept}.`));
    if (layer.concepts) {
      item.append(make("p", filter.concepts.length
        ? `Overlaps ${filter.concepts.map(overlap).join(", ")}.`
        : "Overlaps no concept."));
      if (filter.word) {
        const [word, similarity] = filter.word;
        item.append(make("p", `Named “${word}” (similarity ${similarity.toFixed(3)}).`));
      }
      const after = layer.after[filter.number];
      if (after) item.append(make("p", `After the last step: ${overlap(after)}.`));
    }
    if (layer.images) {
      const row = make("div", "", "seen");
      layer.images[filter.number].forEach((image, place) => {
        const canvas = make("canvas");
        canvas.width = SIDE;
        canvas.height = SIDE;
        canvas.setAttribute("role", "img");
        const name = data.classes[image] ? `: ${data.classes[image]}` : "";
        canvas.setAttribute("aria-label", `Top image ${place + 1}${name}`);
        const picture = make("figure");
        picture.append(canvas);
        if (data.classes[image]) {
          const caption = make("figcaption", data.classes[image]);
          caption.setAttribute("aria-hidden", "true"); // the picture's label says it
          picture.append(caption);
        }
        row.append(picture);
        waiting.set(canvas, [filter, place]);
        viewer.observe(canvas);
      });
      item.append(row);
    }
    return item;
  };

  // --- controls ---
  const list = find("filters");
  const more = find("more");
  let chosen = [];
  let shown = 0;
  const showMore = () => {
    const first = shown;
    shown = Math.min(shown + PAGE, chosen.length);
    chosen.slice(first, shown).forEach((filter) => list.append(card(filter)));
    drawLater();
    more.hidden = shown === chosen.length;
    const kept = chosen.filter((filter) => !filter.removed).length;
    find("count").textContent = chosen.length
      ? `${chosen.length} of ${filters.length} filters, ${kept} kept and ${chosen.length - kept} removed; ${shown} shown.`
      : "No filter matches.";
  };
  const show = () => {
    const words = find("query").value.toLowerCase().split(/\s+/).filter(Boolean);
    const layer = find("layer").value;
    const concept = find("concept").value;
    const fate = find("fate").value;
    chosen = filters.filter((filter) =>
      (layer === "" || filter.layer === Number(layer)) &&
      (concept === "" || (filter.concepts.length && data.concepts[filter.concepts[0][0]] === concept)) &&
      (fate === "" || filter.removed === (fate === "removed")) &&
      words.every((word) => filter.text.includes(word)));
    chosen.sort(orders[find("sort").value]);
    list.replaceChildren();
    viewer.disconnect();
    waiting.clear();
    shown = 0;
    showMore();
  };
  const option = (select, value, text) => {
    const node = make("option", text);
    node.value = value;
    select.append(node);
  };
  data.layers.forEach((layer, place) => option(find("layer"), String(place), layer.name));
  const named = new Set(filters.filter((filter) => filter.concepts.length).map((filter) => data.concepts[filter.concepts[0][0]]));
  [...named].sort().forEach((name) => option(find("concept"), name, name));
  const places = new Map(data.layers.map((layer, place) => [layer.name, String(place)]));
  const controls = find("controls");
  // The address holds what the controls show, so that a link leads to the same filters.
  const START = "#gallery?";
  const fields = ["query", "layer", "concept", "fate", "sort"].map(find);
  const inAddress = (field, value) => (field.id === "layer" && value !== "" ? data.layers[value].name : value);
  const usual = new Map(fields.map((field) => [field.id, field.value]));
  const address = () => {
    const state = new URLSearchParams();
    fields.forEach((field) => {
      if (field.value !== usual.get(field.id)) state.set(field.id, inAddress(field, field.value));
    });
    return START + state;
  };
  const read = () => {
    const isGallery = location.hash.startsWith(START);
    const state = new URLSearchParams(isGallery ? location.hash.slice(START.length) : "");
    fields.forEach((field) => {
      const asked = state.get(field.id);
      const value = field.id === "layer" ? places.get(asked) : asked;
      field.value = value ?? usual.get(field.id);
      if (field.value !== (value ?? usual.get(field.id))) field.value = usual.get(field.id);
    });
    show();
    if (isGallery) find("gallery").scrollIntoView();
  };
  const update = () => {
    history.replaceState(null, "", address());
    show();
  };
  controls.addEventListener("submit", (event) => event.preventDefault());
  controls.addEventListener("input", update);
  controls.addEventListener("reset", () => setTimeout(update));
  window.addEventListener("popstate", () => { if (location.hash === "" || location.hash.startsWith(START)) read(); });
  more.addEventListener("click", () => {
    const before = list.children.length;
    showMore();
    const next = list.children[before];
    if (next) { next.tabIndex = -1; next.focus(); }
  });
  document.querySelectorAll("[data-layer-name]").forEach((button) => {
    button.dataset.layer = places.get(button.dataset.layerName);
  });
  document.querySelectorAll("[data-layer], [data-concept]").forEach((button) => {
    button.addEventListener("click", () => {
      fields.forEach((field) => { field.value = usual.get(field.id); });
      if (button.dataset.layer) find("layer").value = button.dataset.layer;
      if (button.dataset.concept) find("concept").value = button.dataset.concept;
      history.pushState(null, "", address());
      show();
      const heading = find("gallery");
      heading.focus();
      heading.scrollIntoView();
    });
  });
  read();
})();
