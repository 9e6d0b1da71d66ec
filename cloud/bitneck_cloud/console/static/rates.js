// Rates: the ladder, the rules that give sessions their rates, and what changed when and by whom.

import { get, send } from "./api.js";
import { Table, count, element, field, options, percent, say } from "./dom.js";
import { ladderPicture } from "./ladder.js";
import { poll } from "./poll.js";

const FORMS = [
  ["point", "this point"],
  ["max_bytes_per_frame", "at most so many payload bytes a frame"],
  ["max_kbps", "at most so many kbit/s on the link"],
  ["min_accuracy", "at least this accuracy, %"],
  ["auto", "the client chooses"],
];

export function policyText(policy) {
  if (!policy) return "the client chooses";
  const [[form, value]] = Object.entries(policy);
  if (form === "point") return `point ${value}`;
  if (form === "max_bytes_per_frame") return `at most ${value} payload bytes a frame`;
  if (form === "max_kbps") return `at most ${value} kbit/s`;
  if (form === "min_accuracy") return `accuracy of at least ${percent(value)}`;
  return "the client chooses";
}

export function ratesPage(main, { operate, complain, fine }) {
  let models = [];
  let sessions = [];
  let chosen = "";
  let drawnFor = "";
  const model = element("select", { onchange: () => { chosen = ""; draw(); } });
  const picture = element("div", { class: "card" });
  const legend = element("ul", { class: "legend", "aria-label": "Split points" });
  const points = new Table("Operating points", [
    { name: "Point", value: (point) => point.id },
    { name: "Split", value: (point) => point.split },
    { name: "Payload bytes", kind: "number", value: (point) => count(point.payload_bytes) },
    { name: "Accuracy", kind: "number", value: (point) => percent(point.accuracy) },
    { name: "Clients", kind: "number", value: (point) => count(point.here) },
  ]);

  const whom = element("select", { onchange: adapt });
  const pattern = element("input", { value: "*", maxlength: "128", spellcheck: "false", autocapitalize: "none" });
  const session = element("select");
  const form = element("select", { onchange: adapt }, ...FORMS.map(([value, text]) => element("option", { value }, text)));
  const point = element("select", { onchange: () => { chosen = point.value; draw(); } });
  const number = element("input", { type: "number", min: "0", step: "any", required: true });
  const running = element("input", { type: "checkbox", checked: true });
  const result = element("p", { role: "status" });
  options(whom, [["pattern", "clients by name"], ["session", "one session"]], "pattern");
  const parts = {
    pattern: field("Names (* and ? stand for any characters)", pattern), session: field("Session", session),
    point: field("Point", point), number: field("Value", number),
    running: element("label", { class: "inline" }, running, "also sessions that run"),
  };
  const submit = element("button", { class: "main", disabled: !operate }, "Set the rate");
  const setting = element(
    "form", { class: "card", onsubmit: set }, element("h2", {}, "Set a rate"),
    element("div", { class: "row" }, field("For", whom), parts.pattern, parts.session, field("Rate", form), parts.point, parts.number, parts.running, submit),
    operate ? null : element("p", { class: "quiet" }, "Your token may read; changing rates needs one of the role operate."),
    result,
  );
  const note = element("p", { class: "quiet" });
  const rules = new Table("Rules, the one that counts first", [
    { name: "Clients", value: (rule) => rule.clients },
    { name: "Model", value: (rule) => rule.model },
    { name: "Rate", value: (rule) => policyText(rule.policy) },
    { name: "Since", value: (rule) => rule.since ? new Date(rule.since).toLocaleString() : "–" },
    { name: "By", value: (rule) => rule.by },
    { name: "", value: (rule) => removal(rule) },
  ]);
  const changes = new Table("Rules that were set or deleted", [
    { name: "When", value: (change) => new Date(change.at).toLocaleString() },
    { name: "Clients", value: (change) => change.clients },
    { name: "Model", value: (change) => change.model },
    { name: "Before", value: (change) => change.before ? policyText(change.before) : "no rule" },
    { name: "After", value: (change) => change.after ? policyText(change.after) : "no rule" },
    { name: "For", value: (change) => change.running ? "new and running sessions" : "new sessions" },
    { name: "By", value: (change) => change.who },
  ]);
  const more = element("details", {}, element("summary", {}, "The points as a table"), points.element);
  main.append(element("div", { class: "row" }, field("Model", model)), picture, legend, more, setting, element("h2", {}, "Rules"), note, rules.element, element("h2", {}, "Changes"), changes.element);
  let changeable = false;
  const removals = new Map();

  function removal(rule) {
    if (!operate || !changeable) return "";
    const key = JSON.stringify([rule.model, rule.clients]);
    if (!removals.has(key)) {
      removals.set(key, element("button", { type: "button", onclick: () => remove(rule), "aria-label": `Delete the rule for ${rule.clients} with ${rule.model}` }, "Delete"));
    }
    return removals.get(key);
  }

  async function remove(rule) {
    const query = new URLSearchParams({ clients: rule.clients, model: rule.model, running: "true" });
    try {
      await send("DELETE", `/v1/rate?${query}`);
      say(`The rule for ${rule.clients} is deleted.`);
      await look();
    } catch (error) {
      complain(error);
    }
  }

  function adapt() {
    parts.pattern.hidden = parts.running.hidden = whom.value !== "pattern";
    parts.session.hidden = whom.value !== "session";
    parts.point.hidden = form.value !== "point";
    parts.number.hidden = number.disabled = form.value === "point" || form.value === "auto";
    if (form.value === "min_accuracy") number.max = "100";
    else number.removeAttribute("max");
  }

  function current() {
    return models.find((each) => each.name === model.value);
  }

  function draw() {
    const shown = current();
    if (!shown) return;
    const standing = new Map();
    for (const each of sessions) {
      if (each.model === shown.name && each.connected && each.point_last_used) {
        standing.set(each.point_last_used, (standing.get(each.point_last_used) ?? 0) + 1);
      }
    }
    options(point, shown.points.map((each) => [each.id, `${each.id} (${Math.round(each.payload_bytes)} B, ${percent(each.accuracy)})`]), chosen || point.value);
    points.show(shown.points.map((each) => ({ ...each, here: standing.get(each.id) ?? 0 })), (each) => each.id);
    const now = JSON.stringify([shown.name, shown.bundle_id, chosen, [...standing]]);
    if (now === drawnFor) return;
    drawnFor = now;
    const held = picture.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    picture.replaceChildren(ladderPicture(shown, standing, chosen, (id) => { chosen = id; form.value = "point"; adapt(); draw(); say(`${id} is chosen.`); }));
    if (held) [...picture.querySelectorAll("a")].find((link) => link.getAttribute("aria-label") === held)?.focus();
    const splits = [...new Set(shown.points.map((each) => each.split))];
    legend.replaceChildren(...splits.map((split) => {
      const swatch = element("span", { class: `swatch back-${split}` });
      return element("li", {}, swatch, ` ${split}`);
    }), element("li", {}, "rings: connected sessions"));
  }

  async function set(event) {
    event.preventDefault();
    const values = { point: () => point.value, auto: () => true, min_accuracy: () => Number(number.value) / 100 };
    const rate = { [form.value]: (values[form.value] ?? (() => Number(number.value)))() };
    submit.disabled = true;
    try {
      if (whom.value === "session") {
        const done = await send("PUT", `/v1/sessions/${encodeURIComponent(session.value)}/rate`, rate);
        result.textContent = `Set: ${policyText(done.policy)}${done.point ? `, which is ${done.point}` : ""}. ${done.pushed ? "The client was told." : "The client learns it when it comes back."}`;
      } else {
        const done = await send("PUT", "/v1/rate", { ...rate, clients: pattern.value, model: model.value, running: running.checked });
        const told = done.running ? ` Running sessions: ${done.running.told} told, ${done.running.waiting} learn it later, ${done.running.overruled} have a more specific rule, ${done.running.unreachable} have no such point.` : "";
        result.textContent = `Set for new sessions of ${done.clients}: ${policyText(done.policy)}.${told}`;
      }
      result.className = "good";
      await look();
    } catch (error) {
      result.textContent = error.message;
      result.className = "bad";
    } finally {
      submit.disabled = !operate;
    }
  }

  async function look(signal) {
    const [served, open, rated, changed] = await Promise.all([
      get("/v1/models", signal), get("/v1/sessions", signal), get("/v1/rate", signal), get("/v1/rate/changes", signal),
    ]);
    models = served;
    sessions = open;
    changeable = rated.changeable;
    const names = served.map((each) => [each.name, each.name]);
    if (names.join() !== [...model.options].map((each) => [each.value, each.value]).join()) options(model, names, model.value);
    const here = open.filter((each) => each.connected && !each.spool).map((each) => [each.id, `${each.client || "(no name)"} – ${each.model} – ${each.id.slice(0, 8)}`]);
    if (here.join() !== [...session.options].map((each) => [each.value, each.textContent]).join()) options(session, here, session.value);
    note.textContent = `${rated.note}.`;
    rules.show(rated.rules, (rule) => JSON.stringify([rule.model, rule.clients, rule.since]));
    changes.show(changed, (change) => JSON.stringify([change.at, change.clients, change.model, change.after]));
    draw();
    fine();
  }

  adapt();
  return poll(3, look, complain);
}
