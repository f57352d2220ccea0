"use strict";
// The page's theme, and the keys that go along a chart's values; nothing is fetched.
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function choose(theme) {
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

choose(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => choose(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => choose(root.dataset.theme === "dark" ? "light" : "dark"));
addEventListener("beforeprint", () => choose("light"));

const STEPS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };

for (const list of document.querySelectorAll(".points")) {
  const points = [...list.children];
  list.addEventListener("keydown", (event) => {
    const step = STEPS[event.key];
    if (!step) return;
    event.preventDefault();
    const at = Math.min(Math.max(points.indexOf(event.target) + step, 0), points.length - 1);
    event.target.tabIndex = -1;
    points[at].tabIndex = 0; // Tab goes in and out of a chart in one step
    points[at].focus();
  });
}
