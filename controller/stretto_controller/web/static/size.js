// Which size the controller thinks best for a job, why, and what it expects of the others.

import { duration, element, number, table } from "./elements.js";

const basis = (size) => size.seen ? "seen" : size.extrapolated ? { text: "a guess", class: "warn" } : "predicted";

export function sizePart({ recommendation, autoscale, desired_nodes }) {
  if (!recommendation) return element("p", { class: "dim" }, "Nothing is known yet: workers have to be seen at work first.");
  const { nodes, reason, sizes, remaining_s } = recommendation;
  const most = Math.max(...sizes.map((size) => size.progress_rate ?? 0));
  const rows = sizes.map((size) => [
    mark(size.nodes, nodes, desired_nodes), String(size.world_size), number(size.scale), number(size.gain), duration(size.step_seconds),
    rate(size.progress_rate, most), share(size.marginal_efficiency), basis(size),
  ]);
  const heads = ["nodes", "workers", "S", "gain r", "step", "d(tau)/dt", "each brings", "basis"];
  const left = nodes && remaining_s !== null ? ` With ${nodes} it would be done in ${duration(remaining_s)}.` : "";
  return element("div", {},
    element("p", {}, `${reason}.${left}`),
    sizes.length ? table("Sizes", heads, rows.map((row) => row.map(cell))) : null,
    element("p", { class: "dim" }, MODES[autoscale.mode] ?? ""));
}

const MODES = {
  off: "Sizes are predicted; none is recommended.",
  recommend: "A recommendation only: the size changes when somebody scales the job.",
  act: "The controller changes the size by itself, until somebody scales the job.",
};

function mark(size, recommended, wanted) {
  const notes = [size === recommended ? "best" : "", size === wanted ? "wanted" : ""].filter(Boolean);
  return notes.length ? { text: `${size} (${notes.join(", ")})`, class: size === recommended ? "good" : "" } : String(size);
}

function rate(value, most) {
  const bar = element("span", { class: "rate-bar" });
  bar.style.width = `${most > 0 ? 4 * (value ?? 0) / most : 0}rem`;
  return element("span", {}, bar, number(value));
}

const share = (value) => value === null ? "–" : `${Math.round(100 * value)} %`;
const cell = (value) => typeof value === "string" || value instanceof Node ? value : element("span", { class: value.class }, value.text);
