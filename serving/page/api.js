// Asks the endpoint. This module alone knows the key, the shape of an error, and when to ask again.

const KEY = "helio-api-key";
const TIMEOUT_MS = 30_000; // of a request that its caller cannot give up

class ApiError extends Error {
  constructor(message, facts = {}) {
    super(message);
    this.status = facts.status; // undefined: no answer came
    this.code = facts.code;
    this.requestId = facts.requestId;
    this.retryAfter = facts.retryAfter; // seconds, where the endpoint asks to wait
  }
}

const currentKey = () => sessionStorage.getItem(KEY) ?? "";

export const hasKey = () => currentKey() !== "";

// Those that wait for a key hear of it by the event `key-given`.
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  document.dispatchEvent(new Event("key-given"));
}

// Resolves at the next of these events of the document, or after so long.
export function next(events, milliseconds) {
  const over = new AbortController();
  return new Promise((resolve) => {
    for (const event of events) document.addEventListener(event, resolve, { signal: over.signal });
    if (milliseconds !== undefined) setTimeout(resolve, milliseconds);
  }).finally(() => over.abort());
}

function secondsToWait(response) {
  const seconds = Number(response.headers.get("retry-after") ?? NaN);
  return [429, 503].includes(response.status) && seconds >= 0 ? Math.max(1, Math.ceil(seconds)) : undefined;
}

// One request. Resolves to {body, milliseconds}; rejects with an ApiError whose message is for people.
async function request(path, key, options) {
  const headers = new Headers(options.headers);
  const signal = options.signal ?? AbortSignal.timeout(TIMEOUT_MS);
  if (key) headers.set("authorization", `Bearer ${key}`);
  const start = performance.now();
  let response, text;
  try {
    response = await fetch(path, { ...options, headers, signal, cache: "no-store" });
    text = await response.text();
  } catch {
    options.signal?.throwIfAborted();
    throw new ApiError("The endpoint does not answer: check that it runs and that this machine reaches it.");
  }
  const milliseconds = performance.now() - start;
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // A proxy on the way answers in HTML: its status has to do.
  }
  if (response.ok && body !== null) return { body, milliseconds };
  throw new ApiError(body?.error?.message ?? `The endpoint answered with status ${response.status} and no reason.`, {
    status: response.status,
    code: body?.error?.code,
    requestId: response.headers.get("x-request-id"),
    retryAfter: secondsToWait(response),
  });
}

// Asks until there is an answer: waits for a key where one is wanted. Where the endpoint says when to come again,
// `waiting(message, seconds)` is called each second and the request is repeated; without `waiting` that is an error.
export async function ask(path, { waiting, ...options } = {}) {
  for (;;) {
    const key = currentKey();
    try {
      return await request(path, key, options);
    } catch (error) {
      if (error.status === 401) {
        const why = error.code === "no_key" ? "This endpoint wants an API key. Whoever runs it can make one." : error.message;
        waiting?.(why);
        if (currentKey() === key) {
          const given = next(["key-given"]);
          document.dispatchEvent(new CustomEvent("key-wanted", { detail: why }));
          await given;
        }
      } else if (waiting !== undefined && error.retryAfter !== undefined) {
        // By the clock: a hidden tab's timers come late.
        const until = Date.now() + error.retryAfter * 1000;
        for (let left = error.retryAfter; left > 0; left = Math.ceil((until - Date.now()) / 1000)) {
          waiting(error.message, left);
          await next([], Math.min(1000, until - Date.now()));
          options.signal?.throwIfAborted();
        }
      } else {
        throw error;
      }
    }
  }
}
