// Fleet: every client that is here or was, with what its newest session does now.

import { get } from "./api.js";
import { Table, count, duration, element, field } from "./dom.js";
import { poll } from "./poll.js";

const EVERY_S = 2;
const FADING_S = 10;

export function fleetPage(main, { complain, fine }) {
  const search = element("input", { type: "search", autocomplete: "off", oninput: show });
  const state = element(
    "select", { onchange: show },
    element("option", { value: "" }, "all"),
    element("option", { value: "here" }, "connected"),
    element("option", { value: "gone" }, "gone"),
    element("option", { value: "faults" }, "with faults"),
  );
  const found = element("span", { class: "quiet", role: "status" });
  const table = new Table("Clients", [
    { name: "Client", value: (row) => row.client || "(no name)" },
    { name: "State", value: (row) => element("span", { class: row.connected ? "good" : "quiet" }, row.connected ? "connected" : "gone") },
    { name: "Last seen", value: (row) => row.connected ? "now" : `${duration(row.ago)} ago` },
    { name: "Model", kind: "name", value: (row) => row.model },
    { name: "Point", value: (row) => row.point },
    { name: "Frames/s", kind: "number", value: (row) => row.rate === null ? "–" : row.rate.toFixed(1) },
    { name: "Latency ms", kind: "number", value: (row) => row.latency === null ? "–" : row.latency.toFixed(0) },
    { name: "Link up B/s", kind: "number", value: (row) => count(row.up) },
    { name: "Link down B/s", kind: "number", value: (row) => count(row.down) },
    { name: "Answered", kind: "number", value: (row) => count(row.frames) },
    { name: "In flight", kind: "number", value: (row) => count(row.inFlight) },
    { name: "Faults", kind: "number", value: (row) => row.faults ? element("span", { class: "bad" }, count(row.faults)) : "0" },
  ]);
  main.append(
    element("form", { class: "row", role: "search", onsubmit: (event) => event.preventDefault() }, field("Search name, model or point", search), field("Show", state), found),
    table.element,
  );
  let rows = [];
  let total = 0; // with those that the server did not list
  const before = new Map();

  // Bytes a second between two looks at a client, smoothed; null until they have moved, or have not for FADING_S.
  function speed(key, up, down, at) {
    const last = before.get(key);
    let rates = { up: null, down: null };
    const first = last?.first ?? { up, down, at };
    if (last && at > last.at && up >= last.up && down >= last.down) {
      const weight = Math.min(1, (at - last.at) / FADING_S);
      const mixed = (name, now, then) => {
        if (now === first[name] && at - first.at < FADING_S) return null;
        const value = (now - then) / (at - last.at);
        return last.rates[name] === null ? value : last.rates[name] + weight * (value - last.rates[name]);
      };
      rates = { up: mixed("up", up, last.up), down: mixed("down", down, last.down) };
    }
    before.set(key, { up, down, at, rates, first });
    return rates;
  }

  function show() {
    const text = search.value.trim().toLowerCase();
    const shown = rows.filter((row) =>
      (!text || [row.client, row.model, row.point ?? ""].some((part) => part.toLowerCase().includes(text)))
      && (!state.value || (state.value === "here" && row.connected) || (state.value === "gone" && !row.connected)
        || (state.value === "faults" && row.faults > 0)));
    const parts = [shown.length, rows.length, total].filter((number, k, all) => k === 0 || number !== all[k - 1]);
    const line = `${parts.map(count).join(" of ")} clients`; // found, listed, and all
    if (found.textContent !== line) found.textContent = line;
    table.show(shown, (row) => row.key);
  }

  return poll(EVERY_S, async (signal) => {
    const [clients, sessions] = await Promise.all([get("/v1/clients", signal), get("/v1/sessions", signal)]);
    const newest = new Map();
    for (const session of sessions) {
      const key = JSON.stringify([session.client, session.model]);
      const known = newest.get(key) ?? { rate: null, inFlight: 0, latency: null };
      if (session.connected) {
        known.rate = (known.rate ?? 0) + (session.frames_per_s ?? 0);
        known.inFlight += session.frames_in_flight;
        known.latency = session.device?.answer_ms || known.latency; // of devices that report
      }
      newest.set(key, known);
    }
    total = clients.total;
    const at = performance.now() / 1000;
    const keys = new Set();
    rows = clients.clients.map((client) => {
      const key = JSON.stringify([client.client, client.model]);
      keys.add(key);
      const live = newest.get(key);
      const { up, down } = speed(key, client.link_bytes_up, client.link_bytes_down, at);
      return {
        ...client, key, up: client.connected ? up : null, down: client.connected ? down : null,
        rate: client.connected && live ? live.rate : null, inFlight: client.connected && live ? live.inFlight : null,
        latency: client.connected && live ? live.latency : null, ago: (Date.now() - Date.parse(client.last_seen)) / 1000,
      };
    });
    for (const key of before.keys()) if (!keys.has(key)) before.delete(key);
    rows.sort((a, b) => Number(b.connected) - Number(a.connected) || a.client.localeCompare(b.client) || a.model.localeCompare(b.model));
    fine();
    show();
  }, complain);
}
