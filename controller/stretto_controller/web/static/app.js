// The page: which part is shown, and the one stream that feeds it.

import { askToken } from "./dialogs.js";
import { element, say } from "./elements.js";
import { Fleet } from "./fleet.js";
import { JobPage } from "./job.js";
import { follow, onTokenNeeded } from "./stream.js";

const content = document.getElementById("content");
const jobs = new Map();
let part = null, stop = () => {};

onTokenNeeded(askToken);

function announce(text) { say(document.getElementById("announcer"), text); }

function connected(well, text, refused) {
  const place = document.getElementById("connection");
  place.className = well ? "good" : "bad";
  say(document.getElementById("connection-text"), refused ? "no token" : text);
  if (!refused) return;
  const again = element("button", { type: "button", class: "main", onclick: () => show() }, "Give a token");
  content.replaceChildren(element("div", { class: "empty" }, element("p", {}, `The controller says: ${text}.`), again));
}

function jobInAddress() {
  const match = /^#\/job\/(.+)$/.exec(location.hash);
  return match ? decodeURIComponent(match[1]) : null;
}

function take(kind, data) {
  if (kind === "fleet") {
    if (data.whole) jobs.clear();
    for (const job of data.jobs) jobs.set(job.name, job);
    for (const name of data.gone) jobs.delete(name);
    if (part instanceof Fleet) part.update(jobs);
  } else if (part instanceof JobPage) {
    if (kind === "deleted") part.gone();
    else if (!part.take(data)) show();
  }
  if (!part.root.isConnected) content.replaceChildren(part.root);
}

// Shows what the address names, and follows it from its beginning.
function show(moved = false) {
  stop();
  part?.close?.();
  const name = jobInAddress();
  part = name === null ? new Fleet() : new JobPage(name, announce);
  document.title = name === null ? "Stretto" : `${name} · Stretto`;
  if (moved) {
    content.focus();
    scrollTo(0, 0);
  }
  stop = follow(name === null ? "/api/v1/watch" : `/api/v1/watch?job=${encodeURIComponent(name)}`, take, connected);
}

const THEMES = ["auto", "light", "dark"];
const themeButton = document.getElementById("theme");
function useTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  say(themeButton, `Theme: ${theme}`);
  if (part instanceof JobPage) part.charts.build();
}
themeButton.addEventListener("click", () => {
  const theme = THEMES[(THEMES.indexOf(localStorage.getItem("stretto-theme") ?? "auto") + 1) % THEMES.length];
  localStorage.setItem("stretto-theme", theme);
  useTheme(theme);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { if (part instanceof JobPage) part.charts.build(); });

addEventListener("hashchange", () => show(true));
useTheme(localStorage.getItem("stretto-theme") ?? "auto");
// The header is painted first: the history of a long run takes a moment to draw. A hidden tab paints nothing.
if (document.hidden) show();
else requestAnimationFrame(() => setTimeout(show));
