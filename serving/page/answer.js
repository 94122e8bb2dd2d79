// One card: an image, what the model says of it, and how to correct it.

import { ask } from "./api.js";
import { offerCorrection } from "./correction.js";
import { offerHeatMap } from "./heat.js";
import { heatMaps } from "./model.js";
import { count, percent, shortDigest, span } from "./words.js";

const BARS = 5;
const LANES = 4; // requests at once: a hundred images must not make the endpoint refuse others
let freeLanes = LANES;
const queue = [];

async function inLane(work) {
  if (freeLanes > 0) freeLanes--;
  else await new Promise((resolve) => queue.push(resolve));
  try {
    return await work();
  } finally {
    // A lane goes straight to the next in the queue.
    const next = queue.shift();
    if (next) next();
    else freeLanes++;
  }
}

async function predict(file, options) {
  const body = new FormData();
  body.append("file", file, file.name || "image");
  const heatMap = heatMaps.offered;
  try {
    const query = heatMap ? "probabilities=true&heat_map=true" : "probabilities=true";
    return await ask(`v1/predict?${query}`, { method: "POST", body, ...options });
  } catch (error) {
    if (!heatMap || error.code !== "no_heat_map") throw error;
    heatMaps.offered = false;
    return predict(file, options);
  }
}

// Classes best first: as the endpoint ordered them, then those that it named only among all.
function ranking(answer) {
  const first = answer.predictions;
  const named = new Set(first.map(({ label }) => label));
  const others = Object.entries(answer.probabilities ?? {})
    .filter(([label]) => !named.has(label))
    .map(([label, probability]) => ({ label, probability }))
    .sort((a, b) => b.probability - a.probability);
  return [...first, ...others];
}

function fillBars(list, classes) {
  const template = document.getElementById("bar").content;
  list.replaceChildren(
    ...classes.map(({ label, probability }) => {
      const bar = document.importNode(template, true);
      bar.querySelector(".label").textContent = label;
      bar.querySelector(".percent").textContent = percent(probability);
      bar.querySelector(".bar span").style.width = `${100 * probability}%`;
      return bar;
    }),
  );
}

function showImage(card, url, name) {
  const picture = card.querySelector(".picture");
  const image = card.querySelector("img");
  image.alt = name;
  image.src = url;
  // Resolves to whether this browser can show the image: the model reads kinds, such as TIFF, that it cannot.
  return image.decode().then(
    () => {
      picture.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
      picture.classList.toggle("wide", image.naturalWidth > image.naturalHeight);
      return true;
    },
    () => {
      picture.classList.add("unshown");
      picture.replaceChildren("This browser cannot show the image.");
      return false;
    },
  );
}

function showAnswer(card, { body: answer, milliseconds }, announce) {
  const classes = ranking(answer);
  fillBars(card.querySelector(".top"), classes.slice(0, BARS));
  const all = card.querySelector(".all");
  all.hidden = classes.length <= BARS;
  all.querySelector("summary").textContent = `All ${count(classes.length)} classes`;
  all.addEventListener("toggle", () => fillBars(all.querySelector("ol"), all.open ? classes : []));

  const { name, version, digest } = answer.model;
  const trail = card.querySelector(".trail");
  const time = `answered in ${Math.round(milliseconds)}\u00a0ms`;
  trail.textContent = `${name}, version ${version}, digest ${shortDigest(digest)}, ${time}`;
  trail.title = `digest ${digest}`;
  const id = card.querySelector(".request code");
  id.textContent = answer.request_id;
  const copy = card.querySelector(".copy");
  copy.addEventListener("click", () => {
    // navigator.clipboard exists on HTTPS and loopback only; this works on a plain address in a team's network too.
    getSelection().selectAllChildren(id);
    copy.textContent = document.execCommand("copy") ? "Copied" : "Selected: copy it with Ctrl+C";
  });
  offerCorrection(card, answer.request_id);
  card.querySelector(".result").hidden = false;
  announce(`${card.querySelector(".name").textContent}: ${classes[0].label}, ${percent(classes[0].probability)}`);
}

// Makes the card of one file and asks for its answer; `announce(text)` tells those who do not see the screen.
export function answerCard(file, announce) {
  // Imported, not cloned: a template's own document loads no image.
  const card = document.importNode(document.getElementById("card").content, true).firstElementChild;
  const name = file.name || "image";
  const state = card.querySelector(".state");
  const trouble = card.querySelector(".trouble");
  const leaving = new AbortController();
  card.querySelector(".name").textContent = name;
  card.querySelector(".remove").setAttribute("aria-label", `Remove ${name}`);
  const url = URL.createObjectURL(file);
  const shown = showImage(card, url, name);

  async function go() {
    trouble.hidden = true;
    state.textContent = "Waiting for its turn …";
    const waiting = (message, seconds) => {
      state.textContent = seconds === null ? message : `${message} (asking again in ${span(seconds)})`;
    };
    try {
      const answer = await inLane(() => {
        leaving.signal.throwIfAborted();
        state.textContent = "Asking the model …";
        return predict(file, { signal: leaving.signal, waiting });
      });
      state.textContent = "";
      showAnswer(card, answer, announce);
      const rows = answer.body.heat_map;
      if (rows?.length && rows[0].length && (await shown)) offerHeatMap(card, rows);
    } catch (error) {
      if (leaving.signal.aborted) return;
      const request = error.requestId ? ` (request ${error.requestId})` : "";
      state.textContent = "";
      trouble.querySelector("p").textContent = error.message + request;
      trouble.hidden = false;
      announce(`${name}: ${error.message}`);
    }
  }

  card.querySelector(".again").addEventListener("click", go);
  card.querySelector(".remove").addEventListener("click", () => {
    leaving.abort();
    URL.revokeObjectURL(url);
    (card.nextElementSibling ?? card.previousElementSibling ?? document.getElementById("files")).focus();
    card.remove();
  });
  go();
  return card;
}
