// Puts the page together: where images come from, the API key, what the header says.

import { answerCard } from "./answer.js";
import { hasKey, useKey } from "./api.js";
import { describeModel, modelChanged } from "./model.js";
import { watchStatus } from "./status.js";
import { count } from "./words.js";

const element = (id) => document.getElementById(id);

const announce = (text) => {
  element("announcement").textContent = text;
};

function say(message) {
  element("give-trouble").textContent = message;
  element("give-trouble").hidden = message === "";
}

function take(files) {
  say("");
  element("answers").prepend(...Array.from(files, (file) => answerCard(file, announce)));
}

function listenForImages() {
  const chosen = element("files");
  chosen.addEventListener("change", () => {
    take(chosen.files);
    chosen.value = ""; // the same file may be chosen again
  });
  document.addEventListener("paste", ({ clipboardData }) => {
    if (clipboardData.files.length > 0) take(clipboardData.files);
  });
  // Text may still be dragged into the fields.
  const forUs = ({ dataTransfer: { types } }) => types.includes("Files") || types.includes("text/uri-list");
  const dragging = (on) => document.body.classList.toggle("dragging", on);
  const welcome = (event) => {
    if (!forUs(event)) return;
    event.preventDefault();
    dragging(true);
  };
  document.addEventListener("dragenter", welcome);
  document.addEventListener("dragover", welcome);
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (relatedTarget === null) dragging(false);
  });
  document.addEventListener("drop", (event) => {
    if (!forUs(event)) return;
    event.preventDefault();
    dragging(false);
    const { items, files } = event.dataTransfer;
    if (Array.from(items).some((item) => item.webkitGetAsEntry?.()?.isDirectory)) {
      say("That is a folder: open it and drop the images in it.");
    } else if (files.length === 0) {
      say("That is no file: save the image and drop the file.");
    } else {
      take(files);
    }
  });
}

function listenForKey() {
  const form = element("key");
  const field = element("key-field");
  const ask = (why) => {
    element("key-why").textContent = why;
    form.hidden = false;
    // Nobody is interrupted in what they type.
    if (document.activeElement.tagName !== "INPUT") field.focus();
  };
  const known = () => {
    form.hidden = true;
    element("other-key").hidden = !hasKey();
  };
  document.addEventListener("key-wanted", ({ detail }) => {
    if (form.hidden) ask(detail);
  });
  element("other-key").addEventListener("click", () => ask("The next requests use this key."));
  // A key is often pasted with the end of its line.
  field.addEventListener("change", () => (field.value = field.value.trim()));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    useKey(field.value);
    field.value = "";
    known();
  });
  known();
}

async function nameModel() {
  try {
    const { name, version, classes, image_size: size } = await describeModel();
    element("model").textContent = `${name}, version ${version}: ${count(classes.length)} classes`;
    element("image-size").textContent = `, at ${size} × ${size} pixels`;
    document.title = `${name} · helio`;
  } catch {
    // Who watches the status asks again.
  }
}

listenForImages();
listenForKey();
watchStatus((model) => {
  if (modelChanged(model)) nameModel();
});
