// The ladder as a picture: payload bytes (logarithmic) against accuracy, and where clients stand.

import { drawn, percent } from "./dom.js";

const WIDTH = 720;
const HEIGHT = 360;
const EDGE = { left: 56, right: 16, top: 14, bottom: 42 };

// points: as the API gives them; standing: number of clients by point; choose: called with a point's id.
export function ladderPicture(model, standing, chosen, choose) {
  const points = model.points;
  const bytes = points.map((point) => point.payload_bytes);
  const accuracy = [...points.map((point) => point.accuracy), model.uncompressed_accuracy];
  const [low, high] = [Math.log(Math.min(...bytes) * 0.85), Math.log(Math.max(...bytes) * 1.15)];
  const span = Math.max(0.01, Math.max(...accuracy) - Math.min(...accuracy));
  const [bottom, top] = [Math.min(...accuracy) - 0.08 * span, Math.max(...accuracy) + 0.08 * span];
  const x = (value) => EDGE.left + ((Math.log(value) - low) / (high - low)) * (WIDTH - EDGE.left - EDGE.right);
  const y = (value) => HEIGHT - EDGE.bottom - ((value - bottom) / (top - bottom)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const picture = drawn("svg", { class: "ladder", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": `Operating points of ${model.name}: payload bytes against accuracy` });
  for (const value of ticks(Math.exp(low), Math.exp(high))) {
    picture.append(
      drawn("line", { class: "grid", x1: x(value), x2: x(value), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
      label(x(value), HEIGHT - EDGE.bottom + 16, String(value), "middle"),
    );
  }
  for (const value of shares(bottom, top)) {
    picture.append(
      drawn("line", { class: "grid", x1: EDGE.left, x2: WIDTH - EDGE.right, y1: y(value), y2: y(value) }),
      label(EDGE.left - 8, y(value) + 4, percent(value, 0), "end"),
    );
  }
  const whole = y(model.uncompressed_accuracy);
  picture.append(
    drawn("line", { x1: EDGE.left, x2: WIDTH - EDGE.right, y1: whole, y2: whole, stroke: "currentColor", "stroke-dasharray": "5 4" }),
    label(WIDTH - EDGE.right, whole - 5, "without compression", "end"),
    label((EDGE.left + WIDTH - EDGE.right) / 2, HEIGHT - 8, "payload, bytes a frame", "middle"),
  );
  const most = Math.max(1, ...standing.values());
  for (const point of points) {
    const here = standing.get(point.id) ?? 0;
    const clients = here === 0 ? "" : `, ${here} ${here === 1 ? "client" : "clients"}`;
    const text = `${point.id}: ${Math.round(point.payload_bytes)} bytes, ${percent(point.accuracy)}${clients}`;
    const link = drawn("a", { href: "#rates", role: "button", "aria-label": `Choose ${text}`, "aria-pressed": String(point.id === chosen) });
    link.addEventListener("click", (event) => { event.preventDefault(); choose(point.id); });
    const title = drawn("title");
    title.textContent = text;
    link.append(title);
    if (here) link.append(drawn("circle", { class: "here", cx: x(point.payload_bytes), cy: y(point.accuracy), r: 8 + 12 * Math.sqrt(here / most) }));
    link.append(drawn("circle", { class: `dot ${point.split}`, cx: x(point.payload_bytes), cy: y(point.accuracy), r: point.id === chosen ? 8 : 5 }));
    picture.append(link);
  }
  return picture;
}

function label(x, y, text, anchor) {
  const made = drawn("text", { x, y, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

// Round accuracies between two: whole steps of 1, 2, 5, 10 or 20 %, seven at most.
function shares(low, high) {
  const step = [1, 2, 5, 10, 20].find((each) => Math.floor((100 * high) / each) - Math.ceil((100 * low) / each) < 7) ?? 20;
  const found = [];
  for (let value = Math.ceil((100 * low) / step) * step; value <= 100 * high; value += step) found.push(value / 100);
  return found;
}

function ticks(low, high) {
  const found = [];
  for (let decade = 1; decade <= high; decade *= 10) {
    for (const part of [1, 2, 5]) if (decade * part >= low && decade * part <= high) found.push(decade * part);
  }
  return found;
}
