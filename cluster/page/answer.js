// An answer's events as they come; where the connection breaks, the rest is asked for.

import { request } from "./api.js";

const PAUSE_MS = 1000;
const MAX_TRIES = 60;
const GONE = 410;

/** The connection ended before the answer did. */
class BrokenError extends Error {}

/**
 * Ask for a chat completion, and give its events until it is whole.
 *
 * Throws what the server says went wrong. `onBreak` is called when the connection broke.
 */
export async function* answerEvents(body, signal, onBreak) {
  const options = {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  };
  let response = await request("v1/chat/completions", options);
  let name = null;
  let lastId = "";
  for (;;) {
    try {
      for await (const { id, event } of events(response.body)) {
        name ??= event.id;
        lastId = id;
        yield event;
      }
      return;
    } catch (error) {
      if (!(error instanceof BrokenError) || name === null) throw error;
      onBreak();
      response = await goOn(name, lastId, signal);
    }
  }
}

async function goOn(name, lastId, signal) {
  const headers = lastId ? { "Last-Event-ID": lastId } : {};
  for (let tries = 1; ; tries += 1) {
    // At once the router that broke might be asked again.
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    try {
      return await request(`v1/streams/${name}`, { headers, signal });
    } catch (error) {
      const isForGood = error.status === GONE || (error.status >= 400 && error.status < 429);
      if (error.status === undefined || isForGood || tries === MAX_TRIES) throw error;
    }
  }
}

/** Each event of one connection with the id of the last one that had any. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let id = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new BrokenError("The connection ended before the answer did.");
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("id: ")) id = line.slice("id: ".length);
        if (!line.startsWith("data: ")) continue;
        const payload = line.slice("data: ".length).trim();
        if (payload === "[DONE]") return;
        const event = JSON.parse(payload);
        if (event.error) throw new Error(event.error.message);
        yield { id, event };
      }
    }
  } catch (error) {
    if (error instanceof TypeError) throw new BrokenError("The connection broke amid the answer.");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}
