"use strict";
// Draws the charts and keeps switches, charts and gallery on the same budget.
const report = {
  charts: JSON.parse(document.getElementById("chart-data").textContent),
  chosen: { range: "zoom", batch: null, budget: null },

  // base64 gzip -> bytes, without any library.
  async inflate(id) {
    const text = document.getElementById(id).textContent.trim();
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  },

  colour(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  },

  // Specs name colours as var(--x), because a chart cannot follow the page's theme by itself.
  resolve(value) {
    if (typeof value === "string") {
      const named = /^var\((--[\w-]+)\)$/.exec(value);
      return named ? report.colour(named[1]) : value;
    }
    if (Array.isArray(value)) return value.map(report.resolve);
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, report.resolve(item)]));
    }
    return value;
  },

  spec(id) {
    const found = id.split(".").reduce((node, key) => node && node[key], report.charts);
    if (!found || found.data) return found;
    const key = id === "blocks" ? report.chosen.budget : report.chosen.batch;
    return found[key];
  },

  themed(layout, narrow) {
    const ink = report.colour("--ink"), grid = report.colour("--line"), paper = report.colour("--surface");
    const axis = { gridcolor: grid, linecolor: grid, tickcolor: grid, fixedrange: true };
    const themed = report.resolve(layout);
    return {
      ...themed,
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow ? 11 : 13, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      dragmode: false,
      hoverlabel: { bgcolor: paper, bordercolor: report.colour("--muted"), font: { color: ink, size: 13 }, align: "left" },
      xaxis: { ...axis, ...themed.xaxis },
      yaxis: { ...axis, ...themed.yaxis },
    };
  },

  draw(holder) {
    const spec = report.spec(holder.dataset.chart);
    if (!spec || !window.Plotly) return;
    const layout = report.themed(spec.layout, holder.clientWidth < 420);
    if (spec.zoom) layout.yaxis.range = spec[report.chosen.range];
    window.Plotly.react(holder, report.resolve(spec.data), layout, { displayModeBar: false, responsive: true });
  },

  drawAll() {
    document.querySelectorAll("[data-chart]").forEach(report.draw);
  },

  choose(name, value) {
    if (report.chosen[name] === value) return;
    report.chosen[name] = value;
    document.querySelectorAll(`[data-switch="${name}"] input`).forEach((input) => {
      input.checked = input.value === value;
    });
    report.drawAll();
    document.dispatchEvent(new CustomEvent("report:" + name, { detail: value }));
  },

  async start() {
    document.querySelectorAll("[data-switch]").forEach((group) => {
      const checked = group.querySelector("input:checked");
      if (checked) report.chosen[group.dataset.switch] = checked.value;
      group.addEventListener("change", (event) => report.choose(group.dataset.switch, event.target.value));
    });
    if (!document.getElementById("plotly-bundle")) return;
    try {
      const script = document.createElement("script");
      script.textContent = new TextDecoder().decode(await report.inflate("plotly-bundle"));
      document.head.append(script);
      report.drawAll();
    } catch (error) {
      document.querySelectorAll("[data-chart]").forEach((holder) => {
        holder.textContent = "This browser cannot unpack the charts; the same figures lie in figures/ beside this file.";
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", report.drawAll);
  },
};
report.ready = report.start();
