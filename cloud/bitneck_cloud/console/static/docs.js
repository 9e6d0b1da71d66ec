// The description of the API, with the token that the console keeps in this tab.

import { get, token } from "./api.js";

const state = document.getElementById("state");
try {
  const spec = await get("/openapi.json");
  window.SwaggerUIBundle({
    dom_id: "#api",
    spec,
    validatorUrl: null,
    requestInterceptor: (request) => {
      if (token()) request.headers.Authorization ??= `Bearer ${token()}`;
      request.headers["X-Bitneck-Request"] = "1";
      return request;
    },
  });
  state.hidden = true;
} catch (error) {
  state.textContent = error.status === 401 ? "Sign in to the console first (/console/), in this tab." : error.message;
}
