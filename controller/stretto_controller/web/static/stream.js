// Asking the controller, and following it: every request carries the token, if one was asked for.
// EventSource could not: it sends no headers of ours.

const SILENT_MS = 25000, FIRST_RETRY_MS = 300, LAST_RETRY_MS = 4000;
const TOKEN = "stretto-token";

let askForToken = async () => null, asking = null;
export function onTokenNeeded(ask) { askForToken = ask; }

// One question at a time, however many requests were refused.
function anotherToken(why) {
  asking ??= askForToken(why).finally(() => { asking = null; });
  return asking;
}

export class Refused extends Error {}

async function request(path, options = {}) {
  const token = sessionStorage.getItem(TOKEN);
  const headers = { ...options.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  const response = await fetch(path, { ...options, headers, cache: "no-store" });
  if (response.status !== 401 && response.status !== 403) return response;
  const answer = await response.json();
  const message = token === null ? "only those who have a token are answered" : answer.detail;
  const given = await anotherToken(message);
  if (!given) throw new Refused(message);
  sessionStorage.setItem(TOKEN, given);
  return request(path, options);
}

// The answer's JSON; Refused, with the controller's own words, where it says no.
export async function ask(method, path, body) {
  const response = await request(path, {
    method,
    headers: { Accept: "application/json", ...(body ? { "Content-Type": "application/json" } : {}) },
    body: body ? JSON.stringify(body) : undefined,
  });
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => ({ detail: `the controller answered ${response.status}` }));
  if (!response.ok) throw new Refused(answer.detail);
  return answer;
}

// Calls onEvent(name, data) for each event and onState(connected, words, refused) at each change, until the returned
// function is called, or nobody gives a token. After a break it goes on behind the last event that it has seen.
export function follow(path, onEvent, onState) {
  let last = "", stopped = false, abort = new AbortController(), wait_ms = FIRST_RETRY_MS;

  async function once() {
    abort = new AbortController();
    let watchdog;
    const alive = () => { clearTimeout(watchdog); watchdog = setTimeout(() => abort.abort(), SILENT_MS); };
    alive();
    try {
      const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
      const response = await request(path, { headers, signal: abort.signal });
      if (response.status === 404) { onEvent("deleted", {}); stopped = true; return; }
      if (!response.ok) throw new Error(`the controller answered ${response.status}`);
      onState(true, "live", false);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", read = await reader.read(); !read.done; read = await reader.read()) {
        alive();
        wait_ms = FIRST_RETRY_MS;
        rest = take(rest + read.value.replaceAll("\r\n", "\n"));
      }
      throw new Error("the stream ended");
    } finally {
      clearTimeout(watchdog);
    }
  }

  function take(text) {
    const blocks = text.split("\n\n"), rest = blocks.pop();
    for (const block of blocks) {
      const fields = {};
      for (const line of block.split("\n")) {
        const colon = line.indexOf(":");
        if (colon > 0) fields[line.slice(0, colon)] = line.slice(colon + 1).trimStart();
      }
      if (fields.id) last = fields.id;
      if (fields.data && !stopped) onEvent(fields.event ?? "message", JSON.parse(fields.data));
    }
    return rest;
  }

  (async () => {
    while (!stopped) {
      try {
        await once();
      } catch (error) {
        if (stopped) return;
        if (error instanceof Refused) return onState(false, error.message, true);
        onState(false, "no answer from the controller; trying again", false);
        await new Promise((wake) => setTimeout(wake, wait_ms * (0.5 + Math.random())));
        wait_ms = Math.min(LAST_RETRY_MS, wait_ms * 2);
      }
    }
  })();
  return () => { stopped = true; abort.abort(); };
}
