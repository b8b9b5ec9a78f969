// The charts of one job, on one axis of time.

import { element, number, say } from "./elements.js";

const SHOWN = [
  { key: "tau", title: "tau", series: [["tau", "tau", 0], ["target", "target", 3]] },
  { key: "gain", title: "Gain r and scale S", series: [["gain", "gain r", 0], ["scale", "scale S", 1]], step: "scale" },
  { key: "lr", title: "Learning rate", series: [["effective_lr", "effective", 0], ["base_lr", "base", 2]] },
  { key: "loss", title: "Loss", series: [["loss", "loss", 1]] },
  { key: "rate", title: "d(tau)/dt", series: [["progress_rate", "iterations/s", 2]] },
];
const COLOURS = ["--accent", "--second", "--third", "--dim"];
const HEIGHT = 190;

const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// `starts` is a function that gives the times at which generations began.
export class Charts {
  constructor(starts) {
    this.starts = starts;
    this.points = { time_s: [] };
    this.span_s = 0;
    this.target = 0;
    this.plots = [];
    this.box = element("div", { class: "charts" });
    this.observer = new ResizeObserver(() => this.resize());
    this.captions = new Map();
    this.build();
    this.observer.observe(this.box);
  }

  build() {
    this.plots.forEach((plot) => plot.destroy());
    this.plots = [];
    this.box.replaceChildren(...SHOWN.map((shown) => this.figure(shown)));
    this.resize();
    this.draw();
  }

  figure(shown) {
    const values = shown.series.map(([key, , colour]) => {
      const value = element("span", {});
      this.captions.set(key, value);
      return element("span", { class: `key colour-${colour}` }, value);
    });
    const place = element("div", { class: "plot", "aria-hidden": "true" });
    const made = element("figure", { class: "card", "data-chart": shown.key },
      element("figcaption", {}, element("b", {}, shown.title), element("span", { class: "values" }, values)), place);
    const axis = { stroke: style("--dim"), grid: { stroke: style("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const plot = new uPlot({
      width: 400,
      height: HEIGHT,
      legend: { show: false },
      cursor: { sync: { key: "stretto" }, drag: { x: true, y: false } },
      axes: [{ ...axis, size: 28, space: 72, values: (self, ticks) => ticks.map((tick) => moment(tick, self.scales.x)) }, { ...axis, size: 52, values: (_, ticks) => ticks.map(tickText) }],
      scales: { y: { range: (_, low, high) => bounds(low, high) } },
      series: [{}, ...shown.series.map(([key, label, colour]) => ({
        label,
        stroke: style(COLOURS[colour]),
        width: key === "target" ? 1 : 1.8,
        dash: key === "target" ? [6, 5] : undefined,
        points: { show: false },
        paths: key === shown.step ? uPlot.paths.stepped({ align: 1 }) : undefined,
      }))],
      hooks: { drawAxes: [(self) => this.marks(self)] },
    }, null, place);
    plot.shown = shown;
    this.plots.push(plot);
    return made;
  }

  // A line where each generation began.
  marks(plot) {
    const { left, top, width, height } = plot.bbox, pen = plot.ctx;
    pen.save();
    pen.strokeStyle = style("--mark");
    pen.lineWidth = devicePixelRatio;
    pen.setLineDash([3 * devicePixelRatio, 4 * devicePixelRatio]);
    pen.beginPath();
    for (const time_s of this.starts()) {
      const x = Math.round(plot.valToPos(time_s, "x", true));
      if (x > left && x < left + width) { pen.moveTo(x, top); pen.lineTo(x, top + height); }
    }
    pen.stroke();
    pen.restore();
  }

  clear() { this.points = { time_s: [] }; }

  add(more, target) {
    this.target = target;
    for (const [key, values] of Object.entries(more)) {
      const kept = this.points[key] ?? (this.points[key] = []);
      for (const value of values) kept.push(value);
    }
    this.draw();
  }

  get length() { return this.points.time_s.length; }

  draw() {
    const times = this.points.time_s, last = times.at(-1);
    // A target far away would press the line to the ground; the caption has it all the same.
    const near = this.target > 0 && (this.points.tau?.at(-1) ?? 0) > 0.2 * this.target;
    for (const plot of this.plots) {
      const columns = plot.shown.series.map(([key]) =>
        key === "target" ? times.map(() => near ? this.target : null) : this.points[key] ?? []);
      // Who has zoomed in keeps the view; otherwise it follows the newest point.
      const { min, max } = plot.scales.x, drawn = plot.drawn;
      const zoomed = !this.span_s && drawn !== undefined && (min > drawn.first || max < drawn.last);
      plot.setData([times, ...columns], !zoomed);
      if (zoomed) plot.setScale("x", { min, max });
      else if (last !== undefined && !this.span_s) plot.drawn = { first: times[0], last };
      else plot.drawn = undefined;
      if (last !== undefined && this.span_s) plot.setScale("x", { min: last - this.span_s, max: last });
      for (const [key, label] of plot.shown.series) {
        say(this.captions.get(key), `${label} ${number(key === "target" ? this.target || null : this.points[key]?.at(-1))}`);
      }
    }
  }

  show(span_s) { this.span_s = span_s; this.draw(); }

  resize() {
    for (const plot of this.plots) {
      const width = plot.root.parentElement.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: HEIGHT });
    }
  }

  close() {
    this.observer.disconnect();
    this.plots.forEach((plot) => plot.destroy());
    this.plots = [];
  }
}

const tickText = (tick) => Math.abs(tick) >= 1e5 ? tick.toLocaleString("en", { notation: "compact" }) : number(tick);

function moment(time_s, { min, max }) {
  const time = new Date(time_s * 1000);
  if (max - min < 600) return time.toLocaleTimeString("en-GB");
  const clock = time.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  return max - min < 86400 ? clock : `${time.getDate()}.${time.getMonth() + 1}. ${clock}`;
}

function bounds(low, high) {
  if (low === null || high === null) return [0, 1];
  if (low === high) return low === 0 ? [0, 1] : low > 0 ? [0, 2 * low] : [2 * low, 0];
  // From 0 where that wastes less than half of the height.
  const from = low > 0 && low < (high - low) ? 0 : low - 0.05 * (high - low);
  return [from, high + 0.05 * (high - low)];
}
