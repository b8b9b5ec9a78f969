// One job: its figures, charts, nodes, checkpoints and story, and what can be done to it.

import { Charts } from "./charts.js";
import { askNodes, confirmed } from "./dialogs.js";
import { bytes, clock, duration, element, number, phaseTag, say, table, tauBar, words } from "./elements.js";
import { sizePart } from "./size.js";
import { ask } from "./stream.js";

const KEPT_EVENTS = 1000, SHOWN_EVENTS = 200, SHOWN_FAILURES = 3;
// Then the page begins again with what the controller keeps, which is thinner.
const MOST_POINTS = 20000;
const SPANS = [["all", 0], ["1 h", 3600], ["10 min", 600], ["1 min", 60]];
const NODES = { active: "good", lost: "bad", draining: "warn", joining: "warn", spare: "dim" };
const BAD = /lost|failed|late|slow|broken|refused/;

export class JobPage {
  constructor(name, announce) {
    this.name = name;
    this.path = `/api/v1/jobs/${encodeURIComponent(name)}`;
    this.announce = announce;
    this.job = null;
    this.events = [];
    this.generations = new Map();
    this.shown = {};
    this.charts = new Charts(() => [...this.generations.values()].map((g) => g.started_s));
    this.build();
  }

  build() {
    this.tag = element("span", {});
    this.reason = element("p", { class: "reason" });
    this.bar = tauBar(`tau of ${this.name}`);
    this.under = [element("span", {}), element("span", {})];
    this.figures = element("dl", { class: "figures" });
    this.answer = element("p", { class: "answer", role: "status" });
    this.buttons = {
      scale: element("button", { type: "button", onclick: () => this.scale() }, "Scale…"),
      pause: element("button", { type: "button", onclick: () => this.pause() }, "Pause…"),
      checkpoint: element("button", { type: "button", onclick: () => this.act("PATCH", { checkpoint: true }, "It saves after a step.") }, "Checkpoint"),
      delete: element("button", { type: "button", class: "harm", onclick: () => this.remove() }, "Delete…"),
    };
    this.nodes = element("div", {});
    this.checkpoints = element("div", {});
    this.size = element("div", {});
    this.history = element("div", {});
    this.story = element("div", {});
    const spans = SPANS.map(([label, span_s], place) => element("label", {},
      element("input", { type: "radio", name: "span", value: span_s, checked: place === 0, onchange: () => this.charts.show(span_s) }), label));
    const part = (title, ...content) => element("section", { class: "card" }, element("h2", {}, title), content);
    this.root = element("article", { "aria-labelledby": "job-title" },
      element("p", {}, element("a", { href: "#/" }, "← All jobs")),
      element("div", { class: "heading" }, element("h1", { id: "job-title" }, this.name), this.tag,
        element("div", { class: "buttons", role: "group", "aria-label": "Actions" }, Object.values(this.buttons))),
      this.reason, this.answer, this.bar.bar, element("div", { class: "under" }, this.under), this.figures,
      element("fieldset", { class: "spans" }, element("legend", {}, "Charts show"), spans),
      this.charts.box,
      element("div", { class: "columns" },
        element("div", {}, part("Nodes", this.nodes), part("Size", this.size), part("Checkpoints", this.checkpoints)),
        part("Events", this.story)),
      part("Generations", this.history));
  }

  // One message of the stream: the job as it is, and what was added since the last message.
  take(news) {
    const before = this.job;
    if (news.anew || (before && before.incarnation !== news.job.incarnation)) {
      this.charts.clear();
      if (news.anew) { this.events = []; this.generations.clear(); }
    }
    this.job = news.job;
    this.events.push(...news.events);
    this.events.splice(0, this.events.length - KEPT_EVENTS);
    for (const g of news.generations) this.generations.set(`${g.incarnation} ${g.generation.number}`, g);
    this.charts.add(news.points, news.job.spec.target_tau);
    this.showFigures();
    this.replace("nodes", this.nodeRows(), (rows) => rows.length
      ? table("Nodes", ["rank", "node", "state", "stream", "slots", "ranks", "step", "address"], rows.map((row) => row.map(cell)))
      : element("p", { class: "dim" }, "None are there."));
    this.replace("checkpoints", [this.checkpointRows(), this.job.saves.count, this.events.findLast((event) => event.kind === "checkpoint_failed")?.sequence],
      ([rows]) => this.checkpointPart(rows));
    this.replace("size", [this.job.recommendation, this.job.autoscale, this.job.desired_nodes], () => sizePart(this.job));
    this.replace("history", this.generationRows(), (rows) =>
      table("Generations", ["number", "began", "nodes", "S", "mean gain", "effective lr", "steps", "tau", "pause", "cause", "ended by"], rows));
    this.replace("story", this.events.slice(-SHOWN_EVENTS).map((event) => event.sequence), () => this.timeline());
    if (before && before.phase !== this.job.phase) this.announce(`${this.name} is ${this.job.phase}: ${this.job.reason}`);
    return this.charts.length <= MOST_POINTS;
  }

  // Rebuilds a part only when what it shows has changed.
  replace(name, content, build) {
    const key = JSON.stringify(content);
    if (this.shown[name] === key) return;
    this.shown[name] = key;
    const top = this[name].querySelector(".scroll")?.scrollTop ?? 0;
    this[name].replaceChildren(build(content));
    const box = this[name].querySelector(".scroll");
    if (box) box.scrollTop = top;
  }

  showFigures() {
    const job = this.job, progress = job.progress, generation = job.generation, target = job.spec.target_tau;
    this.replace("tag", job.phase, phaseTag);
    say(this.reason, job.reason);
    this.bar.update(progress?.tau, target);
    say(this.under[0], `tau ${number(progress?.tau ?? 0, 5)}${target > 0 ? ` of ${number(target, 6)}` : ""}`);
    const finished = ["succeeded", "failed"].includes(job.phase);
    const left = job.remaining_s === null ? "" : `, ${duration(job.remaining_s)} left`;
    say(this.under[1], finished ? "" : `${number(job.progress_rate)} iterations/s${left}`);
    this.buttons.scale.disabled = this.buttons.pause.disabled = finished;
    this.buttons.checkpoint.disabled = job.phase !== "running";
    say(this.buttons.pause, job.paused ? "Resume" : "Pause…");
    const pairs = [
      ["generation", generation?.number ?? "–"], ["workers", generation?.world_size ?? "–"], ["scale S", number(generation?.scale)],
      ["gain r", number(progress?.gain)], ["effective lr", number(progress?.effective_lr[0])], ["base lr", number(progress?.base_lr[0])],
      ["loss", number(progress?.loss)], ["step", progress?.step.toLocaleString("en") ?? "–"], ["epoch", progress?.epoch ?? "–"],
      ["nodes wanted", `${job.desired_nodes} (${job.spec.min_nodes}–${job.spec.max_nodes})`],
    ];
    this.replace("figures", pairs, () => {
      const made = document.createDocumentFragment();
      made.append(...pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value)))));
      return made;
    });
  }

  nodeRows() {
    return this.job.nodes.map((node) => [
      String(node.node_rank ?? "–"), node.node_id, { text: node.state, class: NODES[node.state] ?? "" },
      node.connected ? { text: "connected", class: "good" }
        : { text: node.silent_s === null ? "not heard of yet" : `silent for ${duration(Math.round(node.silent_s))}`, class: "bad" },
      String(node.slots), node.first_rank === null ? "–" : node.slots > 1 ? `${node.first_rank}–${node.first_rank + node.slots - 1}` : String(node.first_rank),
      node.step_s === null ? "–" : duration(node.step_s), node.address,
    ]);
  }

  checkpointRows() {
    const latest = this.job.checkpoint;
    if (!latest) return [];
    const age_s = Date.now() / 1000 - latest.time_s;
    return [[age_s < 5 ? "just now" : duration(age_s < 60 ? Math.round(age_s / 5) * 5 : age_s), latest.step.toLocaleString("en"), number(latest.tau, 5),
      String(latest.generation), bytes(latest.size_bytes), duration(latest.duration_s)]];
  }

  checkpointPart(rows) {
    const { count, mean_s } = this.job.saves;
    const failed = this.events.filter((event) => event.kind === "checkpoint_failed").slice(-SHOWN_FAILURES).reverse();
    const failures = failed.map((event) => element("p", { class: "bad" }, `${clock(event.time_s)} ${event.reason}`));
    if (!rows.length) return element("div", {}, element("p", { class: "dim" }, "None was committed yet."), failures);
    return element("div", {}, table("Latest checkpoint", ["age", "step", "tau", "generation", "size", "written in"], rows),
      element("p", { class: "path" }, this.job.checkpoint.path),
      count > 1 ? element("p", { class: "dim" }, `${count.toLocaleString("en")} since the controller started, each in ${duration(mean_s)} on average.`) : null,
      failures);
  }

  generationRows() {
    return [...this.generations.values()].reverse().slice(0, SHOWN_EVENTS).map((g) => [
      String(g.generation.number), clock(g.started_s), String(g.generation.members.length), number(g.generation.scale), number(g.mean_gain),
      number(g.effective_lr), g.steps.toLocaleString("en"), `${number(g.first_tau ?? 0, 4)} → ${number(g.last_tau ?? 0, 4)}`,
      duration(g.pause_s), words(g.cause), g.end_reason || "–",
    ]);
  }

  timeline() {
    const entries = told(this.events.slice(-SHOWN_EVENTS)).reverse().map(({ kinds, last }) => element("li", { "data-sequence": last.sequence },
      element("time", { datetime: new Date(last.time_s * 1000).toISOString() }, clock(last.time_s)),
      element("b", { class: BAD.test(kinds) ? "bad" : "" }, kinds),
      last.generation ? element("span", { class: "dim" }, `generation ${last.generation}`) : null,
      element("p", {}, last.reason)));
    return element("ol", { class: "timeline scroll", tabindex: "0", "aria-label": "Events, newest first" }, entries);
  }

  async act(method, body, done) {
    try {
      await ask(method, this.path, body);
      say(this.answer, done);
      this.answer.className = "answer good";
    } catch (error) {
      say(this.answer, `Not done: ${error.message}`);
      this.answer.className = "answer bad";
    }
  }

  async scale() {
    const nodes = await askNodes(this.job);
    if (nodes) await this.act("PATCH", { nodes }, `${nodes} ${nodes === 1 ? "node is" : "nodes are"} wanted now.`);
  }

  async pause() {
    if (this.job.paused) return this.act("PATCH", { paused: false }, "It goes on.");
    const text = "The workers save a checkpoint after the step under way, then rest. The nodes are kept.";
    if (await confirmed(`Pause ${this.name}?`, text, "Pause", "main")) await this.act("PATCH", { paused: true }, "It pauses after a step.");
  }

  async remove() {
    const text = "All its nodes are sent home at once, and its history is forgotten. Checkpoints stay where they are.";
    if (await confirmed(`Delete ${this.name}?`, text, "Delete")) await this.act("DELETE", undefined, "Deleted.");
  }

  gone() {
    for (const button of Object.values(this.buttons)) button.disabled = true;
    say(this.answer, "This job does not exist, or was deleted.");
    this.answer.className = "answer bad";
  }

  close() { this.charts.close(); }
}

// The steps of one change, which all have its reason, as one entry: change planned → reconfiguring → running.
function told(events) {
  const entries = [];
  for (const event of events) {
    const before = entries.at(-1);
    if (before && before.last.reason === event.reason) {
      before.kinds += ` → ${words(event.kind)}`;
      before.last = event;
    } else entries.push({ kinds: words(event.kind), last: event });
  }
  return entries;
}

function cell(value) {
  return typeof value === "string" ? value : element("span", { class: value.class }, value.text);
}
