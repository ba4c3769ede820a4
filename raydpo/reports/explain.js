"use strict";
// The slider selects one of the precomputed betas and shows its curves, bars and figures.
const slider = document.getElementById("beta");
const frames = JSON.parse(document.getElementById("frames").textContent);
const show = () => {
  const number = slider.value, frame = frames[number];
  for (const one of document.querySelectorAll("[data-frame]")) {
    if (one.dataset.frame === number) one.removeAttribute("display");
    else one.setAttribute("display", "none");
  }
  slider.setAttribute("aria-valuetext", `beta ${frame.beta}`);
  document.getElementById("told").textContent =
    `beta ${frame.beta}: expected reward ${frame.reward.toFixed(2)}, drift ${frame.drift.toFixed(2)} nats`;
  document.querySelectorAll("[data-answer]").forEach((cell, index) => { cell.textContent = frame.policy[index].toFixed(2); });
};
slider.addEventListener("input", show);
show();
