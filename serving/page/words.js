// How figures are said.

export function percent(share) {
  const shown = (100 * share).toFixed(1);
  if (share > 0 && shown === "0.0") return "< 0.1 %";
  if (share < 1 && shown === "100.0") return "> 99.9 %";
  return `${shown} %`;
}

export function count(number) {
  return number.toLocaleString("en");
}

export function milliseconds(number) {
  return `${number.toFixed(number < 10 ? 1 : 0)}\u00a0ms`;
}

export function span(seconds) {
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} minutes` : `${Math.round(seconds / 3600)} hours`;
}

export function shortDigest(digest) {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}
