"use strict";
// Curves: a figure with data-readout shows the values at the step that the pointer, a finger or the arrow keys select.
for (const figure of document.querySelectorAll("figure[data-readout]")) {
  const svg = figure.querySelector("svg"), out = figure.querySelector(".readout");
  const { box, xlim, unit, curves } = JSON.parse(figure.dataset.readout);
  const [left, top, right, bottom] = box;
  const steps = [...new Set(curves.flatMap(curve => curve.x))].sort((a, b) => a - b);
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", top);
  line.setAttribute("y2", bottom);
  let at = -1;
  const nearest = (sorted, value) => sorted.reduce(
    (best, one, index) => Math.abs(one - value) < Math.abs(sorted[best] - value) ? index : best, 0);
  const show = index => {
    at = Math.max(0, Math.min(steps.length - 1, index));
    const step = steps[at], x = left + (step - xlim[0]) / (xlim[1] - xlim[0]) * (right - left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    if (!line.isConnected) svg.append(line);
    out.textContent = `${unit} ${step.toLocaleString("en")}: ` + curves.map(curve => {
      const near = nearest(curve.x, step), value = curve.y[near], error = curve.e ? ` ± ${curve.e[near]}` : "";
      const where = curve.x[near] === step ? "" : ` (${unit} ${curve.x[near].toLocaleString("en")})`;
      return `${curve.name} ${value === null ? "-" : value}${error}${where}`;
    }).join(" · ");
  };
  const hide = () => {
    out.textContent = "";
    line.remove();
  };
  const point = event => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    show(nearest(steps, xlim[0] + (place.x - left) / (right - left) * (xlim[1] - xlim[0])));
  };
  svg.setAttribute("tabindex", "0");
  svg.addEventListener("pointermove", point);
  svg.addEventListener("pointerdown", point);
  // Lifting a finger also fires pointerleave; keep the values that it selected.
  svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  svg.addEventListener("blur", () => hide());
  svg.addEventListener("keydown", event => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
// Marks: a mark that is pointed at, tapped or focused is described below its figure and highlighted in the table and the other figures.
for (const mark of document.querySelectorAll(".mark")) {
  const show = () => {
    for (const one of document.querySelectorAll("[data-mark].on")) one.classList.remove("on");
    for (const one of document.querySelectorAll(`[data-mark="${CSS.escape(mark.dataset.mark)}"]`)) one.classList.add("on");
    mark.closest("figure").querySelector(".readout").textContent = mark.getAttribute("aria-label");
  };
  const hide = () => { mark.closest("figure").querySelector(".readout").textContent = ""; };
  mark.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
  mark.addEventListener("blur", hide);
  for (const kind of ["pointerenter", "focus", "click"]) mark.addEventListener(kind, show);
}
