// What answers, as /v1/model says: asked once, and again after another version has taken over.

import { ask } from "./api.js";

let known = null; // a promise of the answer
let digest = null;

// Whether the model's bundle has a heat map; a refusal says that it has none.
export const heatMaps = { offered: true };

export function describeModel() {
  known ??= ask("v1/model", { waiting: () => {} }).then(
    ({ body }) => body,
    (error) => {
      known = null;
      throw error;
    },
  );
  return known;
}

// Takes note of the version that a status names; true where it may be another than the one before.
export function modelChanged(model) {
  if (model && model.digest === digest) return false;
  digest = model?.digest ?? null;
  known = null;
  heatMaps.offered = true;
  return true;
}
