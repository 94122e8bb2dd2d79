// Lays what the model looked at over the centre square of an image.

// Anchors of matplotlib's `inferno`, whose brightness rises evenly: it reads the same without colour vision.
const COLOURS = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];

function colour(value) {
  const place = Math.min(1, Math.max(0, value)) * (COLOURS.length - 1);
  const low = Math.min(COLOURS.length - 2, Math.floor(place));
  return COLOURS[low].map((channel, i) => channel + (place - low) * (COLOURS[low + 1][i] - channel));
}

// rows: floats 0 to 1 [row][column], top first. The canvas is square; the browser smooths between the cells.
export function drawHeatMap(canvas, rows) {
  const cells = new OffscreenCanvas(rows[0].length, rows.length);
  const pixels = new ImageData(cells.width, cells.height);
  rows.flat().forEach((value, i) => pixels.data.set([...colour(value), 255], 4 * i));
  cells.getContext("2d").putImageData(pixels, 0, 0);
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  // Half a cell at each edge has no neighbour to be smoothed with: the browser repeats the edge's own colour.
  context.drawImage(cells, 0, 0, canvas.width, canvas.height);
}

// Shows the switch and the slider of a card whose answer has a heat map and whose image this browser can show.
export function offerHeatMap(card, rows) {
  const canvas = card.querySelector("canvas");
  const shown = card.querySelector(".heat-shown");
  const strength = card.querySelector(".heat-strength");
  drawHeatMap(canvas, rows);
  const update = () => {
    canvas.hidden = !shown.checked;
    card.querySelector(".heat-more").hidden = !shown.checked;
    canvas.style.opacity = strength.value / 100;
  };
  shown.addEventListener("change", update);
  strength.addEventListener("input", update);
  update();
  card.querySelector(".heat").hidden = false;
}
