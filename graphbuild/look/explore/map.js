"use strict";
// The map: points by WebGL, marks and names on a canvas above them. A place is two numbers, 0..65534; point p is node
// chart.node(p). What is not selected (select.js) is dim.
const COLOURS = ["#0a84c6", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#a0661e", "#9b52b4", "#e7298a", "#66a61e", "#6c6cff", "#00a6a6"];
const OTHERS = "#8a9099"; // smaller communities, and what has no value
const RAMP = ["#3f6fd8", "#16a0a0", "#5fb04a", "#e0a800", "#d8453f"];
const QUARTERS = ["least:", "a quarter is at most", "half is at most", "three quarters are at most", "greatest:"];
const CORNER = 65535;
const PIECE = 1 << 20; // points of a request
const SMALL = 600; // pixels: screens up to this width get the first piece alone
const VERTEX = `attribute vec2 place; attribute float code; attribute float dim;
uniform vec2 centre; uniform vec2 zoom; uniform float size; uniform float alpha; uniform sampler2D palette; varying vec4 colour;
void main() {
  gl_Position = min(place.x, place.y) > 65534.5 ? vec4(2., 2., 2., 1.) : vec4((place - centre) * zoom, 0., 1.);
  gl_PointSize = size;
  colour = vec4(texture2D(palette, vec2((code + .5) / 256., .5)).rgb, dim > .5 ? .05 : alpha);
}`;
const FRAGMENT = `precision mediump float; varying vec4 colour;
void main() { if (length(gl_PointCoord - .5) > .5) discard; gl_FragColor = colour; }`;
const chart = { about: null, count: 0, places: null, codes: null, by: "community", dims: null, kept: null, where: "", corners: null, chosen: -1, x: 32767, y: 32767, zoom: 1, drawing: false, printing: false };
let gl;

function program() {
  gl = $("points").getContext("webgl", { alpha: true, premultipliedAlpha: false, antialias: false });
  if (!gl) throw new Error("This browser draws no WebGL, which the map needs");
  const made = gl.createProgram();
  for (const [kind, text] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
    const shader = gl.createShader(kind);
    gl.shaderSource(shader, text);
    gl.compileShader(shader);
    gl.attachShader(made, shader);
  }
  gl.linkProgram(made);
  gl.useProgram(made);
  gl.enable(gl.BLEND);
  gl.blendFuncSeparate(gl.SRC_ALPHA, gl.ONE_MINUS_SRC_ALPHA, gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  for (const side of [gl.TEXTURE_MIN_FILTER, gl.TEXTURE_MAG_FILTER]) gl.texParameteri(gl.TEXTURE_2D, side, gl.NEAREST);
  chart.at = (name) => gl.getUniformLocation(made, name);
  chart.buffers = {};
  for (const [name, width, kind] of [["place", 2, gl.UNSIGNED_SHORT], ["code", 1, gl.UNSIGNED_BYTE], ["dim", 1, gl.UNSIGNED_BYTE]]) {
    gl.bindBuffer(gl.ARRAY_BUFFER, chart.buffers[name] = gl.createBuffer());
    const place = gl.getAttribLocation(made, name);
    gl.enableVertexAttribArray(place);
    gl.vertexAttribPointer(place, width, kind, false, 0, 0);
  }
}

function fillBuffer(name, values) {
  gl.bindBuffer(gl.ARRAY_BUFFER, chart.buffers[name]);
  gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW);
}

// -- what is seen

function size() {
  const box = $("map").getBoundingClientRect();
  return [Math.max(box.width, 1), Math.max(box.height, 1)];
}

function whole() {
  const [width, height] = size();
  const [left, top, right, bottom] = chart.about.box;
  chart.base = 0.94 * Math.min(width / Math.max(right - left, 99), height / Math.max(bottom - top, 99));
  Object.assign(chart, { x: (left + right) / 2, y: (top + bottom) / 2, zoom: chart.base });
  paint();
}

function toScreen(x, y) {
  const [width, height] = size();
  return [(x - chart.x) * chart.zoom + width / 2, (y - chart.y) * chart.zoom + height / 2];
}

function toPlace(across, down) {
  const [width, height] = size();
  return [(across - width / 2) / chart.zoom + chart.x, (down - height / 2) / chart.zoom + chart.y];
}

function zoomBy(factor, across, down) {
  const [width, height] = size();
  const [x, y] = toPlace(across ?? width / 2, down ?? height / 2);
  const zoom = Math.min(Math.max(chart.zoom * factor, chart.base / 4), 64);
  chart.x = x - (x - chart.x) * chart.zoom / zoom;
  chart.y = y - (y - chart.y) * chart.zoom / zoom;
  chart.zoom = zoom;
  paint();
}

let wanted = 0;
function paint() {
  cancelAnimationFrame(wanted);
  wanted = requestAnimationFrame(paintNow);
}

function paintNow() {
  const [width, height] = size();
  const ratio = devicePixelRatio || 1;
  for (const canvas of [$("points"), $("marks")]) {
    const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
  }
  gl.viewport(0, 0, width * ratio, height * ratio);
  gl.clearColor(0, 0, 0, 0);
  gl.clear(gl.COLOR_BUFFER_BIT);
  const nearer = chart.zoom / chart.base;
  const wide = Math.min(Math.max(0.5 * Math.sqrt(width * height / chart.count), 1.2), 5) * Math.min(Math.max(nearer, 1) ** 0.45, 5);
  gl.uniform2f(chart.at("centre"), chart.x, chart.y);
  gl.uniform2f(chart.at("zoom"), 2 * chart.zoom / width, -2 * chart.zoom / height);
  gl.uniform1f(chart.at("size"), Math.min(wide, 14) * ratio);
  gl.uniform1f(chart.at("alpha"), Math.min(Math.max(3e5 * nearer / chart.count, 0.3), 0.85));
  gl.drawArrays(gl.POINTS, 0, chart.count);
  marks(width, height, ratio);
}

function marks(width, height, ratio) {
  const pen = $("marks").getContext("2d");
  const style = getComputedStyle(root);
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  if (chart.printing) pen.drawImage($("points"), 0, 0, width, height); // by then WebGL's own canvas is empty
  pen.strokeStyle = pen.fillStyle = style.getPropertyValue("--text");
  if (chart.corners) {
    pen.beginPath();
    for (const corner of chart.corners) pen.lineTo(...toScreen(...corner));
    if (!chart.drawing) pen.closePath();
    pen.lineWidth = 2;
    pen.setLineDash([6, 4]);
    pen.stroke();
    pen.setLineDash([]);
  }
  const ring = chart.chosen < 0 ? null : toScreen(chart.places[2 * chart.chosen], chart.places[2 * chart.chosen + 1]);
  if (chart.by === "community") {
    const taken = ring ? [[ring[0], ring[1] + 4, 12]] : [];
    pen.font = "600 12px system-ui, sans-serif";
    pen.textAlign = "center";
    pen.lineJoin = "round";
    for (const one of chart.about.communities) {
      if (one.x === undefined || one.size < 2) continue;
      const text = one.name.length > 26 ? `${one.name.slice(0, 25)}…` : one.name;
      const half = pen.measureText(text).width / 2 + 4;
      const [x, middle] = toScreen(one.x, one.y);
      const y = [middle, middle - 20, middle + 20].find((at) => !taken.some(([a, b, other]) => Math.abs(a - x) < half + other && Math.abs(b - at) < 18));
      if (y === undefined || x < half || x > width - half || y < 14 || y > height - 6) continue;
      taken.push([x, y, half]);
      pen.lineWidth = 4;
      pen.strokeStyle = style.getPropertyValue("--page");
      pen.strokeText(text, x, y);
      pen.fillText(text, x, y);
    }
    pen.strokeStyle = style.getPropertyValue("--text");
  }
  if (ring) {
    pen.lineWidth = 3;
    pen.beginPath();
    pen.arc(...ring, 9, 0, 7);
    pen.stroke();
  }
}

// -- points

function nearest(across, down, within) {
  const [x, y] = toPlace(across, down);
  let best = -1;
  let least = (within / chart.zoom) ** 2;
  for (let p = 0; p < chart.count; p++) {
    const distance = (chart.places[2 * p] - x) ** 2 + (chart.places[2 * p + 1] - y) ** 2;
    if (distance < least && !chart.dims[p]) {
      best = p;
      least = distance;
    }
  }
  return best;
}

function beside(key) {
  const from = Math.max(chart.chosen, 0);
  const [ux, uy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  let best = -1;
  let least = Infinity;
  for (let p = 0; p < chart.count; p++) {
    if (chart.dims[p] || Math.min(chart.places[2 * p], chart.places[2 * p + 1]) === CORNER) continue;
    const dx = chart.places[2 * p] - chart.places[2 * from];
    const dy = chart.places[2 * p + 1] - chart.places[2 * from + 1];
    const along = dx * ux + dy * uy;
    const distance = along + 2 * Math.abs(dx * uy - dy * ux);
    if (along * chart.zoom > 4 && distance < least) {
      best = p;
      least = distance;
    }
  }
  return best;
}

let telling = 0;
async function tell(point) {
  const mine = ++telling;
  const node = chart.node(point);
  const found = await ask(`api/0/node/${node}?count=1`).catch((error) => ({ text: error.message }));
  if (mine === telling) $("map-point").textContent = `node ${node}: ${found.text ?? ""}`;
}

function choose(point) {
  chart.chosen = point;
  const [x, y] = toScreen(chart.places[2 * point], chart.places[2 * point + 1]);
  const [width, height] = size();
  if (x < 0 || y < 0 || x > width || y > height) [chart.x, chart.y] = [chart.places[2 * point], chart.places[2 * point + 1]];
  tell(point);
  paint();
}

function mark(node) { // the node that the page shows
  if (!chart.about) return;
  const point = chart.point(node);
  chart.chosen = point < chart.count ? point : -1;
  paint();
}

// -- colours

async function coloured(by) {
  const content = new Uint8Array(await (await got(`api/0/colour?${new URLSearchParams({ by })}`)).arrayBuffer());
  const line = content.indexOf(10);
  return [JSON.parse(new TextDecoder().decode(content.subarray(0, line))), content.subarray(line + 1)];
}

function rgb(hex) {
  return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

function chooseColour() {
  $("colour-by").hidden = $("colour").value !== "";
  if ($("colour").value) colour($("colour").value);
  else $("colour-by").focus();
}

let colouring = 0;
async function colour(by) {
  const mine = ++colouring;
  try {
    const [legend, codes] = await coloured(by);
    if (mine !== colouring) return;
    const numbers = legend.kind === "numbers";
    const palette = new Uint8Array(1024);
    const shade = (code) => {
      if (code === 255) return rgb(OTHERS);
      if (!numbers) return rgb(legend.kind === "truth" ? [OTHERS, COLOURS[1]][code] ?? OTHERS : COLOURS[code] ?? OTHERS);
      const at = code / 254 * (RAMP.length - 1);
      const low = Math.min(Math.floor(at), RAMP.length - 2);
      return rgb(RAMP[low]).map((value, i) => value + (at - low) * (rgb(RAMP[low + 1])[i] - value));
    };
    for (let code = 0; code < 256; code++) palette.set([...shade(code), 255], 4 * code);
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, 256, 1, 0, gl.RGBA, gl.UNSIGNED_BYTE, palette);
    Object.assign(chart, { codes, by });
    fillBuffer("code", codes);
    const entries = numbers ? legend.ticks.map((value, at) => [RAMP[at], `${QUARTERS[at]} ${Number(value.toPrecision(4)).toLocaleString("en")}`])
      : legend.names.map((one, at) => [`rgb(${shade(at)})`, `${one.name} (${one.size.toLocaleString("en")})`]);
    if (legend.none) entries.push([OTHERS, `no value (${legend.none.toLocaleString("en")})`]);
    $("map-legend").replaceChildren(...entries.map(([paint, text]) => {
      const item = element("li");
      const swatch = element("span", undefined, "swatch");
      swatch.style.background = paint;
      item.append(swatch, element("span", text));
      item.lastChild.dir = "auto";
      return item;
    }));
    $("map-legend").setAttribute("aria-label", `Colours by ${by}`);
    $("colour-says").textContent = "";
    paint();
  } catch (error) {
    if (mine === colouring) $("colour-says").textContent = `The colours are still those by ${chart.by}: ${error.message}`;
  }
}

// -- hands

const fingers = new Map();
let moved = 0;

function place(event) {
  const box = $("map").getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function down(event) {
  $("map").setPointerCapture(event.pointerId);
  fingers.set(event.pointerId, place(event));
  moved = fingers.size > 1 ? 99 : 0;
  chart.drawing = fingers.size === 1 && $("lasso").getAttribute("aria-pressed") === "true";
  if (chart.drawing) chart.corners = [toPlace(...place(event))];
}

let resting = 0;
function move(event) {
  const [x, y] = place(event);
  const before = fingers.get(event.pointerId);
  if (!before) {
    clearTimeout(resting);
    resting = setTimeout(() => {
      const point = nearest(x, y, 8);
      if (point >= 0) tell(point);
    }, 120);
    return;
  }
  moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
  if (chart.drawing) {
    chart.corners.push(toPlace(x, y));
    paint();
  } else if (fingers.size === 2) {
    const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
    zoomBy(Math.hypot(x - other[0], y - other[1]) / Math.max(Math.hypot(before[0] - other[0], before[1] - other[1]), 1), (x + other[0]) / 2, (y + other[1]) / 2);
  } else {
    chart.x -= (x - before[0]) / chart.zoom;
    chart.y -= (y - before[1]) / chart.zoom;
    paint();
  }
  fingers.set(event.pointerId, [x, y]);
}

function up(event) {
  if (!fingers.delete(event.pointerId)) return;
  if (chart.drawing) {
    chart.drawing = false;
    if (chart.corners.length < 3) chart.corners = null;
    setLasso(false);
    dim();
  } else if (moved < 6 && event.type === "pointerup") {
    const point = nearest(...place(event), 14);
    if (point >= 0) location.hash = link("node", chart.node(point), 0);
  }
}

function pressed(event) {
  const [dx, dy] = { ArrowLeft: [-60, 0], ArrowRight: [60, 0], ArrowUp: [0, -60], ArrowDown: [0, 60] }[event.key] ?? [0, 0];
  if (dx || dy) {
    event.preventDefault();
    if (event.shiftKey) {
      [chart.x, chart.y] = [chart.x + dx / chart.zoom, chart.y + dy / chart.zoom];
      paint();
    } else {
      const next = chart.chosen < 0 ? 0 : beside(event.key);
      if (next >= 0) choose(next);
    }
  } else if (event.key === "Enter" && chart.chosen >= 0) location.hash = link("node", chart.node(chart.chosen), 0);
  else if (event.key === "+" || event.key === "=") zoomBy(1.5);
  else if (event.key === "-") zoomBy(1 / 1.5);
  else if (event.key === "0") whole();
}

// -- start

async function draw() { // once: a map that is there is drawn with the page, which a click may precede
  if ($("map-show").disabled) return;
  $("map-show").disabled = true;
  try {
    const about = await ask("api/0/map", (share) => { $("map-note").textContent = `The map is being made: ${Math.round(100 * (share ?? 0))}%`; });
    program();
    const total = innerWidth <= SMALL ? Math.min(about.points, PIECE) : about.points;
    chart.places = new Uint16Array(2 * total);
    chart.dims = new Uint8Array(total);
    chart.node = (point) => still ? still.ids[point] : point * about.stride % about.nodes;
    const back = still ? 0n : inverse(BigInt(about.stride), BigInt(about.nodes));
    chart.point = (node) => still ? still.point(node) : Number(BigInt(node) * back % BigInt(about.nodes));
    chart.about = about;
    document.body.classList.add("mapped");
    $("map-show").hidden = true;
    $("map-parts").hidden = false;
    const choices = about.columns.map((name) => new Option(name));
    $("colour").replaceChildren(...choices, ...(still ? [] : [new Option("another expression ...", "")]));
    $("column-names").textContent = about.columns.join(", ");
    if (about.free_name) $("name").value = about.free_name;
    whole();
    while (chart.count < total) {
      const piece = Math.min(PIECE, total - chart.count);
      chart.places.set(new Uint16Array(await (await got(`api/0/places?begin=${chart.count}&count=${piece}`)).arrayBuffer()), 2 * chart.count);
      chart.count += piece;
      fillBuffer("place", chart.places);
      fillBuffer("dim", chart.dims);
      if (!chart.codes) await colour(chart.by);
      if (chart.kept || chart.corners) dim();
      $("map-note").textContent = `${chart.count < about.nodes ? `${chart.count.toLocaleString("en")} of ` : ""}${about.nodes.toLocaleString("en")} nodes, placed by the stored graph: of a node's ${about.near} nearest, ${Math.round(100 * about.kept)}% are among the ${about.near} nearest here.`;
      paint();
    }
    show(); // marks the node
  } catch (error) {
    $("map-show").disabled = false;
    $("map-note").textContent = error.message;
  }
}

function inverse(a, n) { // of a modulo n
  let [r, next, s, t] = [n, a % n, 0n, 1n];
  while (next > 0n) [r, next, s, t] = [next, r % next, t, s - r / next * t];
  return ((s % n) + n) % n;
}

$("map-show").addEventListener("click", draw);
$("colour").addEventListener("change", chooseColour);
$("colour-by").addEventListener("change", () => colour($("colour-by").value));
$("closer").addEventListener("click", () => zoomBy(1.5));
$("farther").addEventListener("click", () => zoomBy(1 / 1.5));
$("whole").addEventListener("click", whole);
for (const [kind, hand] of [["pointerdown", down], ["pointermove", move], ["pointerup", up], ["pointercancel", up]]) $("map").addEventListener(kind, hand);
$("map").addEventListener("wheel", (event) => { event.preventDefault(); zoomBy(2 ** (-event.deltaY / 300), ...place(event)); }, { passive: false });
$("map").addEventListener("keydown", pressed);
const settle = () => { // beside longer neighbours, the end of the section stays in view
  $("map-section").style.top = `${Math.min(0, innerHeight - $("map-section").offsetHeight)}px`;
  if (chart.about) paint();
};
const sizes = new ResizeObserver(settle);
for (const id of ["map", "map-section"]) sizes.observe($(id));
addEventListener("resize", settle);
new MutationObserver(() => { if (chart.about) paint(); }).observe(root, { attributes: true });

let themed;
addEventListener("beforeprint", () => { // on white paper
  themed = root.dataset.theme;
  root.dataset.theme = "light";
  chart.printing = true;
  if (chart.about) paintNow();
});
addEventListener("afterprint", () => {
  root.dataset.theme = themed;
  chart.printing = false;
});
