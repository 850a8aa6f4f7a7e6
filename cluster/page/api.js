// Requests to the server that sent this page, and the API key that they may need.

const KEY = "qwen-on-ray-key";
const form = document.getElementById("key-form");
const field = document.getElementById("key");

/** An answer that is no success; its message is fit for a person. */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

/**
 * Fetch from the server, with the key if there is one.
 *
 * Paths are relative, because an application may be served below a route prefix.
 */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const isLate = error.name === "TimeoutError";
    throw new ServerError(isLate ? "The server did not answer in time." : "The server cannot be reached.", 0);
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  throw new ServerError(await describe(response), response.status);
}

/** Call `act` when a key was given. */
export function onKey(act) {
  document.addEventListener("key-given", act);
}

function askForKey() {
  if (!form.hidden) return;
  form.hidden = false;
  if (document.activeElement === document.body) field.focus();
}

async function describe(response) {
  if (response.status === 401) {
    return sessionStorage.getItem(KEY) ? "The server does not know this API key." : "The server wants an API key.";
  }
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, field.value.trim());
  field.value = "";
  form.hidden = true;
  document.dispatchEvent(new Event("key-given"));
});
