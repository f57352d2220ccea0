"use strict";
// The explorer without a server: the same answers, from the files beside the page.
window.still = (() => {
  const files = new Map(); // name -> promise of its bytes or JSON
  let about;
  let places = new Map(); // node -> point
  let images = new Set(); // nodes that have one
  const still = { ids: new Uint32Array(0) };

  function read(name, kind) {
    if (location.protocol === "file:") throw new Error("A browser reads these files from a web server only: run `python -m http.server` in this folder, and open http://localhost:8000");
    if (!files.has(name)) files.set(name, fetch(`data/${name}`).then((response) => {
      if (!response.ok) throw new Error(`data/${name}: HTTP ${response.status}`);
      return response[kind]();
    }));
    return files.get(name);
  }

  async function begin() {
    about = await read("map.json", "json");
    still.ids = new Uint32Array(await read("ids.bin", "arrayBuffer"));
    places = new Map(Array.from(still.ids, (node, point) => [node, point]));
    images = new Set(about.images);
  }
  let begun;

  still.point = (node) => places.get(Number(node)) ?? -1;
  still.any = () => still.ids[Math.floor(Math.random() * still.ids.length)] ?? 0;
  still.image = (node) => `image/${node}.jpg`;
  still.hasImage = (node) => images.has(Number(node));

  function chunk(number) {
    return read(`nodes-${number}.json`, "json");
  }

  async function entry(node) {
    const point = still.point(node);
    if (point < 0) throw new Error(`node ${node} is not in this sample of the graph`);
    return (await chunk(Math.floor(point / about.chunk)))[point % about.chunk];
  }

  async function near(node, similarity) {
    const one = await entry(node);
    return { node, similarity, samples: one.samples, text: one.text, image: images.has(node) };
  }

  async function described(node, count) {
    const one = await entry(node);
    const captions = one.captions ?? [one.text];
    const sample = one.keys && { key: one.keys[0], row: one.row, caption: captions[0], captions, more: captions.slice(1), image: images.has(node) };
    const neighbors = await Promise.all(one.neighbors.slice(0, count).map((other, at) => near(other, one.similarities[at])));
    return { ...await near(node, 1), sample, background: { mean: one.background[0], deviation: one.background[1] }, neighbors };
  }

  async function* entries() { // all of them, with their points
    for (let number = 0; number * about.chunk < still.ids.length; number++) {
      for (const [at, one] of (await chunk(number)).entries()) yield [number * about.chunk + at, one];
    }
  }

  async function search(text, count) { // by the words: there is no encoder here
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const found = [];
    for await (const [point, one] of entries()) {
      const lower = (one.text ?? "").toLowerCase();
      const held = words.filter((word) => lower.includes(word)).length;
      if (held) found.push([held, still.ids[point]]);
    }
    found.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const match = (held) => held < words.length ? `word match ${held}/${words.length}` : "word match";
    return { neighbors: await Promise.all(found.slice(0, count).map(async ([held, node]) => ({ ...await near(node), match: match(held) }))) };
  }

  async function byKey(key) {
    for await (const [point, one] of entries()) if (one.keys?.includes(key)) return { node: still.ids[point] };
    return { node: null };
  }

  async function answer(path) {
    await (begun ??= begin());
    const url = new URL(path, location.href);
    const asked = url.searchParams;
    const name = url.pathname.slice(url.pathname.lastIndexOf("api/") + 4).replace(/^\d+\//, "");
    const count = Number(asked.get("count") ?? 24);
    if (["stores", "map", "duplicates"].includes(name)) return read(`${name}.json`, "json");
    if (name.startsWith("node/")) return described(Number(name.slice(5)), count);
    if (name === "search") return search(asked.get("text"), count);
    if (name === "key") return byKey(asked.get("key"));
    if (name === "places") return (await read("places.bin", "arrayBuffer")).slice(4 * asked.get("begin"), 4 * (Number(asked.get("begin")) + count));
    const at = about.columns.indexOf(asked.get("by"));
    if (name === "colour" && at >= 0) return read(`colour-${at}.bin`, "arrayBuffer");
    throw new Error(`Without a server there are only these: ${about.columns.join(", ")}`);
  }

  still.got = async (path) => {
    const found = await answer(path);
    return new Response(found instanceof ArrayBuffer ? found : JSON.stringify(found));
  };

  still.save = async (name, isSelected) => { // keys, one a line, as `graphbuild select --keep` takes them
    const keys = new Set();
    let left_out = 0;
    for await (const [point, one] of entries()) {
      if (!isSelected(point)) continue;
      for (const key of one.keys ?? []) keys.add(key);
      left_out += one.left_out ?? 0;
    }
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([...keys].map((key) => `${key}\n`), { type: "text/plain" }));
    link.download = `${name}.txt`;
    link.click();
    return { keys: keys.size, left_out };
  };
  return still;
})();
