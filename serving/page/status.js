// What runs now: replicas, what they have answered, and a roll-out with its figures. Asks while somebody can see it.

import { ask, next } from "./api.js";
import { count, milliseconds, percent, shortDigest, span } from "./words.js";

const PERIOD_MS = 2000;
const LONGEST_MS = 60_000;
const FAULTS = { error: "failed", slow: "slow", disagreement: "disagree", wrong: "wrong" };
const ENDED = ["promoted", "rolled_back", "aborted"];

const element = (id) => document.getElementById(id);

function make(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A live region speaks when it is written to, so that it is written only when it says something else.
function say(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// Whole numbers of per cent, but for small shares.
const users = (share) => `${Number((100 * share).toPrecision(2))} % of users`;

function whatItDoes({ state, share, reason, champion, candidate }) {
  const [old, fresh] = [`version ${champion.version}`, `version ${candidate.version}`];
  if (ENDED.includes(state)) return `${state === "promoted" ? fresh : old} answers all users. Why: ${reason}.`;
  if (share > 0) return `${fresh} answers ${users(share)}${share < 1 ? `, ${old} the others` : ""}.`;
  return state === "loading" ? `${fresh} is being loaded beside ${old}.` : `${fresh} gets copies of what ${old} answers.`;
}

function faultCell(found) {
  return found.n > 0 ? `${count(found.k)} (${percent(found.rate)})` : "–";
}

// A row for each kind of fault that is looked for. `safe` is evidence that there is none, as a share of what a step
// takes.
function testRows({ arms, tests }) {
  const rows = [["requests", count(arms.champion.requests), count(arms.candidate.requests), ""]];
  for (const [fault, name] of Object.entries(FAULTS)) {
    const { champion, candidate, needed, safe } = tests[fault];
    const evidence = needed ? `${Math.floor(100 * Math.min(1, Math.max(0, safe)))} %` : "";
    rows.push([name, fault === "disagreement" ? "–" : faultCell(champion), faultCell(candidate), evidence]);
  }
  return rows;
}

function showTests(rollout) {
  const { champion, candidate } = rollout;
  const head = document.createElement("tr");
  head.append(
    make("td", ""),
    make("th", `version ${champion.version}`, { scope: "col", title: champion.digest }),
    make("th", `version ${candidate.version}`, { scope: "col", title: candidate.digest }),
    make("th", "evidence", { scope: "col" }),
  );
  const lines = testRows(rollout).map(([name, ...cells]) => {
    const line = document.createElement("tr");
    line.append(make("th", name, { scope: "row" }), ...cells.map((cell) => make("td", cell)));
    return line;
  });
  element("tests").replaceChildren(head, ...lines);
  const time = rollout.min_stage_s > 0 ? `, ${span(rollout.min_stage_s)}` : "";
  element("next-step").textContent =
    `Figures are of this stage. A step takes ${count(rollout.min_requests)} requests of version ` +
    `${candidate.version}${time}, and 100 % of evidence that it is no worse.`;
}

function showRollout(rollout) {
  element("rollout").hidden = !rollout;
  if (!rollout) return;
  const { state, share } = rollout;
  const badge = element("rollout-state");
  say(badge, state.replaceAll("_", " "));
  badge.dataset.state = state;
  say(element("rollout-says"), whatItDoes(rollout));
  element("split").firstElementChild.style.width = `${100 * share}%`;
  element("under-way").hidden = state === "loading" || ENDED.includes(state);
  showTests(rollout);
}

function showStatus({ model, replicas, rollout, arms }) {
  const { running, starting = 0 } = replicas;
  const { requests, errors, p50_ms: p50, p99_ms: p99 } = arms?.champion ?? {};
  const facts = [
    ["Replicas", `${running} running${starting > 0 ? `, ${starting} starting` : ""}`],
    ["Model", `${model.name}, version ${model.version}`],
    ["Digest", shortDigest(model.digest)],
  ];
  if (requests !== undefined) facts.push(["Requests", `${count(requests)}, ${count(errors)} failed`]);
  if (typeof p99 === "number") facts.push(["Latency", `median ${milliseconds(p50)}, p99 ${milliseconds(p99)}`]);
  element("facts").replaceChildren(...facts.flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  showRollout(rollout);
  const share = rollout && !ENDED.includes(rollout.state) ? ` · roll-out ${rollout.stage}` : "";
  say(element("summary"), `${running} ${running === 1 ? "replica" : "replicas"}${share}`);
}

// Never ends. `heard(model)` is called with what each status says of the model; with null where the key shows none.
export async function watchStatus(heard) {
  const trouble = element("status-trouble");
  let shown = "";
  let last = null;
  let failures = 0;
  for (;;) {
    while (document.hidden) await next(["visibilitychange"]);
    let pause = PERIOD_MS;
    try {
      const { body } = await ask("v1/status");
      // What has not changed may stay selected.
      const text = JSON.stringify(body);
      if (text !== shown) showStatus(body);
      shown = text;
      heard(body.model);
      last = new Date();
      failures = 0;
    } catch (error) {
      failures++;
      const isHidden = error.code === "missing_scope";
      if (isHidden) heard(null);
      pause = Math.max(Math.min(LONGEST_MS, PERIOD_MS * 2 ** failures), 1000 * (error.retryAfter ?? 0));
      const since = last ? `No news since ${last.toLocaleTimeString()}: ` : "";
      say(trouble, since + (isHidden ? "This key does not show how the endpoint is." : error.message));
    }
    trouble.hidden = failures === 0;
    element("news").classList.toggle("stale", failures > 0);
    // Who comes back to the tab, or gives another key, sees what is true now.
    await next(["visibilitychange", "key-given"], pause);
  }
}
