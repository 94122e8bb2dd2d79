// Lays what the model looked at over the centre square of an image.

// Anchors of matplotlib's `inferno`, whose brightness rises evenly: it reads the same without colour vision.
const COLOURS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const STRENGTH = 0.75; // how much of the image is covered where the model looked most; where it did not, none

function pixel(value) {
  const place = value * (COLOURS.length - 1);
  const low = Math.min(COLOURS.length - 2, Math.floor(place));
  const colour = COLOURS[low].map((channel, i) => channel + (place - low) * (COLOURS[low + 1][i] - channel));
  return [...colour, 255 * STRENGTH * value];
}

// rows: floats 0 to 1 [row][column], top first. A pixel each: the browser smooths between them.
export function offerHeatMap(card, rows) {
  const canvas = card.querySelector("canvas");
  const shown = card.querySelector(".heat-shown");
  const pixels = new ImageData(rows[0].length, rows.length);
  pixels.data.set(rows.flat().flatMap((value) => pixel(Math.min(1, Math.max(0, value)))));
  canvas.width = pixels.width;
  canvas.height = pixels.height;
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const update = () => (canvas.hidden = !shown.checked);
  shown.addEventListener("change", update);
  update();
  card.querySelector(".heat").hidden = false;
}
