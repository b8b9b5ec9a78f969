// Building what is shown. Children are text or elements, never markup: names and reasons come from other machines.

export function element(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

// Changes text only where it differs, so that a reader's selection and a screen reader's place stay.
export function say(place, text) {
  if (place.textContent !== text) place.textContent = text;
}

export function table(caption, heads, rows) {
  const label = element("caption", { class: "unseen" }, caption);
  const head = element("thead", {}, element("tr", {}, heads.map((name) => element("th", { scope: "col" }, name))));
  const body = element("tbody", {}, rows.map((cells) => element("tr", {}, cells.map((cell) => element("td", {}, cell)))));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    element("table", {}, label, head, body));
}

export const words = (name) => name.replaceAll("_", " ");

export function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e7)) return value.toExponential(digits - 1);
  return Number(value.toPrecision(Math.max(digits, Math.ceil(Math.log10(size + 1))))).toLocaleString("en");
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  if (seconds < 60) return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes} min ${Math.floor(seconds % 60)} s`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function bytes(size) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (size >= 1024 && power < units.length - 1) { size /= 1024; power += 1; }
  return `${number(size)} ${units[power]}`;
}

export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");

const PHASES = { running: "good", succeeded: "good", failed: "bad", reconfiguring: "warn", waiting: "warn" };
export const phaseTag = (phase) => element("span", { class: `tag ${PHASES[phase] ?? "dim"}` }, phase);

export function tauBar(label) {
  const inner = element("div", {});
  const bar = element("div", { class: "bar", role: "progressbar", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 100 }, inner);
  const update = (tau, target) => {
    bar.hidden = !(target > 0);
    const percent = target > 0 ? Math.min(100, 100 * (tau ?? 0) / target) : 0;
    inner.style.width = `${percent}%`;
    bar.setAttribute("aria-valuenow", percent.toFixed(1));
  };
  return { bar, update };
}
