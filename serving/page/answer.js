// One card: an image, what the model says of it, and how to correct it.

import { ask } from "./api.js";
import { offerCorrection } from "./correction.js";
import { offerHeatMap } from "./heat.js";
import { heatMaps } from "./model.js";
import { milliseconds, percent, shortDigest, span } from "./words.js";

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
    return await ask(`v1/predict${heatMap ? "?heat_map=true" : ""}`, { method: "POST", body, ...options });
  } catch (error) {
    if (!heatMap || error.code !== "no_heat_map") throw error;
    heatMaps.offered = false;
    return predict(file, options);
  }
}

function fillBars(list, predictions) {
  const template = document.getElementById("bar").content;
  list.replaceChildren(
    ...predictions.map(({ label, probability }) => {
      const bar = document.importNode(template, true);
      bar.querySelector(".label").textContent = label;
      bar.querySelector(".percent").textContent = percent(probability);
      bar.querySelector(".bar span").style.width = `${100 * probability}%`;
      return bar;
    }),
  );
}

// Resolves to whether this browser can show the image: the model reads kinds, such as TIFF, that it cannot.
async function showImage(card, url, name) {
  const picture = card.querySelector(".picture");
  const image = card.querySelector("img");
  image.alt = name;
  image.src = url;
  try {
    await image.decode();
  } catch {
    picture.classList.add("unshown");
    picture.replaceChildren("This browser cannot show the image.");
    return false;
  }
  picture.style.setProperty("--ratio", image.naturalWidth / image.naturalHeight);
  picture.classList.toggle("wide", image.naturalWidth > image.naturalHeight);
  return true;
}

function showAnswer(card, { body: { request_id: id, predictions, model }, milliseconds: took }) {
  fillBars(card.querySelector(".bars"), predictions);
  const by = card.querySelector(".by");
  const digest = shortDigest(model.digest);
  by.textContent = `${model.name}, version ${model.version}, digest ${digest}, ${milliseconds(took)}`;
  by.title = `digest ${model.digest}`;
  card.querySelector(".trail code").textContent = id;
  offerCorrection(card, id);
  card.querySelector(".result").hidden = false;
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
      state.textContent = seconds === undefined ? message : `${message} (asking again in ${span(seconds)})`;
    };
    try {
      const answer = await inLane(() => {
        leaving.signal.throwIfAborted();
        state.textContent = "Asking the model …";
        return predict(file, { signal: leaving.signal, waiting });
      });
      showAnswer(card, answer);
      const { heat_map: rows, predictions } = answer.body;
      announce(`${name}: ${predictions[0].label}, ${percent(predictions[0].probability)}`);
      if (rows && (await shown)) offerHeatMap(card, rows);
    } catch (error) {
      if (leaving.signal.aborted) return;
      const request = error.requestId ? ` (request ${error.requestId})` : "";
      trouble.querySelector("p").textContent = error.message + request;
      trouble.hidden = false;
      announce(`${name}: ${error.message}`);
    } finally {
      state.textContent = "";
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
