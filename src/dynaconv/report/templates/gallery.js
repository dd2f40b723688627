"use strict";
// The gallery: pictures with block masks and computation maps on canvases, one budget and one view for all.
(async () => {
  const data = JSON.parse(document.getElementById("gallery-data").textContent);
  const byId = (id) => document.getElementById(id);
  const slider = byId("budget-slider"), view = byId("view"), boxes = byId("show-boxes"), detail = byId("detail");
  const count = data.images.length;
  const state = { target: 0, view: "ponder", filter: "all", opened: 0 };
  let bytes;
  try {
    bytes = new Uint8Array(await report.inflate("gallery-arrays"));
  } catch (error) {
    byId("gallery-summary").textContent = "This browser cannot unpack the masks; figures/gallery.png shows some of them.";
    return;
  }
  const pictures = await Promise.all(data.images.map(async (url) => {
    const image = new Image();
    image.src = url;
    await image.decode();
    return image;
  }));

  const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)}\u202f%`;
  const className = (label) => (label >= 0 && label < data.classes.length ? data.classes[label] : `class ${label}`);
  const pictureName = (k) => (data.names ? data.names[k] : `Picture ${k + 1}`);
  const targetName = (t) => String(Number(data.targets[t].toPrecision(6)));

  // One [h, w] plane of a packed [K, h, w] run.
  function plane([offset, h, w], k) {
    const start = offset + k * h * w;
    return { values: bytes.subarray(start, start + h * w), h, w };
  }
  function density(t, b, k) {
    const { values } = plane(data.arrays.masks[t][b], k);
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  }
  function verdict(t, k) {
    if (data.labels[k] < 0) return "unknown";
    return data.predictions[t][k] === data.labels[k] ? "right" : "wrong";
  }

  // Paints a plane of RGBA cells over a whole canvas without smoothing the cells.
  function cells(context, { values, h, w }, rgba) {
    const small = document.createElement("canvas");
    small.width = w;
    small.height = h;
    const pixels = new ImageData(w, h);
    values.forEach((value, i) => pixels.data.set(rgba(value), 4 * i));
    small.getContext("2d").putImageData(pixels, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, context.canvas.width, context.canvas.height);
    context.imageSmoothingEnabled = true;
  }

  function drawBox(context, k) {
    const box = data.boxes[k];
    if (!box || (boxes && !boxes.checked)) return;
    const sx = context.canvas.width / data.width, sy = context.canvas.height / data.height;
    const rectangle = [box[0] * sx, box[1] * sy, (box[2] - box[0]) * sx, (box[3] - box[1]) * sy];
    for (const [style, width] of [["rgba(0,0,0,.75)", 5], ["#fff", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(...rectangle);
    }
  }

  function paint(canvas, k, t, shown) {
    const context = canvas.getContext("2d");
    context.drawImage(pictures[k], 0, 0, canvas.width, canvas.height);
    if (shown === "ponder" && data.arrays.ponder[t]) {
      context.globalCompositeOperation = "saturation";
      context.fillStyle = "#777";
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "source-over";
      cells(context, plane(data.arrays.ponder[t], k), (v) => [...data.colours[v], 190]);
    } else if (shown !== "picture" && shown !== "ponder") {
      cells(context, plane(data.arrays.masks[t][Number(shown)], k), (v) => (v ? [0, 0, 0, 0] : [16, 20, 27, 215]));
    }
    drawBox(context, k);
    drawPoints(context, k, t);
  }

  // Rings where keypoints are, crosses where they were found.
  function drawPoints(context, k, t) {
    if (!data.points) return;
    const sx = context.canvas.width / data.width, sy = context.canvas.height / data.height;
    const size = Math.max(3, context.canvas.width / 60);
    const place = (p) => [(p[0] + 0.5) * sx, (p[1] + 0.5) * sy];
    for (const [style, ring, width] of [["rgba(0,0,0,.8)", "rgba(0,0,0,.8)", 4], ["#ff9a3c", "#37e08b", 2]]) {
      context.lineWidth = width;
      data.points[t][k].forEach((found, i) => {
        const truth = data.truth && data.truth[k][i][2] > 0 ? place(data.truth[k][i]) : null;
        const [x, y] = place(found);
        if (truth) {
          context.strokeStyle = ring;
          context.beginPath();
          context.arc(truth[0], truth[1], 1.5 * size, 0, 2 * Math.PI);
          context.stroke();
        }
        context.strokeStyle = style;
        context.beginPath();
        context.moveTo(x - size, y - size);
        context.lineTo(x + size, y + size);
        context.moveTo(x - size, y + size);
        context.lineTo(x + size, y - size);
        context.stroke();
      });
    }
  }

  function newCanvas(width) {
    const canvas = document.createElement("canvas");
    canvas.width = width;
    canvas.height = Math.round((width * data.height) / data.width);
    canvas.setAttribute("role", "img");
    return canvas;
  }

  function answer(t, k) {
    const parts = [`predicted ${className(data.predictions[t][k])} with ${percent(data.confidence[t][k])} confidence`];
    if (data.labels[k] >= 0) parts.unshift(`label ${className(data.labels[k])}`);
    if (data.dense) parts.push(`dense network says ${className(data.dense[k])}`);
    return parts.join(", ");
  }
  function viewText(t, k, shown) {
    if (shown === "picture") return "picture";
    if (shown === "ponder") return "computation map";
    return `mask of ${data.blocks[Number(shown)]}, ${percent(density(t, Number(shown), k))} of positions computed`;
  }

  const cards = pictures.map((_, k) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const canvas = newCanvas(Math.max(240, 2 * Math.min(data.width, 240))), caption = document.createElement("span");
    button.type = "button";
    button.className = "picture";
    caption.className = "caption";
    button.append(canvas, caption);
    button.addEventListener("click", () => open(k));
    item.append(button);
    byId("pictures").append(item);
    return { item, button, canvas, caption };
  });

  function span(className_, text) {
    const element = document.createElement("span");
    element.className = className_;
    element.textContent = text;
    return element;
  }

  function refreshCard(k) {
    const { item, button, canvas, caption } = cards[k], t = state.target, mark = verdict(t, k);
    const changed = data.dense !== null && data.dense[k] !== data.predictions[t][k];
    item.hidden = !(state.filter === "all" || state.filter === mark || (state.filter === "changed" && changed));
    if (item.hidden) return;
    paint(canvas, k, t, state.view);
    const text = `${pictureName(k)}: ${answer(t, k)}; ${viewText(t, k, state.view)}`;
    canvas.setAttribute("aria-label", text);
    button.title = text;
    button.dataset.verdict = mark;
    const head = span("said", "");
    if (mark !== "unknown") head.append(span("mark " + mark, mark === "right" ? "✓ right" : "✗ wrong"));
    head.append(span("class", className(data.predictions[t][k])), span("sure", percent(data.confidence[t][k])));
    const rest = [];
    if (data.names) rest.push(pictureName(k));
    if (data.labels[k] >= 0) rest.push(`label ${className(data.labels[k])}`);
    if (data.dense) rest.push(`dense ${className(data.dense[k])}`);
    caption.replaceChildren(head, span("facts", rest.join(" · ")));
  }

  function refreshLegend() {
    const legend = byId("gallery-legend");
    legend.replaceChildren();
    if (state.view === "ponder") {
      const bar = document.createElement("i");
      bar.className = "ramp";
      const stops = [0, 32, 64, 96, 128, 160, 192, 224, 255].map((v) => `rgb(${data.colours[v].join(",")})`);
      bar.style.background = `linear-gradient(90deg, ${stops.join(",")})`;
      legend.append("0", bar, `${data.blocks.length} block${data.blocks.length === 1 ? "" : "s"} computed here`);
    } else if (state.view !== "picture") {
      const bright = document.createElement("i"), dark = document.createElement("i");
      bright.className = "swatch";
      dark.className = "swatch skipped";
      legend.append(bright, "computed", dark, "skipped");
    }
  }

  function refresh() {
    cards.forEach((_, k) => refreshCard(k));
    const shown = cards.filter((card) => !card.item.hidden).length;
    const known = data.labels.filter((label) => label >= 0).length;
    const right = data.labels.filter((_, k) => verdict(state.target, k) === "right").length;
    const parts = [`Budget ${targetName(state.target)}`, shown === count ? `${count} pictures` : `${shown} of ${count} pictures`];
    if (known) parts.push(`${right} right, ${known - right} wrong in this gallery`);
    byId("gallery-summary").textContent = parts.join(" · ");
    byId("budget-value").textContent = targetName(state.target);
    slider.setAttribute("aria-valuetext", `budget ${targetName(state.target)}`);
    refreshLegend();
    if (detail.open) refreshDetail();
  }

  function refreshDetail() {
    const k = state.opened, t = state.target, maps = byId("detail-maps");
    const mark = { right: "✓ right: ", wrong: "✗ wrong: ", unknown: "" }[verdict(t, k)];
    byId("detail-title").textContent = pictureName(k);
    byId("detail-text").textContent = mark + answer(t, k) + ".";
    maps.replaceChildren();
    const views = ["picture", ...(data.arrays.ponder[t] ? ["ponder"] : []), ...data.blocks.map((_, b) => String(b))];
    views.forEach((shown) => {
      const figure = document.createElement("figure"), canvas = newCanvas(360), caption = document.createElement("figcaption");
      paint(canvas, k, t, shown);
      canvas.setAttribute("aria-label", viewText(t, k, shown));
      const b = Number(shown);
      caption.textContent = Number.isNaN(b) ? viewText(t, k, shown) : `${data.blocks[b]} · ${percent(density(t, b, k))}`;
      figure.append(canvas, caption);
      maps.append(figure);
    });
    detail.querySelectorAll("[data-target]").forEach((button) => {
      button.setAttribute("aria-pressed", String(Number(button.dataset.target) === t));
    });
  }

  function open(k) {
    state.opened = k;
    if (!detail.open) detail.showModal();
    refreshDetail();
  }
  function step(by) {
    const visible = cards.map((card, k) => (card.item.hidden ? -1 : k)).filter((k) => k >= 0);
    if (!visible.length) return;
    const at = visible.indexOf(state.opened);
    open(visible[(Math.max(0, at) + by + visible.length) % visible.length]);
  }
  function setTarget(t) {
    state.target = t;
    slider.value = String(t);
    refresh();
    report.choose("budget", targetName(t));
  }

  data.targets.forEach((_, t) => {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.target = String(t);
    button.textContent = targetName(t);
    button.addEventListener("click", () => setTarget(t));
    detail.querySelector(".detail-budgets").append(button);
  });
  slider.addEventListener("input", () => setTarget(Number(slider.value)));
  view.addEventListener("change", () => { state.view = view.value; refresh(); });
  if (boxes) boxes.addEventListener("change", refresh);
  document.querySelectorAll("[data-filter] input").forEach((input) => {
    input.addEventListener("change", () => { state.filter = input.value; refresh(); });
  });
  detail.addEventListener("click", (event) => {
    if (event.target === detail || event.target.closest("[data-close]")) detail.close();
    const stepper = event.target.closest("[data-step]");
    if (stepper) step(Number(stepper.dataset.step));
  });
  detail.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
  detail.addEventListener("close", () => cards[state.opened].button.focus());
  document.addEventListener("report:budget", (event) => {
    const t = data.targets.findIndex((_, i) => targetName(i) === event.detail);
    if (t >= 0 && t !== state.target) { state.target = t; slider.value = String(t); refresh(); }
  });
  if (!data.arrays.ponder.some(Boolean)) {
    view.querySelector('[value="ponder"]').remove();
    state.view = view.value;
  }
  refresh();
  document.querySelector("[data-gallery]").dataset.ready = "true";
})();
