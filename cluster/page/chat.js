// The chat box: one conversation, kept in this tab, answered by v1/chat/completions as it comes.

import { answerEvents } from "./answer.js";
import { onKey, request } from "./api.js";
import { element } from "./chart.js";

const form = document.getElementById("chat-form");
const log = document.getElementById("messages");
const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
const clear = document.getElementById("clear");
const model = document.getElementById("model");
const temperature = document.getElementById("temperature");
const maxTokens = document.getElementById("max-tokens");
const empty = log.firstElementChild;

const RETRY_MS = 3000;
const MAX_TOKENS = 1024;

let conversation = [];
let underWay = null;

async function listModels() {
  try {
    const models = await (await request("v1/models")).json();
    model.replaceChildren(...models.data.map((card) => new Option(card.id, card.id)));
    const contextLength = models.data[0]?.max_model_len;
    // Known only once an engine was ready; a short context needs room for the conversation.
    if (contextLength === null) setTimeout(listModels, RETRY_MS);
    else maxTokens.defaultValue = Math.min(MAX_TOKENS, Math.floor(contextLength / 2));
  } catch (error) {
    // Without a key, the one that is given asks again.
    if (error.status !== 401) setTimeout(listModels, RETRY_MS);
  }
}

async function ask(text) {
  const asked = { role: "user", content: text };
  show("user", "You").textContent = text;
  const answer = show("assistant", model.value);
  const message = answer.parentElement;
  const note = element("p", "note", "Waiting for the first token …");
  message.append(note);
  message.setAttribute("aria-busy", "true");
  underWay = new AbortController();
  setBusy(true);
  const counts = new Counts();
  const said = answer.appendChild(document.createTextNode(""));
  const follow = follower();
  let outcome = "";
  try {
    const onBreak = () => (note.textContent = "The connection broke; going on …");
    for await (const event of answerEvents(body([...conversation, asked]), underWay.signal, onBreak)) {
      counts.take(event);
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        said.appendData(piece);
        note.textContent = counts.describe();
        follow();
      }
      if (event.choices?.[0]?.finish_reason === "length") outcome = "Max tokens reached.";
    }
  } catch (error) {
    outcome = error.name === "AbortError" ? "Stopped." : error.message;
    if (error.name !== "AbortError") message.classList.add("failed");
  }
  // What was not answered is not part of the conversation, and may be sent again.
  if (said.data) conversation.push(asked, { role: "assistant", content: said.data });
  else if (!prompt.value) prompt.value = text;
  note.textContent = [outcome, counts.describe()].filter(Boolean).join(" ");
  message.removeAttribute("aria-busy");
  follow();
  underWay = null;
  setBusy(false);
}

function body(messages) {
  const made = {
    model: model.value,
    messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (temperature.value !== "") made.temperature = temperature.valueAsNumber;
  if (maxTokens.value !== "") made.max_tokens = maxTokens.valueAsNumber;
  return made;
}

/** Tokens and speed of an answer: the server's count where it has come, else events as they come. */
class Counts {
  begun = performance.now();
  first = null;
  last = null;
  numEvents = 0;
  numTokens = null;

  take(event) {
    if (event.usage) this.numTokens = event.usage.completion_tokens;
    if (!event.choices?.[0]?.delta?.content) return;
    this.last = performance.now();
    this.first ??= this.last;
    this.numEvents += 1;
  }

  describe() {
    if (this.first === null) return "";
    const tokens = this.numTokens ?? this.numEvents;
    const words = [`${this.numTokens === null ? "about " : ""}${tokens} token${tokens === 1 ? "" : "s"}`];
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) words.push(`${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    words.push(`first after ${((this.first - this.begun) / 1000).toFixed(2)} s`);
    return words.join(" · ");
  }
}

function show(role, name) {
  empty.remove();
  const text = element("div", "text");
  log.append(element("article", `message ${role}`, element("h3", "", name), text));
  log.scrollTop = log.scrollHeight;
  return text;
}

/** Scrolls along with the answer, at most once a frame, unless the reader has scrolled up. */
function follower() {
  let isPlanned = false;
  return () => {
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    if (isPlanned || !isAtEnd) return;
    isPlanned = true;
    requestAnimationFrame(() => {
      isPlanned = false;
      log.scrollTop = log.scrollHeight;
    });
  };
}

function setBusy(isBusy) {
  const hadFocus = [send, stop].includes(document.activeElement);
  send.hidden = isBusy;
  stop.hidden = !isBusy;
  clear.disabled = isBusy || !log.querySelector(".message");
  if (hadFocus) (isBusy ? stop : prompt).focus();
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (underWay || !text) return;
  prompt.value = "";
  ask(text);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});
stop.addEventListener("click", () => underWay?.abort());
clear.addEventListener("click", () => {
  conversation = [];
  log.replaceChildren(empty);
  clear.disabled = true;
  prompt.focus();
});
onKey(listModels);
listModels();
