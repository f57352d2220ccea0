"use strict";
// Draws the figures of the page's data, in the colours of its theme; nothing is fetched.
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function colours() {
  const style = getComputedStyle(root);
  const of = (name) => style.getPropertyValue(name).trim();
  const axis = { gridcolor: of("--line"), zerolinecolor: of("--line"), linecolor: of("--quiet") };
  return { text: of("--text"), page: of("--page"), axis };
}

function layout(figure) {
  const { text, page, axis } = colours();
  return {
    ...figure.layout,
    xaxis: { ...figure.layout.xaxis, ...axis },
    yaxis: { ...figure.layout.yaxis, ...axis },
    font: { color: text, family: "system-ui, sans-serif", size: 13 },
    paper_bgcolor: page,
    plot_bgcolor: page,
    margin: { t: 16, r: 12, b: 48, l: 56 },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
    hovermode: "closest",
  };
}

function draw() {
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, layout(figure), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function choose(theme) {
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "Light" : "Dark";
  draw();
}

choose(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => choose(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => choose(root.dataset.theme === "dark" ? "light" : "dark"));
addEventListener("beforeprint", () => choose("light"));
