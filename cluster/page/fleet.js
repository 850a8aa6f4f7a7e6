// The live view: asks /fleet once a second while somebody looks, and shows the answer.

import { onKey, request } from "./api.js";
import { drawChart, element } from "./chart.js";

const PERIOD_MS = 1000;
const TIMEOUT_MS = 5000;
const HISTORY = 60;
// Rates are over some seconds: counters are the router's, which asks each engine once a second.
const RATE_WINDOW_S = 5;
// Each router dates an event by when it noticed; several may answer in turn.
const SAME_EVENT_S = 10;
const MAX_EVENTS = 50;

const status = document.getElementById("status");
const statusText = document.getElementById("status-text");
const engineList = document.getElementById("engines");
const eventList = document.getElementById("events");
const figures = {
  tokens: { history: [], top: 1 },
  queue: { history: [], top: 1 },
  kv: { history: [], top: 1 },
  hits: { history: [], top: 1 },
};
let events = [];
let samples = [];
let timer = null;
let heardAt = null;

async function look() {
  timer = null;
  try {
    const response = await request("fleet", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    show(await response.json());
    heardAt = Date.now();
    document.body.classList.remove("stale");
  } catch (error) {
    document.body.classList.add("stale");
    const age = heardAt === null ? "" : ` What is shown is ${duration((Date.now() - heardAt) / 1000)} old.`;
    say("lost", error.status === undefined ? `The server's answer makes no sense: ${error.message}` : error.message + age);
  }
  plan(PERIOD_MS);
}

function plan(delayMs) {
  if (timer !== null) clearTimeout(timer);
  timer = document.hidden ? null : setTimeout(look, delayMs);
}

function show(fleet) {
  document.title = fleet.model ? `${fleet.model} · qwen-on-ray` : "qwen-on-ray";
  const ready = fleet.engines.filter((engine) => engine.is_ready);
  if (fleet.is_ready) {
    say("ready", `${fleet.model}: ${ready.length} of ${count(fleet.engines.length, "engine")} ready`);
  } else {
    say("waiting", `${fleet.model} is not ready: ${fleet.status}`);
  }
  sample(fleet);
  showFigures(fleet);
  showEngines(fleet.engines);
  showEvents(fleet.events);
}

function say(state, words) {
  status.dataset.state = state;
  // A screen reader speaks at each change, so that there is none without a reason.
  if (statusText.textContent !== words) statusText.textContent = words;
}

function sample(fleet) {
  const last = samples.at(-1);
  if (last && fleet.time <= last.time) return;
  const engines = new Map(fleet.engines.map((engine) => [engine.id, engine]));
  samples.push({ time: fleet.time, engines });
  while (samples.length > 2 && samples[1].time <= fleet.time - RATE_WINDOW_S) samples.shift();
}

/** How much an engine's counter grew within the window, and in how many seconds. */
function growth(id, name) {
  const present = samples.filter((one) => one.engines.has(id));
  if (present.length < 2) return 0;
  const [first, last] = [present[0], present.at(-1)];
  // It begins again with another leader.
  return Math.max(0, last.engines.get(id)[name] - first.engines.get(id)[name]);
}

function rate(id, name) {
  const span = samples.length < 2 ? 0 : samples.at(-1).time - samples[0].time;
  return span > 0 ? growth(id, name) / span : 0;
}

function showFigures(fleet) {
  const { engines } = fleet;
  const sum = (read) => engines.reduce((total, engine) => total + read(engine), 0);
  const tokens = sum((engine) => rate(engine.id, "generated_tokens_total"));
  const running = sum((engine) => engine.num_running);
  // What waits for an engine is the router's alone to know, what waits in one that engine's.
  const waiting = Math.max(fleet.router.num_waiting, sum((engine) => engine.num_waiting));
  const pages = sum((engine) => engine.num_pages);
  const use = pages ? sum((engine) => engine.num_pages_used) / pages : 0;
  const recent = sum((engine) => growth(engine.id, "prompt_tokens_total"));
  const all = sum((engine) => engine.prompt_tokens_total);
  const hits = recent
    ? sum((engine) => growth(engine.id, "cached_tokens_total")) / recent
    : all ? sum((engine) => engine.cached_tokens_total) / all : 0;
  put("tokens", tokens, figure(tokens));
  put("queue", waiting, `${waiting}`, `${running} running`);
  put("kv", use, percent(use), pages ? `${count(pages, "page")}` : "");
  put("hits", Math.min(1, hits), all ? percent(Math.min(1, hits)) : "–", all ? "of prompts" : "");
}

function put(name, value, words, note = "") {
  const { history, top } = figures[name];
  history.push(value);
  if (history.length > HISTORY) history.shift();
  document.getElementById(`${name}-value`).replaceChildren(words, element("small", "", note));
  drawChart(document.getElementById(`${name}-chart`), history, HISTORY, top);
}

function showEngines(engines) {
  if (!engines.length) {
    engineList.replaceChildren(element("li", "empty", "No engine has been placed."));
    return;
  }
  engineList.replaceChildren(...engines.map(engineItem));
}

function engineItem(engine) {
  const state = engine.is_ready ? "ready" : engine.status.startsWith("failed") ? "lost" : "waiting";
  const heading = element("div", "bar", element("h3", "", engine.id), chip(state, engine.is_ready ? "ready" : "not ready"));
  const item = element("li", "engine", heading);
  if (!engine.is_ready) item.append(element("p", "note", engine.status));
  const restarts = Object.values(engine.restarts_total).reduce((total, one) => total + one, 0);
  const facts = element("dl", "");
  if (engine.num_pages || engine.is_ready) {
    fact(facts, "Tokens/s", figure(rate(engine.id, "generated_tokens_total")));
    fact(facts, "Running", engine.num_running);
    fact(facts, "Queue", engine.num_waiting);
    fact(facts, "KV use", percent(engine.num_pages ? engine.num_pages_used / engine.num_pages : 0));
    fact(facts, "Epoch", engine.epoch);
    fact(facts, "Rebuilt", restarts);
    item.append(facts);
  }
  if (engine.ranks.length) item.append(element("ul", "ranks", ...engine.ranks.map(rankItem)));
  return item;
}

function rankItem(rank) {
  const state = rank.state === "ready" ? "ready" : ["silent", "failed"].includes(rank.state) ? "lost" : "waiting";
  // Progress begins with the name of its phase, which is the state.
  const isProgress = rank.note.startsWith(rank.state);
  const item = element("li", "rank", element("span", "", `rank ${rank.rank}`), chip(state, isProgress ? rank.note : rank.state));
  if (rank.note && !isProgress) item.append(element("span", "host", rank.note));
  if (state === "lost" && rank.seconds_since_answer !== null) {
    item.append(element("span", "host", `heard ${duration(rank.seconds_since_answer)} ago`));
  }
  return item;
}

function showEvents(latest) {
  for (const event of latest) {
    const isKnown = events.some(
      (known) =>
        known.engine === event.engine && known.what === event.what && Math.abs(known.time - event.time) < SAME_EVENT_S,
    );
    if (!isKnown) events.push(event);
  }
  events = events.sort((one, other) => other.time - one.time).slice(0, MAX_EVENTS);
  if (!events.length) {
    eventList.replaceChildren(element("li", "empty", "Nothing has happened yet."));
    return;
  }
  eventList.replaceChildren(
    ...events.map((event) => {
      const time = element("time", "", new Date(event.time * 1000).toLocaleTimeString([], { hour12: false }));
      time.dateTime = new Date(event.time * 1000).toISOString();
      return element("li", `event ${event.kind}`, time, element("span", "host", event.engine), element("span", "", event.what));
    }),
  );
}

function chip(state, words) {
  const made = element("span", "chip", element("span", "dot", ""), words);
  made.dataset.state = state;
  return made;
}

function fact(list, name, value) {
  list.append(element("div", "", element("dt", "", name), element("dd", "", `${value}`)));
}

function count(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

function figure(number) {
  return number >= 100 || number === 0 ? number.toFixed(0) : number.toFixed(1);
}

function percent(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

function duration(seconds) {
  if (seconds < 60) return `${seconds.toFixed(0)} s`;
  return seconds < 3600 ? `${(seconds / 60).toFixed(0)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

document.addEventListener("visibilitychange", () => plan(0));
onKey(() => plan(0));
plan(0);
