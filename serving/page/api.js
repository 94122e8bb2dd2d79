// Asks the endpoint. This module alone knows the key, the shape of an error, and when to ask again.

const KEY = "helio-api-key";
const TIMEOUT_MS = 30_000; // of a request that its caller cannot give up

export class ApiError extends Error {
  constructor(message, facts = {}) {
    super(message);
    this.status = facts.status ?? 0; // 0: no answer came
    this.code = facts.code ?? "";
    this.requestId = facts.requestId ?? "";
    this.retryAfter = facts.retryAfter ?? null; // seconds, where the endpoint asks to wait
  }
}

const currentKey = () => sessionStorage.getItem(KEY) ?? "";
let keyWait = null; // {promise, resolve} of those that wait for a key

export const hasKey = () => currentKey() !== "";

export function useKey(key) {
  sessionStorage.setItem(KEY, key);
  keyWait?.resolve();
  keyWait = null;
}

// Resolves when there is another key than the refused one. The page listens to `key-wanted` and shows the field.
function anotherKey(refused, why) {
  if (currentKey() !== refused) return Promise.resolve();
  if (keyWait === null) {
    keyWait = {};
    keyWait.promise = new Promise((resolve) => (keyWait.resolve = resolve));
  }
  document.dispatchEvent(new CustomEvent("key-wanted", { detail: why }));
  return keyWait.promise;
}

function secondsToWait(response) {
  const asked = response.headers.get("retry-after");
  if (asked === null || ![429, 503].includes(response.status)) return null;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(asked) ? Number(asked) : (Date.parse(asked) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(1, Math.ceil(seconds)) : null;
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
  } catch (error) {
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
  const reason = body?.error?.message ?? `The endpoint answered with status ${response.status} and gave no reason.`;
  throw new ApiError(reason, {
    status: response.status,
    code: body?.error?.code,
    requestId: body?.request_id ?? response.headers.get("x-request-id"),
    retryAfter: secondsToWait(response),
  });
}

export function sleep(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
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
        waiting?.(error.message, null);
        await anotherKey(key, error.message);
      } else if (waiting !== undefined && error.retryAfter != null) {
        // By the clock: a hidden tab's timers come late.
        const until = Date.now() + error.retryAfter * 1000;
        for (let left = error.retryAfter; left > 0; left = Math.ceil((until - Date.now()) / 1000)) {
          waiting(error.message, left);
          await sleep(Math.min(1000, until - Date.now()));
          options.signal?.throwIfAborted();
        }
      } else {
        throw error;
      }
    }
  }
}
