// Questions before anything that cannot be taken back.

import { element } from "./elements.js";

// Shows a dialog; resolves to what `answer` gives when it is confirmed, to null otherwise. Escape is "no".
function open(title, content, confirm, kind, answer) {
  return new Promise((resolve) => {
    const box = element("dialog", { "aria-labelledby": "dialog-title" },
      element("form", { method: "dialog" },
        element("h2", { id: "dialog-title" }, title),
        content,
        element("div", { class: "buttons" },
          element("button", { value: "no", type: "submit", formnovalidate: true }, "Cancel"),
          element("button", { value: "yes", type: "submit", class: kind }, confirm))));
    box.addEventListener("close", () => {
      resolve(box.returnValue === "yes" ? answer() : null);
      box.remove();
    });
    document.body.append(box);
    box.returnValue = "no";
    box.showModal();
    (box.querySelector("input") ?? box.querySelector("button")).focus();
  });
}

export const confirmed = async (title, text, confirm, kind = "harm") =>
  (await open(title, element("p", {}, text), confirm, kind, () => true)) ?? false;

export function askNodes(job) {
  const { min_nodes: least, max_nodes: most } = job.spec;
  const input = element("input", { type: "number", id: "nodes", name: "nodes", min: Math.max(1, least), max: most, step: 1, required: true, value: job.desired_nodes });
  const text = `Between ${least} and ${most}. Members beyond the number leave after a step, and wait as spares; nothing is lost.`;
  const content = element("div", {}, element("label", { for: "nodes" }, "Nodes that the job should have"), input, element("p", { class: "dim" }, text));
  return open(`Scale ${job.name}`, content, "Scale", "main", () => Number(input.value));
}

// why: the controller's own words.
export function askToken(why) {
  const input = element("input", { type: "password", id: "token", autocomplete: "off", required: true });
  const content = element("div", {}, element("p", {}, `The controller says: ${why}.`), element("label", { for: "token" }, "Token"), input,
    element("p", { class: "dim" }, "Kept in this tab until it is closed."));
  return open("A token is needed", content, "Go on", "main", () => input.value);
}
