// Answers, live: server-sent events, filtered by the server; counts over the last ten minutes.

import { ApiError, events } from "./api.js";
import { Table, count, element, field, percent } from "./dom.js";

const KEPT = 100;
const WINDOW_S = 600;
const SHOW_EVERY_MS = 500;

export function answersPage(main, { complain, fine }) {
  const client = element("input", { placeholder: "all", spellcheck: "false", autocapitalize: "none" });
  const classes = element("input", { placeholder: "all" });
  const score = element("input", { type: "number", min: "0", max: "1", step: "0.05", value: "0" });
  const maps = element("input", { type: "checkbox" });
  const pause = element("button", { type: "button", "aria-pressed": "false", onclick: toggle }, "Pause");
  const state = element("p", { class: "quiet", role: "status" });
  const counted = element("ul", { class: "bars" });
  const figure = element("figure", { hidden: true });
  const table = new Table("Newest answers", [
    { name: "Received", value: (answer) => new Date(answer.received).toLocaleTimeString() },
    { name: "Client", kind: "name", value: (answer) => answer.client || "(no name)" },
    { name: "Model", kind: "name", value: (answer) => answer.model },
    { name: "Answer", kind: "name", value: (answer) => best(answer)?.name ?? "–" },
    { name: "Score or share", kind: "number", value: (answer) => percent(value(best(answer))) },
    { name: "Point", value: (answer) => answer.point },
    { name: "Payload bytes", kind: "number", value: (answer) => count(answer.payload_bytes) },
    { name: "In the cloud, ms", kind: "number", value: (answer) => (answer.ms.queued + answer.ms.decode + answer.ms.compute).toFixed(1) },
  ]);
  main.append(
    element("form", { class: "row", onsubmit: (event) => { event.preventDefault(); begin(); } },
      field("Client (name or pattern)", client), field("Class (name or index)", classes), field("Least score", score),
      element("label", { class: "inline" }, maps, "class maps"), element("button", { class: "main" }, "Apply"), pause),
    state,
    element("div", { class: "side" },
      element("section", { class: "card", "aria-labelledby": "counts" }, element("h2", { id: "counts" }, "Classes since this page was opened, of ten minutes at most"), counted),
      figure),
    element("h2", {}, "Live"), table.element,
  );
  let stream = null;
  let kept = [];
  let seen = [];
  let lastId = "";
  let missed = 0;
  let paused = false;
  let stale = true;

  function best(answer) {
    return (answer.labels ?? answer.shares ?? [])[0];
  }

  function value(found) {
    return found ? found.score ?? found.share : null;
  }

  function toggle() {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Pause";
    stale = true;
  }

  function take(kind, data, id) {
    if (id) lastId = id;
    const document_ = JSON.parse(data);
    if (kind === "missed") missed += document_.count ?? 1;
    if (kind === "end") throw new ApiError(503, document_.reason);
    if (kind !== "answer") return;
    const found = best(document_);
    seen.push({ at: Date.now(), name: found ? found.name : "–" });
    kept.unshift({ ...document_, key: id });
    kept.length = Math.min(kept.length, KEPT);
    stale = true;
  }

  async function begin() {
    stream?.abort();
    const mine = stream = new AbortController();
    kept = [];
    seen = [];
    lastId = "";
    missed = 0;
    stale = true;
    const query = new URLSearchParams();
    if (client.value.trim()) query.append("client", client.value.trim());
    if (classes.value.trim()) query.append("class", classes.value.trim());
    if (Number(score.value) > 0) query.append("min_score", score.value);
    if (maps.checked) query.append("map", "png");
    while (!mine.signal.aborted) {
      try {
        await events(`/v1/answers?${query}`, lastId, mine.signal, (...event) => { fine(); take(...event); });
      } catch (error) {
        if (mine.signal.aborted) return;
        complain(error);
        if (error instanceof ApiError && error.status >= 400 && error.status < 500) return;
      }
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }

  function show() {
    const since = Date.now() - 1000 * WINDOW_S;
    const first = seen.findIndex((each) => each.at >= since);
    if (first !== 0) seen = first < 0 ? [] : seen.slice(first);
    if (!stale || paused || document.hidden) return;
    stale = false;
    table.show(kept, (answer) => answer.key);
    const counts = new Map();
    for (const each of seen) counts.set(each.name, (counts.get(each.name) ?? 0) + 1);
    const most = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 12);
    counted.replaceChildren(...most.map(([name, number]) => element("li", {}, element("span", {}, name),
      element("meter", { min: "0", max: String(most[0][1]), value: String(number), "aria-label": `${name}: ${number}` }), element("span", {}, count(number)))));
    if (!most.length) counted.replaceChildren(element("li", { class: "quiet" }, "none yet"));
    state.textContent = `${count(seen.length)} answers since this page was opened, of ten minutes at most${missed ? `; ${count(missed)} were missed, because they came faster than they are kept` : ""}.`;
    const mapped = kept.find((answer) => answer.map);
    figure.hidden = !mapped;
    if (mapped) {
      const text = `Class map of ${mapped.client || "a client"}: ${(mapped.shares ?? []).slice(0, 3).map((each) => `${each.name} ${percent(each.share, 0)}`).join(", ")}`;
      figure.replaceChildren(element("img", { class: "map", alt: text, src: `data:image/png;base64,${mapped.map.data}` }), element("figcaption", {}, text));
    }
  }

  begin();
  const timer = setInterval(show, SHOW_EVERY_MS);
  return () => {
    stream?.abort();
    clearInterval(timer);
  };
}
