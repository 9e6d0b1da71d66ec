// Signing in, and which page is shown. Each page is a function that fills <main> and returns how to leave it.

import { ApiError, get, keepToken, token } from "./api.js";
import { element, field, say } from "./dom.js";
import { answersPage } from "./answers.js";
import { fleetPage } from "./fleet.js";
import { ratesPage } from "./rates.js";
import { serverPage } from "./server.js";
import { tryPage } from "./try.js";

const PAGES = { fleet: fleetPage, rates: ratesPage, answers: answersPage, try: tryPage, server: serverPage };
const main = document.getElementById("main");
const who = document.getElementById("who");
const signOut = document.getElementById("sign-out");
const trouble = document.getElementById("trouble");
let leave = () => {};
let me = null;

function complain(error) {
  if (error.name === "AbortError") return;
  if (error instanceof ApiError && error.status === 401) {
    signIn(token() ? "This token is not valid any more." : "");
    return;
  }
  trouble.textContent = error.message;
  trouble.hidden = false;
}

function fine() {
  trouble.hidden = true;
}

function signIn(reason) {
  leave();
  leave = () => {};
  me = null;
  keepToken("");
  who.textContent = "";
  signOut.hidden = true;
  const input = element("input", { type: "password", name: "token", autocomplete: "current-password", required: true });
  const wrong = element("p", { class: "bad", role: "alert" }, reason);
  const form = element(
    "form", { class: "card", onsubmit: (event) => { event.preventDefault(); begin(input.value.trim(), wrong); } },
    element("h1", {}, "Sign in"),
    element("p", {}, "With a token of the role read or operate; the server's operator has it."),
    wrong,
    element("div", { class: "row" }, field("Token", input), element("button", { class: "main" }, "Sign in")),
  );
  main.replaceChildren(form);
  input.focus();
}

async function begin(given, wrong) {
  keepToken(given);
  try {
    me = await get("/v1/whoami");
  } catch (error) {
    if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
      keepToken("");
      if (wrong) wrong.textContent = error.status === 401 ? "The server does not know this token." : error.message;
      else signIn("");
      return;
    }
    complain(error);
    return;
  }
  fine();
  who.textContent = me.token_needed ? `${me.role}${me.name ? ` ${me.name}` : ""}` : "no token needed";
  signOut.hidden = !me.token_needed;
  show();
}

function show() {
  if (!me) return;
  const name = location.hash.slice(1).split("/")[0];
  const page = Object.hasOwn(PAGES, name) ? name : "fleet";
  for (const link of document.querySelectorAll('nav a[href^="#"]')) {
    if (link.getAttribute("href") === `#${page}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  leave();
  fine();
  const heading = document.querySelector(`nav a[href="#${page}"]`).textContent;
  document.title = `${heading} – bitneck console`;
  main.replaceChildren(element("h1", {}, heading));
  leave = PAGES[page](main, { operate: me.role === "operate", complain, fine }) ?? (() => {});
  say(`${heading} page`);
}

signOut.addEventListener("click", () => signIn(""));
addEventListener("hashchange", () => { show(); main.focus(); });
begin(token(), null);
