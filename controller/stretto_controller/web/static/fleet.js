// The list of jobs.

import { duration, element, number, phaseTag, say, tauBar } from "./elements.js";

class Row {
  constructor(name) {
    this.phase = "";
    this.tag = element("span", {});
    this.reason = element("p", { class: "reason" });
    this.bar = tauBar(`tau of ${name}`);
    this.figures = Object.fromEntries(["nodes", "S", "gain", "tau", "left"].map((key) => [key, element("dd", {})]));
    const pairs = Object.entries(this.figures).map(([key, place]) => element("div", {}, element("dt", {}, key), place));
    this.root = element("li", { class: "card job" },
      element("div", { class: "title" }, element("a", { href: `#/job/${encodeURIComponent(name)}` }, name), this.tag),
      this.reason, this.bar.bar, element("dl", { class: "figures" }, pairs));
  }

  update(job) {
    if (job.phase !== this.phase) {
      this.phase = job.phase;
      this.tag.replaceChildren(phaseTag(job.phase));
    }
    say(this.reason, job.reason);
    this.bar.update(job.tau, job.target_tau);
    say(this.figures.nodes, `${job.active_nodes} of ${job.desired_nodes}`);
    say(this.figures.S, number(job.scale));
    say(this.figures.gain, number(job.gain));
    say(this.figures.tau, number(job.tau, 4) + (job.target_tau > 0 ? ` / ${number(job.target_tau, 4)}` : ""));
    say(this.figures.left, duration(job.remaining_s));
  }
}

export class Fleet {
  constructor() {
    this.rows = new Map();
    this.wanted = "";
    this.list = element("ul", { class: "fleet" });
    this.count = element("p", { class: "dim", role: "status" });
    this.nothing = element("p", { class: "empty" }, "No jobs yet. ", element("code", {}, "stretto run train.py"), " begins one.");
    const filter = element("input", { type: "search", id: "filter", placeholder: "part of a name or phase", oninput: () => this.filter(filter.value) });
    this.filterBox = element("div", { class: "filter" }, element("label", { for: "filter" }, "Filter"), filter);
    this.root = element("section", { "aria-labelledby": "jobs-title" },
      element("div", { class: "heading" }, element("h1", { id: "jobs-title" }, "Jobs"), this.count, this.filterBox), this.nothing, this.list);
  }

  update(jobs) {
    for (const name of this.rows.keys()) if (!jobs.has(name)) { this.rows.get(name).root.remove(); this.rows.delete(name); }
    const names = [...jobs.keys()].sort();
    names.forEach((name, place) => {
      let row = this.rows.get(name);
      if (!row) { row = new Row(name); this.rows.set(name, row); }
      row.update(jobs.get(name));
      if (this.list.children[place] !== row.root) this.list.insertBefore(row.root, this.list.children[place] ?? null);
    });
    this.nothing.hidden = names.length > 0;
    this.filterBox.hidden = names.length < 8;
    this.filter(this.wanted);
  }

  filter(text) {
    this.wanted = text;
    let shown = 0;
    for (const [name, row] of this.rows) {
      row.root.hidden = !`${name} ${row.phase}`.includes(text.trim().toLowerCase());
      shown += row.root.hidden ? 0 : 1;
    }
    say(this.count, shown === this.rows.size ? `${shown} in all` : `${shown} of ${this.rows.size} shown`);
  }
}
