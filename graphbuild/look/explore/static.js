"use strict";
// The explorer without a server: the same answers, from the files beside the page.
window.still = (() => {
  const files = new Map(); // name -> promise of its bytes or JSON
  let about;
  let places = new Map(); // node -> point
  const still = { ids: new Uint32Array(0) };

  function read(name, kind) {
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
  }
  const begun = begin();
  const withImage = new Set();

  still.point = (node) => places.get(Number(node)) ?? -1;
  still.any = () => still.ids[Math.floor(Math.random() * still.ids.length)] ?? 0;
  still.image = (node) => `image/${node}.jpg`;
  still.hasImage = (node) => withImage.has(Number(node));

  async function chunk(number) {
    const entries = await read(`nodes-${number}.json`, "json");
    for (const [at, one] of entries.entries()) if (one.image) withImage.add(still.ids[number * about.chunk + at]);
    return entries;
  }

  async function entry(node) {
    const point = still.point(node);
    if (point < 0) throw new Error(`node ${node} is not in this sample of the graph`);
    return (await chunk(Math.floor(point / about.chunk)))[point % about.chunk];
  }

  async function near(node, similarity) {
    const one = await entry(node);
    return { node, similarity, samples: one.samples, text: one.text, image: Boolean(one.image) };
  }

  async function described(node, count) {
    const one = await entry(node);
    const captions = one.captions ?? [one.text];
    const sample = one.key === undefined ? null : { key: one.key, row: one.row, caption: captions[0], captions, more: captions.slice(1), image: Boolean(one.image) };
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
      const share = words.filter((word) => lower.includes(word)).length / Math.max(words.length, 1);
      if (share) found.push([share, still.ids[point]]);
    }
    found.sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    return { neighbors: await Promise.all(found.slice(0, count).map(([share, node]) => near(node, share))) };
  }

  async function byKey(key) {
    for await (const [point, one] of entries()) if (one.key === key) return { node: still.ids[point] };
    return { node: null };
  }

  async function answer(path) {
    await begun;
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
    await begun;
    const keys = [];
    for await (const [point, one] of entries()) if (isSelected(point) && one.key !== undefined) keys.push(one.key);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([keys.map((key) => `${key}\n`).join("")], { type: "text/plain" }));
    link.download = `${name}.txt`;
    link.click();
    return keys.length;
  };
  return still;
})();
