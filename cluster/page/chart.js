// Elements made by hand: every text goes in as text, never as HTML.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 120;
const HEIGHT = 32;

/** Make an element with a class and what is in it: elements, or text. */
export function element(tag, className, ...content) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...content);
  return made;
}

/** Draw figures over time, the latest at the right; `top` is the least that the full height means. */
export function drawChart(svg, figures, length, top) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.setAttribute("preserveAspectRatio", "none");
  if (figures.length < 2) return svg.replaceChildren();
  const highest = Math.max(top, ...figures);
  const step = WIDTH / (length - 1);
  const begin = WIDTH - step * (figures.length - 1);
  const points = figures.map(
    (figure, index) => `${(begin + index * step).toFixed(1)},${(HEIGHT - 1.5 - (figure / highest) * (HEIGHT - 3)).toFixed(1)}`,
  );
  svg.replaceChildren(
    shape("polygon", "area", [`${begin.toFixed(1)},${HEIGHT}`, ...points, `${WIDTH},${HEIGHT}`]),
    shape("polyline", "line", points),
  );
}

function shape(tag, className, points) {
  const made = document.createElementNS(SVG, tag);
  made.setAttribute("class", className);
  made.setAttribute("points", points.join(" "));
  return made;
}
