// 'This is wrong': choose the right class and tell the endpoint.

import { ask } from "./api.js";
import { describeModel } from "./model.js";
import { count, span } from "./words.js";

const FEW = 12; // classes that need no search
const SHOWN = 100; // of ten thousand nobody reads more: searching narrows them

// Classes that hold what is searched: the whole name first, then those that begin with it.
function matches(classes, wanted) {
  const text = wanted.trim().toLowerCase();
  const rank = (label) => (label === text ? 0 : label.startsWith(text) ? 1 : 2);
  return classes
    .map((label) => [label, label.toLowerCase()])
    .filter(([, lower]) => lower.includes(text))
    .sort(([, a], [, b]) => rank(a) - rank(b))
    .map(([label]) => label);
}

export function offerCorrection(card, requestId) {
  const open = card.querySelector(".wrong");
  const form = card.querySelector(".correction");
  const search = form.querySelector(".wanted");
  const choices = form.querySelector(".choices");
  const more = form.querySelector(".more");
  const trouble = form.querySelector(".trouble");
  const send = form.querySelector(".row button");
  const stored = card.querySelector(".stored");
  let classes = [];

  const say = (message) => {
    // It is read out each time that it is written.
    if (trouble.textContent !== message) trouble.textContent = message;
    trouble.hidden = message === "";
  };
  const toggle = (shown) => {
    form.hidden = !shown;
    open.setAttribute("aria-expanded", shown);
    if (!shown) open.focus();
  };

  function list() {
    const found = matches(classes, search.value);
    // What is typed in full, or what alone is left, needs no click.
    const typed = found.find((label) => label === search.value.trim()) ?? (found.length === 1 ? found[0] : null);
    const chosen = typed ?? new FormData(form).get("label");
    const template = document.getElementById("choice").content;
    choices.replaceChildren(
      ...found.slice(0, SHOWN).map((label) => {
        const choice = document.importNode(template, true);
        const radio = choice.querySelector("input");
        radio.value = label;
        radio.checked = label === chosen;
        choice.querySelector("span").textContent = label;
        return choice;
      }),
    );
    const hidden = found.length - SHOWN;
    if (found.length === 0) more.textContent = "No class has this in its name.";
    else more.textContent = hidden > 0 ? `${count(hidden)} more: search to see them.` : "";
  }

  open.addEventListener("click", async () => {
    toggle(form.hidden);
    if (form.hidden) return;
    say("");
    more.textContent = "Asking for the classes …";
    try {
      ({ classes } = await describeModel());
      search.parentElement.hidden = classes.length <= FEW;
      list();
      (classes.length <= FEW ? choices.querySelector("input") : search).focus();
    } catch (error) {
      more.textContent = "";
      say(error.message);
    }
  });
  form.querySelector(".cancel").addEventListener("click", () => toggle(false));
  form.addEventListener("keydown", ({ key }) => {
    if (key === "Escape") toggle(false);
  });
  search.addEventListener("input", list);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const label = new FormData(form).get("label");
    if (label === null) return say("Choose a class of the list.");
    send.disabled = true;
    say("");
    try {
      await ask("v1/feedback", {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ request_id: requestId, label }),
        waiting: (message, seconds) => {
          say(message);
          if (seconds !== undefined) send.textContent = `Sent again in ${span(seconds)}`;
        },
      });
      say("");
      stored.textContent = `Stored: it is ${label}.`;
      stored.hidden = false;
      open.textContent = "Correct it again";
      search.value = "";
      toggle(false);
    } catch (error) {
      say(`Not stored: ${error.message}`);
    } finally {
      send.disabled = false;
      send.textContent = "Send the correction";
    }
  });
}
