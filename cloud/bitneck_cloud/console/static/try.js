// Try: one photograph at every operating point, beside JPEG of the same size.

import { get, sendFile } from "./api.js";
import { Table, count, element, field, options, percent } from "./dom.js";

export function tryPage(main, { operate, complain, fine }) {
  const model = element("select");
  const file = element("input", { type: "file", accept: "image/*", onchange: () => file.files[0] && tried(file.files[0]) });
  const drop = element(
    "div", { class: "drop" }, element("p", {}, "Drop a photograph here, or"), field("choose a file", file),
    element("p", { class: "quiet" }, "It is computed on this server and not kept."),
  );
  const state = element("p", { role: "status" });
  const shown = element("div");
  main.append(element("div", { class: "row" }, field("Model", model)), drop, state, shown);
  let ending = null;
  drop.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files[0]) tried(event.dataTransfer.files[0]);
  });

  function off(reason) {
    file.disabled = true;
    state.textContent = reason;
  }

  Promise.all([get("/v1/models"), get("/v1/server")]).then(([models, server]) => {
    options(model, models.map((each) => [each.name, each.name]), models[0]?.name);
    if (!server.try_photos) off("Photographs cannot be tried on this server; its operator can allow it with --try-photos.");
    else if (!operate) off("Trying photographs needs a token of the role operate.");
  }).catch(complain);

  async function tried(chosen) {
    if (file.disabled) return;
    ending?.abort();
    ending = new AbortController();
    state.textContent = "Computing every operating point…";
    state.className = "quiet";
    try {
      const trial = await sendFile(`/v1/models/${encodeURIComponent(model.value)}/try`, chosen, ending.signal);
      fine();
      state.textContent = "";
      show(trial);
    } catch (error) {
      if (error.name === "AbortError") return;
      state.textContent = error.message;
      state.className = "bad";
    }
  }

  function show(trial) {
    const points = [...trial.points].sort((a, b) => a.payload_bytes - b.payload_bytes);
    const slider = element("input", { type: "range", min: "0", max: String(points.length - 1), value: String(Math.floor(points.length / 2)), oninput: move });
    const ours = element("figure", { class: "card" });
    const jpeg = element("figure", { class: "card" });
    const whole = element("figure", { class: "card" }, caption("Without compression", trial.uncompressed, false),
      element("img", { src: `data:image/jpeg;base64,${trial.picture}`, alt: "what the network sees" }), ...mapOf(trial.uncompressed), list(trial.uncompressed));
    const table = new Table("Every point", [
      { name: "Point", value: (point) => point.id },
      { name: "Split", value: (point) => point.split },
      { name: "Payload bytes", kind: "number", value: (point) => count(point.payload_bytes) },
      { name: "Answer", value: (point) => point.answer.labels[0]?.name },
      { name: "Agreement", kind: "number", value: (point) => percent(point.answer.agreement, 0) },
      { name: "JPEG bytes", kind: "number", value: (point) => count(trial.jpegs[point.jpeg].bytes) },
      { name: "JPEG's answer", value: (point) => trial.jpegs[point.jpeg].answer.labels[0]?.name },
    ]);
    table.show(points, (point) => point.id);
    function move() {
      const point = points[Number(slider.value)];
      const other = trial.jpegs[point.jpeg];
      slider.setAttribute("aria-valuetext", `${point.id}, ${point.payload_bytes} bytes`);
      ours.replaceChildren(caption(`${point.id}: ${count(point.payload_bytes)} bytes`, point.answer), ...mapOf(point.answer), list(point.answer));
      const larger = other.bytes > point.payload_bytes ? `the smallest JPEG, ${count(other.bytes)} bytes` : `${count(other.bytes)} bytes of JPEG`;
      jpeg.replaceChildren(caption(larger[0].toUpperCase() + larger.slice(1), other.answer),
        element("img", { src: `data:image/jpeg;base64,${other.picture}`, alt: "the picture that this JPEG gives" }), ...mapOf(other.answer), list(other.answer));
    }
    move();
    shown.replaceChildren(field("Rate", slider), element("div", { class: "side" }, ours, jpeg, whole), element("h2", {}, "All points"), table.element);
  }

  function caption(text, answer, compared = true) {
    const made = element("figcaption", {}, element("strong", {}, text));
    if (compared) {
      const parts = answer.map ? `${percent(answer.agreement, 0)} of the pixels as without compression` : "another answer than without compression";
      const same = answer.agreement === 1 ? "the same answer as without compression" : parts;
      made.append(element("br"), element("span", { class: answer.agreement === 1 ? "good" : "quiet" }, same));
    }
    return made;
  }

  function mapOf(answer) {
    return answer.map ? [element("img", { class: "map", src: `data:image/png;base64,${answer.map}`, alt: `class map: ${answer.labels.slice(0, 3).map((label) => label.name).join(", ")}` })] : [];
  }

  function list(answer) {
    return element("ul", { class: "bars" }, ...answer.labels.slice(0, 5).map((label) => element("li", {}, element("span", {}, label.name),
      element("meter", { min: "0", max: "1", value: String(label.score), "aria-label": `${label.name}: ${percent(label.score)}` }), element("span", {}, percent(label.score, 0)))));
  }

  return () => ending?.abort();
}
