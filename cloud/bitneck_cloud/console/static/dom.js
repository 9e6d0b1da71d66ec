// Elements from values. Text only ever becomes text, so what a client or a server says can never become markup.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key in made && typeof value !== "string") made[key] = value;
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export function field(label, input) {
  return element("label", {}, label, input);
}

export function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => element("option", { value, selected: value === chosen }, text)));
}

export function say(text) {
  document.getElementById("said").textContent = text;
}

// A table whose rows keep their elements: an update writes only the cells that changed.
export class Table {
  constructor(caption, columns, { onrow = null } = {}) {
    this.columns = columns;
    this.onrow = onrow;
    this.rows = new Map();
    this.body = element("tbody");
    this.caption = element("caption", {}, caption);
    const heads = columns.map((column) => element("th", { scope: "col", class: column.kind ?? "" }, column.name));
    const table = element("table", {}, this.caption, element("thead", {}, element("tr", {}, ...heads)), this.body);
    this.element = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table);
  }

  // Show these items, in order. `key` names an item for its whole life.
  show(items, key) {
    const wanted = new Set();
    let place = this.body.firstElementChild;
    for (const item of items) {
      const name = key(item);
      wanted.add(name);
      let row = this.rows.get(name);
      if (!row) {
        row = element("tr");
        this.columns.forEach((column, k) => {
          row.append(element(k === 0 ? "th" : "td", k === 0 ? { scope: "row" } : { class: column.kind ?? "" }));
        });
        this.rows.set(name, row);
      }
      this.columns.forEach((column, k) => write(row.children[k], column.value(item)));
      if (row === place) place = place.nextElementSibling;
      else this.body.insertBefore(row, place);
    }
    for (const [name, row] of this.rows) {
      if (!wanted.has(name)) {
        row.remove();
        this.rows.delete(name);
      }
    }
  }
}

function write(cell, value) {
  if (value instanceof Node) {
    const same = cell.firstChild && cell.childNodes.length === 1 && cell.firstChild.isEqualNode(value);
    if (!same) cell.replaceChildren(value);
    return;
  }
  const text = value === null || value === undefined ? "–" : String(value);
  if (cell.textContent !== text) cell.textContent = text;
}

const GROUPED = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

export function count(value) {
  return value === null || value === undefined ? "–" : GROUPED.format(value);
}

export function percent(value, digits = 1) {
  return value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}
