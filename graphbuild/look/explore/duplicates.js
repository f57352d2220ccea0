"use strict";
// Near-duplicates: what each threshold would drop, and pairs about it.
let steps = [];

function pairs(list, found, least) { // the stored float16 decides on which side a pair is: shown is this side
  list.replaceChildren(...found.map((pair) => {
    const item = element("li");
    const thousandths = Math.min(Math.max(Math.floor(1000 * pair.similarity), Math.round(1000 * least)), Math.round(1000 * least) + 4);
    item.append(element("span", (Math.min(thousandths, 1000) / 1000).toFixed(3), "similarity"));
    for (const [at, node] of pair.nodes.entries()) {
      const one = element("a", undefined, "half");
      if (!still || still.point(node) >= 0) one.href = link("node", node, 0);
      if (still ? still.hasImage(node) : stores[0].images) one.append(picture(0, node, ""));
      one.append(element("span", pair.texts[at] ?? `node ${node}`));
      one.lastChild.dir = "auto";
      item.append(one);
    }
    return item;
  }));
  if (!found.length) list.append(element("li", "no pair", "quiet"));
}

function border() {
  const at = Math.min(Math.max(Math.round((steps[0].threshold - Number($("threshold").value)) / 0.005), 0), steps.length - 1);
  const step = steps[at];
  const top = (value) => value.toFixed(3);
  $("threshold-shown").textContent = top(step.threshold);
  $("duplicates-says").textContent = `At ${top(step.threshold)}, ${step.drop.toLocaleString("en")} of ${steps.samples.toLocaleString("en")} samples (${(100 * step.drop / Math.max(steps.samples, 1)).toFixed(1)}%) would go, from ${step.groups.toLocaleString("en")} groups.`;
  $("mine").textContent = `graphbuild mine ${stores[0].store} --what duplicates --threshold ${step.threshold}`;
  $("above-title").textContent = at ? `Just above: ${top(step.threshold)} to ${top(step.threshold + 0.005)}` : "Just above: 1.000";
  $("below-title").textContent = `Just below: ${top(step.threshold - 0.005)} to ${top(step.threshold)}`;
  pairs($("above"), step.pairs, step.threshold);
  pairs($("below"), steps[at + 1]?.pairs ?? [], step.threshold - 0.005);
}

$("duplicates-show").addEventListener("click", async () => {
  $("duplicates-show").disabled = true;
  try {
    const found = await ask("api/0/duplicates");
    steps = Object.assign(found.steps, { samples: found.samples });
    Object.assign($("threshold"), { min: steps.at(-1).threshold, max: steps[0].threshold, value: Math.max(0.95, steps.at(-1).threshold) });
    $("duplicates-show").hidden = true;
    $("duplicates-parts").hidden = false;
    border();
  } catch (error) {
    $("duplicates-show").disabled = false;
    $("duplicates-says").textContent = error.message;
    $("duplicates-parts").hidden = false;
  }
});
$("threshold").addEventListener("input", border);

start();
