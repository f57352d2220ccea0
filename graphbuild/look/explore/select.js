"use strict";
// What is selected on the map: by a lasso, by what is in view, by a filter. Saved is what is shown.

// Which places lie in a polygon, by the even-odd rule: a function of their two numbers. Where edges cross each row of
// places is found once. The comparisons are those of map.py's `_inside`, so that both select the same points.
function insideOf(corners) {
  const [xs, ys] = [0, 1].map((side) => Float64Array.from(corners, (corner) => corner[side]));
  const crossed = (use) => {
    for (let a = 0, b = xs.length - 1; a < xs.length; b = a++) {
      const end = Math.min(Math.max(ys[a], ys[b]), CORNER);
      for (let y = Math.max(Math.ceil(Math.min(ys[a], ys[b])), 0); y < end; y++) use(y, a, b);
    }
  };
  const first = new Uint32Array(CORNER + 2); // crossing of each row
  crossed((y) => { first[y + 1]++; });
  for (let y = 0; y <= CORNER; y++) first[y + 1] += first[y];
  const next = first.slice();
  const crossings = new Float64Array(first[CORNER + 1]);
  crossed((y, a, b) => { crossings[next[y]++] = xs[a] + (y - ys[a]) / (ys[b] - ys[a]) * (xs[b] - xs[a]); });
  return (x, y) => {
    let odd = 0;
    for (let at = first[y]; at < first[y + 1]; at++) odd ^= Number(x < crossings[at]);
    return odd === 1;
  };
}

let left = 0; // points that are selected
function dim() {
  const { places, kept, dims, count } = chart;
  const inside = chart.corners && insideOf(chart.corners);
  let out = 0; // a local variable: this goes over millions
  for (let p = 0; p < count; p++) {
    const dimmed = (kept && kept[p] !== 1) || (inside && !inside(places[2 * p], places[2 * p + 1])) ? 1 : 0;
    dims[p] = dimmed;
    out += dimmed;
  }
  left = count - out;
  fillBuffer("dim", dims);
  tellSelected();
  paint();
}

function tellSelected(before = "") {
  const any = Boolean(chart.kept || chart.corners);
  const changed = $("where").value.trim() !== chart.where;
  $("save").disabled = !any || !left || changed;
  const told = [before, any ? `${left.toLocaleString("en")} of ${chart.count.toLocaleString("en")} points are selected.` : "",
    changed ? "The filter in the box is not applied: apply it, or clear it, before you save." : ""];
  const text = told.filter(Boolean).join(" ");
  if ($("selected").textContent !== text) $("selected").textContent = text; // once: it is read aloud
}

let filtering = 0;
async function filterMap(event) {
  event.preventDefault();
  const mine = ++filtering;
  const where = $("where").value.trim();
  if (where) $("selected").textContent = "Reading the samples ...";
  try {
    const [legend, codes] = where ? await coloured(where) : [null, null];
    if (legend && legend.kind !== "truth") throw new Error("A filter is true or false of a sample, such as LENGTH(caption) < 20");
    if (mine !== filtering) return;
    Object.assign(chart, { kept: codes, where });
    dim();
  } catch (error) {
    if (mine === filtering) tellSelected(`${error.message}.`);
  }
}

function clear() {
  filtering++;
  Object.assign(chart, { kept: null, where: "", corners: null });
  $("where").value = "";
  dim();
}

async function save() {
  $("selected").textContent = "Writing ...";
  const name = $("name").value.trim();
  try {
    if (still) {
      const found = await still.save(name, (point) => !chart.dims[point]);
      const more = found.left_out ? `; of captions with very many samples, ${found.left_out.toLocaleString("en")} samples are left out` : "";
      $("selected").textContent = `${found.keys.toLocaleString("en")} keys of ${stores[0].samples.toLocaleString("en")} samples, in ${name}.txt${more}: graphbuild select STORE ${name} --keep ${name}.txt`;
      return;
    }
    const wish = { name, where: chart.where || null, polygon: chart.corners };
    const made = await (await got("api/0/select", { method: "POST", body: JSON.stringify(wish) })).json();
    $("selected").textContent = `${made.kept.toLocaleString("en")} samples, in ${made.file}${made.replaced ? " (replaced: there was a selection of this name)" : ""}`;
    if (name.startsWith("from-map")) $("name").value = made.free_name;
  } catch (error) {
    tellSelected(`${error.message}.`);
  }
}

function setLasso(on) {
  $("lasso").setAttribute("aria-pressed", String(on));
  $("map").classList.toggle("lassoing", on);
}

function selectView() {
  const [width, height] = size();
  chart.corners = [[0, 0], [width, 0], [width, height], [0, height]].map(([x, y]) => toPlace(x, y));
  dim();
}

$("lasso").addEventListener("click", () => setLasso($("lasso").getAttribute("aria-pressed") !== "true"));
$("in-view").addEventListener("click", selectView);
$("select").addEventListener("submit", filterMap);
$("where").addEventListener("input", () => tellSelected());
$("clear").addEventListener("click", clear);
$("save").addEventListener("click", save);
