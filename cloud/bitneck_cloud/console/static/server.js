// Server: queue, batches, models, a canary, sinks, the audit log, and reloading a model with its result.

import { ApiError, get, send } from "./api.js";
import { canaryPart } from "./canary.js";
import { Table, count, duration, element } from "./dom.js";
import { poll } from "./poll.js";

export function serverPage(main, { operate, complain, fine }) {
  const facts = element("dl", { class: "cards" });
  const result = element("p", { role: "status" });
  const buttons = new Map();
  const models = new Table("Models", [
    { name: "Model", value: (model) => model.name },
    { name: "Task", value: (model) => model.task },
    { name: "Backbone", value: (model) => model.backbone },
    { name: "Points", kind: "number", value: (model) => count(model.points.length) },
    { name: "Bundle", kind: "text", value: (model) => bundleOf(model) },
    { name: "", value: (model) => reloading(model.name) },
  ]);
  const sinks = new Table("Sinks of answers", [
    { name: "Sink", value: (sink) => sink.name },
    { name: "Kind", value: (sink) => sink.kind },
    { name: "Waiting", kind: "number", value: (sink) => count(sink.queued) },
    { name: "Behind", kind: "number", value: (sink) => duration(sink.behind_s) },
    { name: "Delivered", kind: "number", value: (sink) => count(sink.delivered) },
    { name: "Dropped", kind: "number", value: (sink) => lost(sink) },
    { name: "Last error", kind: "text", value: (sink) => trouble(sink) },
  ]);
  const audit = new Table("The newest changes", [
    { name: "When", value: (line) => new Date(1000 * line.unix_s).toLocaleString() },
    { name: "What", value: (line) => `${line.action} ${line.target}` },
    { name: "By", value: (line) => line.who },
    { name: "Before", kind: "text", value: (line) => line.before },
    { name: "After", kind: "text", value: (line) => line.after },
  ]);
  const canary = canaryPart({ operate, complain });
  main.append(facts, result, models.element, canary.element, element("h2", {}, "Sinks"), sinks.element, element("h2", {}, "Audit"), audit.element);
  let last = null;

  function reloading(name) {
    if (!operate) return "";
    if (!buttons.has(name)) buttons.set(name, element("button", { type: "button", onclick: () => reload(name), "aria-label": `Reload ${name}` }, "Reload"));
    return buttons.get(name);
  }

  async function reload(name) {
    const button = buttons.get(name);
    button.disabled = true;
    result.className = "quiet";
    result.textContent = `Loading ${name} from its folder…`;
    try {
      const done = await send("POST", `/v1/models/${encodeURIComponent(name)}/reload`);
      const lists = ["added", "removed", "altered"].filter((key) => done[key].length).map((key) => `${key} ${done[key].join(", ")}`);
      result.textContent = done.changed
        ? `${name}: bundle ${done.bundle_id.slice(7, 19)} is served now${lists.length ? `; ${lists.join("; ")}` : ""}; ${done.files_loaded} files were read.`
        : `${name}: its folder has the bundle that is served already.`;
      result.className = "good";
      await look();
    } catch (error) {
      result.textContent = error.message;
      result.className = "bad";
    } finally {
      button.disabled = false;
    }
  }

  function fact(name, value) {
    return element("div", {}, element("dt", {}, name), element("dd", {}, value));
  }

  async function look(signal) {
    const [server, served, lines] = await Promise.all([
      get("/v1/server", signal), get("/v1/models", signal), get("/v1/audit", signal),
    ]);
    const at = performance.now() / 1000;
    const speed = last && server.frames >= last.frames ? (server.frames - last.frames) / (at - last.at) : null;
    const batch = last && server.batches > last.batches ? (server.frames - last.frames) / (server.batches - last.batches) : null;
    last = { frames: server.frames, batches: server.batches, at };
    facts.replaceChildren(
      fact("State", server.ready ? "ready" : "not ready"), fact("Version", server.version), fact("Up", duration(server.uptime_s)),
      fact("Frames/s", speed === null ? "–" : speed.toFixed(1)), fact("Frames a batch", batch === null ? "–" : batch.toFixed(1)),
      fact("Queue", `${count(server.queue_frames)} of ${count(server.queue_limit)}`), fact("Frames", count(server.frames)),
      fact("Dropped", count(server.dropped)), fact("Streams", count(server.streams)), fact("Sessions", count(server.sessions)),
    );
    models.show(served, (model) => model.name);
    await canary.look(served, signal);
    audit.show(lines, (line) => JSON.stringify([line.unix_s, line.target, line.action]));
    try {
      sinks.show(await get("/v1/sinks", signal), (sink) => sink.name);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 404) throw error;
    }
    fine();
  }

  return poll(2, look, complain);
}

// A model's bundle, and what is wrong with its folder.
function bundleOf(model) {
  const id = element("code", { title: model.bundle_id }, model.bundle_id.slice(7, 19));
  return model.problem ? element("span", {}, id, element("span", { class: "bad" }, ` ${model.problem}`)) : id;
}

// A sink's last error, how long ago it was, and whether it has delivered since.
function trouble(sink) {
  if (!sink.last_error) return "–";
  const over = !sink.failing && sink.last_delivered_at > sink.last_error_at;
  const ago = duration(Math.max(0, Date.now() / 1000 - sink.last_error_at));
  return element("span", { class: over ? "quiet" : "bad" }, `${sink.last_error} (${ago} ago${over ? "; delivers again" : ""})`);
}

// What a sink will never deliver, with the reasons.
function lost(sink) {
  const reasons = Object.entries({ ...sink.dropped, refused: sink.refused }).filter(([, number]) => number);
  if (!reasons.length) return "0";
  const text = reasons.map(([reason, number]) => `${count(number)} (${reason})`).join(", ");
  return element("span", { class: "bad" }, text);
}
