// What runs now: replicas, and a roll-out with its stages and figures. Asks while somebody can see it.

import { ask, sleep } from "./api.js";
import { count, percent, shortDigest } from "./words.js";

const PERIOD_MS = 2000;
const LONGEST_MS = 60_000;
const STAGES = [1, 5, 25, 50, 100]; // per cent of users

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

const versionName = (version) => `version ${version?.version ?? "?"}`;

function figure(name, value) {
  if (name.endsWith("_ms")) return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
  if (name.endsWith("_s")) return figure("_ms", 1000 * value);
  return Number.isInteger(value) ? count(value) : value.toPrecision(3);
}

function errorRate({ requests = 0, errors = 0 }) {
  return requests > 0 ? `${count(errors)} (${percent(errors / requests)})` : count(errors);
}

// One row a figure, one column an arm. Beside requests and errors an arm may carry any other numbers: `p50_ms` is
// shown as "p50" in milliseconds.
function showArms({ arms = {}, champion, candidate }) {
  const columns = [arms.champion ?? {}, arms.candidate ?? {}];
  const others = Object.keys({ ...columns[0], ...columns[1] }).filter(
    (name) => !["requests", "errors"].includes(name) && columns.some((arm) => typeof arm[name] === "number"),
  );
  const rows = [
    ["requests", columns.map((arm) => count(arm.requests ?? 0))],
    ["errors", columns.map(errorRate)],
    ...others.map((name) => [
      name.replace(/_m?s$/, "").replaceAll("_", " "),
      columns.map((arm) => (typeof arm[name] === "number" ? figure(name, arm[name]) : "–")),
    ]),
  ];
  const head = document.createElement("tr");
  head.append(
    make("td", ""),
    make("th", `champion ${versionName(champion)}`, { scope: "col", title: champion?.digest ?? "" }),
    make("th", `candidate ${versionName(candidate)}`, { scope: "col", title: candidate?.digest ?? "" }),
  );
  const lines = rows.map(([name, cells]) => {
    const line = document.createElement("tr");
    line.append(make("th", name, { scope: "row" }), ...cells.map((cell) => make("td", cell)));
    return line;
  });
  element("arms").replaceChildren(head, ...lines);
}

// `share` is a fraction of users, 0 to 1.
function showRollout(rollout) {
  element("rollout").hidden = !rollout;
  if (!rollout) return;
  const share = Math.round(100 * (rollout.share ?? 0));
  const state = String(rollout.state).replaceAll("_", " ");
  const stage = rollout.stage === undefined || rollout.stage === rollout.state ? "" : `, stage ${rollout.stage}`;
  const why = rollout.reason ? ` ${rollout.reason}` : "";
  const who = `${versionName(rollout.candidate)} answers ${share} % of users.`;
  say(element("rollout-state"), `${state}${stage}: ${who}${why}`);
  const reached = STAGES.findLast((percentage) => percentage <= share);
  element("stages").replaceChildren(
    ...STAGES.map((percentage) => {
      const step = make("li", `${percentage} %`, percentage <= share ? { class: "reached" } : {});
      if (percentage === reached) step.setAttribute("aria-current", "step");
      return step;
    }),
  );
  showArms(rollout);
}

function showStatus({ model, replicas, rollout }) {
  const { running = 0, starting = 0 } = replicas ?? {};
  const replicasNow = `${running} running${starting > 0 ? `, ${starting} starting` : ""}`;
  const asleep = running + starting === 0 ? ": the next request starts one" : "";
  element("facts").replaceChildren(
    make("dt", "Replicas"),
    make("dd", replicasNow + asleep),
    make("dt", "Model"),
    make("dd", `${model?.name}, ${versionName(model)}`),
    make("dt", "Digest"),
    make("dd", shortDigest(model?.digest), { title: model?.digest ?? "" }),
  );
  showRollout(rollout);
  const share = rollout ? ` · roll-out ${Math.round(100 * (rollout.share ?? 0))} %` : "";
  say(element("summary"), `${running} ${running === 1 ? "replica" : "replicas"}${share}`);
}

function shownOrHidden() {
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

// Never ends. `heard(model)` is called with what each status says of the model.
export async function watchStatus(heard) {
  const trouble = element("status-trouble");
  let shown = "";
  let last = null;
  let failures = 0;
  for (;;) {
    while (document.hidden) await shownOrHidden();
    let pause = PERIOD_MS;
    try {
      const { body } = await ask("v1/status");
      const text = JSON.stringify(body);
      if (text !== shown) showStatus(body);
      shown = text;
      heard(body.model);
      last = new Date();
      failures = 0;
    } catch (error) {
      failures++;
      pause = Math.max(Math.min(LONGEST_MS, PERIOD_MS * 2 ** failures), 1000 * (error.retryAfter ?? 0));
      say(trouble, `${last ? `No news since ${last.toLocaleTimeString()}: ` : ""}${error.message}`);
    }
    trouble.hidden = failures === 0;
    element("news").classList.toggle("stale", failures > 0);
    // Who comes back to the tab sees what is true now.
    await Promise.race([sleep(pause), shownOrHidden()]);
  }
}
