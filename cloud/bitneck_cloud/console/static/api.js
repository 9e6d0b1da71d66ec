// Calls of the control API. The token lives in this tab only, and never in an address.

const KEY = "bitneck-token";

export class ApiError extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

export function token() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function keepToken(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

function headers(more = {}) {
  const given = token();
  return { "X-Bitneck-Request": "1", ...(given ? { Authorization: `Bearer ${given}` } : {}), ...more };
}

async function answered(response) {
  if (response.ok) return response;
  let text = `${response.status} ${response.statusText}`;
  try {
    text = (await response.json()).detail ?? text;
  } catch {
    // no problem document: the status says enough
  }
  throw new ApiError(response.status, text);
}

async function call(path, init = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...init });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "the server does not answer");
  }
  return answered(response);
}

export async function get(path, signal) {
  return (await call(path, { headers: headers(), signal })).json();
}

export async function send(method, path, value) {
  const body = value === undefined ? undefined : JSON.stringify(value);
  const more = value === undefined ? {} : { "Content-Type": "application/json" };
  const response = await call(path, { method, headers: headers(more), body });
  return response.status === 204 ? null : response.json();
}

export async function sendFile(path, file, signal) {
  const more = { "Content-Type": file.type || "application/octet-stream" };
  return (await call(path, { method: "POST", headers: headers(more), body: file, signal })).json();
}

// Server-sent events over fetch, which can carry a token where EventSource cannot.
export async function events(path, lastId, signal, take) {
  const more = { Accept: "text/event-stream", ...(lastId ? { "Last-Event-ID": lastId } : {}) };
  const response = await call(path, { headers: headers(more), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    let end;
    while ((end = rest.indexOf("\n\n")) >= 0) {
      const event = { id: "", kind: "message", data: [] };
      for (const line of rest.slice(0, end).split("\n")) {
        const colon = line.indexOf(":");
        if (colon === 0) continue;
        const [name, text] = colon < 0 ? [line, ""] : [line.slice(0, colon), line.slice(colon + 1).replace(/^ /, "")];
        if (name === "id") event.id = text;
        else if (name === "event") event.kind = text;
        else if (name === "data") event.data.push(text);
      }
      rest = rest.slice(end + 2);
      if (event.data.length) take(event.kind, event.data.join("\n"), event.id);
    }
  }
}
