"use strict";
// The explorer's page. Everything a store says is put in as text (textContent); the view is in the address (#...), so
// back, forward and bookmarks work.
const $ = (id) => document.getElementById(id);
const root = document.documentElement;
let stores = [];
let turn = 0; // answers to a view that is no longer wanted are dropped

const still = window.still; // of a folder that `explore --static` wrote: answers from its files

// A response; while a job behind it goes on, `working` is called with the share that is done, and it is asked for again.
async function got(path, options, working) {
  for (;;) {
    const response = await (still ? still.got(path, options) : fetch(path, options));
    if (response.ok && response.status !== 202) return response;
    const answer = await response.json().catch(() => ({ cause: `HTTP ${response.status}`, fix: "" }));
    if (!response.ok) throw new Error(answer.fix ? `${answer.cause} (${answer.fix})` : answer.cause);
    working?.(answer.share);
  }
}

async function ask(path, working) {
  return (await got(path, undefined, working)).json();
}

function element(kind, text, name) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function view() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const how of ["node", "key", "text"]) if (given.has(how)) return { how, what: given.get(how), store: Number(given.get("store") || 0) };
  return null;
}

function link(how, what, store) {
  const given = new URLSearchParams({ [how]: what });
  if (store) given.set("store", store);
  return `#${given}`;
}

function picture(store, node, alt) {
  const image = element("img");
  image.alt = alt;
  image.loading = "lazy";
  image.addEventListener("error", () => image.remove());
  image.src = still ? still.image(node) : `image/${store}/${node}`;
  return image;
}

// -- one side: a store's answer

function cards(store, neighbors) {
  const list = element("ul", undefined, "cards");
  for (const one of neighbors) {
    const card = $("card").content.cloneNode(true).firstElementChild;
    const text = one.text ?? `node ${one.node}`;
    card.dataset.similarity = one.similarity;
    card.dataset.node = one.node;
    card.dataset.text = text;
    card.querySelector(".open").href = link("node", one.node, store);
    if (one.image ?? stores[store].images) card.querySelector(".picture").append(picture(store, one.node, ""));
    card.querySelector(".similarity").textContent = one.match ?? one.similarity.toFixed(3);
    card.querySelector(".caption").textContent = text + (one.samples > 1 ? ` (x${one.samples})` : "");
    list.append(card);
  }
  return list;
}

function asked(store, node) {
  const box = element("div", undefined, "asked");
  if (node.sample?.image) box.append(picture(store, node.node, node.sample.caption ?? ""));
  const words = element("div");
  const text = element("p", node.text ?? `node ${node.node}`, "text");
  text.dir = "auto";
  const captions = node.sample?.more.length ? element("ul", undefined, "captions") : "";
  if (captions) {
    captions.setAttribute("aria-label", "Captions of the sample");
    captions.append(...node.sample.captions.map((one) => Object.assign(element("li", one), { dir: "auto" })));
  }
  const facts = element("dl");
  const fact = (name, value) => facts.append(element("dt", name), element("dd", value));
  fact("node", String(node.node));
  fact("samples", String(node.samples));
  if (node.sample) fact("key", node.sample.key);
  fact("all others", `similar by ${node.background.mean.toFixed(2)} on average, with a deviation of ${node.background.deviation.toFixed(2)}`);
  words.append(text, captions, facts);
  if (node.sample) {
    const copy = element("button", "Copy key", "copy");
    copy.type = "button";
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(node.sample.key);
      copy.textContent = "Copied";
    });
    words.append(copy);
  }
  box.append(words);
  return box;
}

async function fill(side, store, wanted, mine) {
  const count = $("count").value;
  let found;
  if (wanted.how === "text") {
    found = await ask(`api/${store}/search?${new URLSearchParams({ text: wanted.what, count })}`);
  } else {
    let node = wanted.what;
    if (wanted.how === "key") node = (await ask(`api/${store}/key?${new URLSearchParams({ key: wanted.what })}`)).node;
    if (node === null) throw new Error(`Not in ${stores[store].store}: no sample of it has the key ${wanted.what}`);
    found = await ask(`api/${store}/node/${encodeURIComponent(node)}?${new URLSearchParams({ count })}`);
  }
  if (mine !== turn) return;
  side.replaceChildren(...(stores.length > 1 ? [element("h3", stores[store].store)] : []));
  if (store === 0 && found.node !== undefined) mark(found.node);
  if (found.node !== undefined) side.append(asked(store, found));
  side.append(cards(store, found.neighbors));
}

// In the other store the same sample is meant: by its key, or, where there are none, by its number.
async function meant(wanted) {
  if (wanted.how !== "node" || stores.length < 2 || !stores.every((store) => store.keys)) return stores.map(() => wanted);
  const sample = (await ask(`api/${wanted.store}/node/${encodeURIComponent(wanted.what)}?count=1`)).sample;
  return stores.map((_, store) => (store === wanted.store ? wanted : { how: "key", what: sample.key }));
}

async function show() {
  const wanted = view();
  const mine = ++turn;
  $("problem").textContent = "";
  if (!wanted) return;
  $("how").value = wanted.how;
  $("what").value = wanted.what;
  $("status").textContent = "Searching ...";
  try {
    const each = await meant(wanted);
    const sides = stores.map(() => element("section", undefined, "side"));
    const ended = await Promise.allSettled(each.map((one, store) => fill(sides[store], store, one, mine)));
    if (mine !== turn) return;
    const problems = ended.map((one) => one.reason?.message);
    if (problems.every(Boolean)) throw new Error([...new Set(problems)].join("; "));
    for (const [store, problem] of problems.entries()) {
      if (problem) sides[store].replaceChildren(element("h3", stores[store].store), element("p", problem, "quiet"));
    }
    $("sides").replaceChildren(...sides);
    filter();
  } catch (error) {
    if (mine !== turn) return;
    $("problem").textContent = error.message;
    $("status").textContent = "";
    $("sides").replaceChildren(); // no answer to what was asked
  }
}

// -- filters, and what both stores list

function filter() {
  const least = Number($("least").value);
  $("least-shown").textContent = least.toFixed(2);
  const sides = [...document.querySelectorAll(".side")];
  const texts = sides.map((side) => new Set([...side.querySelectorAll(".card")].map((card) => card.dataset.text)));
  let shown = 0;
  let both = 0;
  for (const [at, side] of sides.entries()) {
    for (const card of side.querySelectorAll(".card")) {
      card.hidden = Number(card.dataset.similarity) < least;
      shown += !card.hidden;
      const shared = sides.length > 1 && texts[1 - at].has(card.dataset.text);
      card.classList.toggle("both", shared);
      both += shared && at === 0;
    }
  }
  if (!sides.length) return;
  $("status").textContent = `${shown} shown` + (sides.length > 1 ? `; ${both} in both lists (framed)` : "");
}

// -- start

function theme(name) {
  root.dataset.theme = name;
  $("theme").textContent = name === "dark" ? "Light" : "Dark";
}

$("theme").addEventListener("click", () => theme(root.dataset.theme === "dark" ? "light" : "dark"));
theme(matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const what = $("what").value.trim();
  const words = $("how").value === "node" && !/^\d+$/.test(what) && !$("how").options[0].disabled; // no number: a text
  const hash = link(words ? "text" : $("how").value, what, 0);
  if (location.hash === hash) show();
  else location.hash = hash;
});
$("random").addEventListener("click", () => { location.hash = link("node", still ? still.any() : Math.floor(Math.random() * stores[0].nodes), 0); });
$("least").addEventListener("input", filter);
$("count").addEventListener("change", show);
addEventListener("hashchange", show);

async function start() {
  document.body.classList.toggle("still", Boolean(still));
  try {
    stores = await ask("api/stores");
  } catch (error) {
    $("problem").textContent = error.message;
    return;
  }
  $("stores").replaceChildren(...stores.map((one) => element("li",
    `${one.store}: ${one.nodes.toLocaleString("en")} nodes, k = ${one.k}, recall ${one.recall.toFixed(4)}, ${one.encoder}`)));
  if (stores.length > 1) $("map-title").textContent = `Map of ${stores[0].store}`;
  $("how").options[0].disabled = !stores.every((one) => one.searchable);
  $("how").options[1].disabled = !stores.every((one) => one.keys);
  if ($("how").options[0].disabled) $("how").value = $("how").options[1].disabled ? "node" : "key";
  if (stores[0].mapped) draw();
  if (view()) show();
  else location.hash = link("node", 0, 0);
}
