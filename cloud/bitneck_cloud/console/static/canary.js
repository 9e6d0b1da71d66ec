// A new bundle for some clients first: begin it, how it compares with the current one, give it to all or take it back.

import { ApiError, get, send } from "./api.js";
import { Table, count, element, field, options, percent } from "./dom.js";

const SHORT = [7, 19];
const STATES = {
  waiting: "waiting to begin", running: "under way", done: "done", ended: "ended before it was done", impossible: "impossible",
};

export function canaryPart({ operate, complain }) {
  let served = [];
  let asked = "";
  const model = element("select", { onchange: () => { asked = ""; look().catch(complain); } });
  const which = field("Model", model);
  const says = element("p", { class: "quiet" });
  const result = element("p", { role: "status" });
  const bundle = element("select", { required: true, onfocus: () => listing().catch(complain) });
  const clients = element("input", { required: true, maxlength: "128", spellcheck: "false", autocapitalize: "none", placeholder: "cam-1*" });
  const beginning = element("button", { class: "main" }, "Begin");
  const promoting = element("button", { type: "button", class: "main", onclick: () => change("POST", "/promote", promoted) }, "Give it to all clients");
  const ending = element("button", { type: "button", onclick: () => change("DELETE", "", ended) }, "Take it back");
  const form = element(
    "form", { class: "row", hidden: true, onsubmit: begin }, field("New bundle", bundle),
    field("Clients (* and ? stand for any characters, @ and a name for a group)", clients), beginning,
  );
  const running = element("div", { class: "row", hidden: true }, promoting, ending);
  const note = element("p", { hidden: true });
  const sides = new Table("Both bundles since the canary began", [
    { name: "", value: (row) => row.name },
    { name: "Current", kind: "half", value: (row) => row.current },
    { name: "Candidate", kind: "half", value: (row) => row.candidate },
  ]);
  const points = new Table("The same by operating point", [
    { name: "Point", value: (row) => row.id },
    { name: "Frames, current", kind: "number", value: (row) => count(row.current?.frames) },
    { name: "Frames, candidate", kind: "number", value: (row) => count(row.candidate?.frames) },
    { name: "Payload, current", kind: "number", value: (row) => bytes(row.current?.payload_bytes_mean) },
    { name: "Payload, candidate", kind: "number", value: (row) => bytes(row.candidate?.payload_bytes_mean) },
    { name: "Link, current", kind: "number", value: (row) => bytes(row.current?.link_bytes_mean) },
    { name: "Link, candidate", kind: "number", value: (row) => bytes(row.candidate?.link_bytes_mean) },
  ]);
  const photos = new Table("Both bundles on the same photographs", [
    { name: "Point", value: (row) => row.current === row.candidate ? row.current : `${row.current}, ${row.candidate}` },
    { name: "Photographs", kind: "number", value: (row) => count(row.photographs) },
    { name: "Same answer", kind: "number", value: (row) => percent(row.agreement) },
    { name: "As uncompressed, current", kind: "number", value: (row) => percent(row.current_agreement) },
    { name: "As uncompressed, candidate", kind: "number", value: (row) => percent(row.candidate_agreement) },
    { name: "Payload, current", kind: "number", value: (row) => bytes(row.current_payload_bytes) },
    { name: "Payload, candidate", kind: "number", value: (row) => bytes(row.candidate_payload_bytes) },
  ]);
  const photosState = element("p", { class: "quiet" });
  const tables = element("div", { hidden: true }, note, sides.element, points.element, photosState, photos.element);
  const whole = element(
    "section", { "aria-labelledby": "canary" }, element("h2", { id: "canary" }, "A new bundle for some clients first"),
    which, says, form, running, result, tables,
  );

  function path(more = "") {
    return `/v1/models/${encodeURIComponent(model.value)}/canary${more}`;
  }

  function told(done) {
    return `${count(done.told)} ${done.told === 1 ? "stream was" : "streams were"} told.`;
  }

  function promoted(done) {
    return `All clients get ${done.bundle_id.slice(...SHORT)} now. ${told(done)} Note: ${done.note}.`;
  }

  function ended(done) {
    return `All clients get ${done.bundle_id.slice(...SHORT)} again. ${told(done)}`;
  }

  async function change(method, more, text, body) {
    const busy = method === "DELETE" ? [beginning, promoting, ending] : [beginning, promoting];  // it takes their place
    for (const button of busy) button.disabled = true;
    result.className = "quiet";
    result.textContent = "One moment…";
    try {
      result.textContent = text(await send(method, path(more), body));
      result.className = "good";
      asked = "";
      await look();
    } catch (error) {
      result.textContent = error.message;
      result.className = "bad";
    } finally {
      for (const button of busy) button.disabled = false;
    }
  }

  function begin(event) {
    event.preventDefault();
    change("POST", "", (done) => `${done.canary.bundle} is loaded. ${told(done)}`, { bundle: bundle.value, clients: clients.value });
  }

  // The folder of candidates is read when the page is opened, and when somebody is about to choose.
  async function listing(signal) {
    asked = model.value;
    let found = [];
    let missing = "";
    try {
      found = await get(`/v1/models/${encodeURIComponent(model.value)}/candidates`, signal);
    } catch (error) {
      if (!(error instanceof ApiError) || ![409, 503].includes(error.status)) throw error;
      missing = error.message;
    }
    const values = found.filter((each) => !each.problem && !each.served)
      .map((each) => [each.bundle, `${each.bundle} (${each.bundle_id.slice(...SHORT)}, ${each.points} points)`]);
    if (values.join() !== [...bundle.options].map((each) => [each.value, each.textContent]).join()) options(bundle, values, bundle.value);
    bundle.disabled = beginning.disabled = !values.length;
    const broken = found.filter((each) => each.problem).map((each) => `${each.bundle}: ${each.problem}`);
    form.title = missing || broken.join("; ");
    return missing || (values.length ? "" : "There is no other bundle of this model among the candidates.");
  }

  let without = "";
  async function look(signal) {
    if (!model.value) return;
    const state = await get(path(), signal);
    const choice = state.canary;
    if (!choice && operate && asked !== model.value) without = await listing(signal);
    const origin = state.promoted ? `It was promoted on ${moment(state.promoted.since)} by ${state.promoted.by}. ` : "";
    const changing = state.changing ? ` Now: ${state.changing}.` : "";
    says.textContent = (choice
      ? `${choice.bundle} (${choice.bundle_id.slice(...SHORT)}) for ${choice.clients}, since ${moment(choice.since)}, by ${choice.by}. ${state.kept ? "Kept over restarts." : "A restart of this server ends it."}${state.problem ? ` Devices that do not have its bundle get the current one: ${state.problem}.` : ""}`
      : `All clients get ${state.bundle_id.slice(...SHORT)}. ${origin}${operate ? without : ""}`) + changing;
    form.hidden = Boolean(choice) || !operate;
    running.hidden = !operate || !(choice || state.changing.startsWith("canary "));
    promoting.hidden = !state.comparison;
    tables.hidden = !state.comparison;
    if (!state.comparison) return;
    const { current, candidate } = state.comparison;
    note.hidden = false;
    note.textContent = `Faults: ${state.comparison.note}.`;
    sides.show(rowsOf(current, candidate), (row) => row.name);
    const ids = [...new Set([...current.points, ...candidate.points].map((each) => each.id))].sort();
    const at = (group, id) => group.points.find((each) => each.id === id);
    points.show(ids.map((id) => ({ id, current: at(current, id), candidate: at(candidate, id) })), (row) => row.id);
    const compared = state.photographs;
    photos.element.hidden = !compared;
    photosState.textContent = compared
      ? `Photographs: ${STATES[compared.state] ?? compared.state}${compared.problem ? `: ${compared.problem}` : ""}; ${count(compared.done)} of ${count(compared.photographs)} compared${compared.unreadable ? `, ${count(compared.unreadable)} cannot be read` : ""}${compared.left_s === null ? "" : `, about ${count(Math.ceil(compared.left_s))} s left`}.`
      : "This server has no photographs to compare with (--canary-photos).";
    photos.show(compared?.points ?? [], (row) => `${row.current} ${row.candidate}`);
  }

  return {
    element: whole,
    look(models, signal) {
      served = models;
      const names = served.map((each) => [each.name, each.name]);
      if (names.join() !== [...model.options].map((each) => [each.value, each.value]).join()) options(model, names, model.value);
      which.hidden = names.length < 2;
      return look(signal);
    },
  };
}

function rowsOf(current, candidate) {
  const row = (name, value) => ({ name, current: value(current), candidate: value(candidate) });
  return [
    row("Bundle", (group) => group.bundle_id.slice(...SHORT)),
    row("Sessions", (group) => count(group.sessions)),
    row("Frames answered", (group) => count(group.frames)),
    row("Faults", (group) => `${count(group.faults)}${group.fault_interval ? `: ${percent(group.fault_share)} (${percent(group.fault_interval[0])} to ${percent(group.fault_interval[1])})` : ""}`),
    row("Payload bytes a frame", (group) => bytes(group.payload_bytes_mean)),
    row("Link bytes a frame, both ways", (group) => bytes(group.link_bytes_mean)),
    row("Best label's score", (group) => percent(group.best_score_mean)),
    row("Most frequent", (group) => group.labels.map((each) => `${each.name} ${percent(each.share)}`).join(", ") || "–"),
  ];
}

function bytes(value) {
  return value === null || value === undefined ? "–" : value.toFixed(1);
}

function moment(text) {
  return new Date(text).toLocaleString();
}
