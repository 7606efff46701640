"use strict";
// Draws what page.json holds. Text from data only ever becomes text nodes or attributes, never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const samples = data.samples || {};
const tip = document.getElementById("tip");

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function number(value) {
  const size = Math.abs(value);
  if (size >= 1e4) return value.toLocaleString("en", {notation: "compact", maximumFractionDigits: 1});
  if (size > 0 && size < 1e-3) return value.toExponential(1);
  return String(Number(value.toPrecision(4)));
}

function showTip(x, y, ...children) {
  tip.replaceChildren(...children);
  tip.hidden = false;
  const {offsetWidth: width, offsetHeight: height} = tip;
  const left = x + 14 + width > innerWidth ? Math.max(4, x - 14 - width) : x + 14;
  const top = y + 14 + height > innerHeight ? Math.max(4, y - 14 - height) : y + 14;
  tip.style.left = `${left}px`;
  tip.style.top = `${top}px`;
}

const hideTip = () => { tip.hidden = true; };

function section(name, present) {
  const node = document.getElementById(name);
  node.hidden = !present;
  return present ? node : null;
}

// Round numbers between low and high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((factor) => factor * power >= rough) * power;
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

// ---- Training curves ----

const MODALITIES = ["image", "text", "audio"];
const DASHES = ["", "7 3", "2 2", "7 3 2 3", "12 4", "4 4"];
const UPKEEP = /^(samples_per_second|data_wait|memory_gb|resident_gb|skipped|cut_|learning_rate|non_finite)/;

// Curves of one quantity share a chart: rankme/image and rankme/text; retrieval/A_to_B/r1 of all A and B.
function chartOf(name) {
  const parts = name.split("/");
  const [first, last] = [parts[0], parts[parts.length - 1]];
  if (parts.length < 3) return [first, parts[1] || first];
  return [`${first} ${last}`, parts.slice(1, -1).join("/")];
}

function drawCurves() {
  const node = section("curves", data.curves);
  if (!node) return;
  const charts = new Map();
  const constant = [];
  for (const [name, points] of Object.entries(data.curves)) {
    if (points.every((point) => point[1] === points[0][1])) {
      constant.push(`${name} = ${number(points[0][1])}`);
      continue;
    }
    const [title, series] = chartOf(name);
    if (!charts.has(title)) charts.set(title, []);
    charts.get(title).push({name: series, points});
  }
  const [main, upkeep] = node.querySelectorAll(".charts");
  for (const [title, series] of charts) (UPKEEP.test(title) ? upkeep : main).append(drawChart(title, series));
  upkeep.parentNode.hidden = !upkeep.children.length;
  if (constant.length) node.querySelector(".constant").textContent = `The same throughout: ${constant.join(", ")}.`;
}

function drawChart(title, series) {
  const [width, height, left, right, top, bottom] = [360, 200, 46, 12, 8, 24];
  const all = series.flatMap((one) => one.points);
  const steps = all.map((point) => point[0]);
  const values = all.map((point) => point[1]);
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = 0.04 * (high - low);
  [low, high] = [low - margin, high + margin];
  const x = (step) => left + (width - left - right) * (last > first ? (step - first) / (last - first) : 0.5);
  const y = (value) => top + (height - top - bottom) * (high - value) / (high - low);

  const spoken = series.map((one) => {
    const [start, end] = [one.points[0], one.points[one.points.length - 1]];
    return `${one.name}: ${number(start[1])} at step ${start[0]}, ${number(end[1])} at step ${end[0]}`;
  });
  const picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "aria-label": `${title}. ${spoken.join("; ")}`});
  for (const value of ticks(low, high, 5)) {
    picture.append(
      svg("line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      svg("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"}, number(value)));
  }
  const marks = last > first ? ticks(first, last, 5) : [first];
  for (const step of marks) {
    picture.append(svg("text", {x: x(step), y: height - 8, "text-anchor": "middle"}, number(step)));
  }
  const legend = el("ul", {class: "legend"});
  series.forEach((one, i) => {
    const place = MODALITIES.indexOf(one.name);
    const colour = `var(--s${(place < 0 ? i : place) % 6})`;
    const path = one.points.map((point, j) => `${j ? "L" : "M"}${x(point[0]).toFixed(1)},${y(point[1]).toFixed(1)}`).join("");
    const dash = {"stroke-dasharray": DASHES[i % DASHES.length]};
    picture.append(svg("path", {class: "line", d: path, stroke: colour, ...dash}));
    if (one.points.length === 1) picture.append(svg("circle", {cx: x(one.points[0][0]), cy: y(one.points[0][1]), r: 3, fill: colour}));
    const key = svg("svg", {width: 24, height: 8, "aria-hidden": "true"}, svg("line", {x1: 0, x2: 24, y1: 4, y2: 4, stroke: colour, "stroke-width": 2, ...dash}));
    legend.append(el("li", {}, key, one.name));
  });

  const stops = [...new Set(steps)].sort((a, b) => a - b);
  const cursor = svg("line", {class: "cursor", y1: top, y2: height - bottom, visibility: "hidden"});
  picture.append(cursor);
  let at = stops.length - 1;
  function read(place, clientX, clientY) {
    at = Math.max(0, Math.min(stops.length - 1, place));
    const step = stops[at];
    for (const name of ["x1", "x2"]) cursor.setAttribute(name, x(step));
    cursor.setAttribute("visibility", "visible");
    const lines = series.flatMap((one) => one.points.filter((point) => point[0] === step).map(
      (point) => el("p", {}, series.length > 1 ? `${one.name}: ${number(point[1])}` : number(point[1]))));
    showTip(clientX, clientY, el("p", {}, el("b", {}, `step ${step}`)), ...lines);
  }
  function leave() {
    cursor.setAttribute("visibility", "hidden");
    hideTip();
  }
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const pointed = (event.clientX - box.left) / box.width * width;
    let nearest = 0;
    stops.forEach((step, i) => { if (Math.abs(x(step) - pointed) < Math.abs(x(stops[nearest]) - pointed)) nearest = i; });
    read(nearest, event.clientX, event.clientY);
  });
  picture.addEventListener("keydown", (event) => {
    const move = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (!move) return;
    event.preventDefault();
    const box = picture.getBoundingClientRect();
    read(at + move, box.left + x(stops[Math.max(0, Math.min(stops.length - 1, at + move))]) / width * box.width, box.top + 20);
  });
  picture.addEventListener("pointerleave", leave);
  picture.addEventListener("blur", leave);
  const figure = el("figure", {class: "chart"}, el("figcaption", {}, title), picture);
  if (series.length > 1) figure.append(legend);
  return figure;
}

// ---- Confusion matrix ----

function drawConfusion() {
  const node = section("confusion", data.confusion);
  if (!node) return;
  const select = node.querySelector("select");
  for (const task of Object.keys(data.confusion)) select.append(el("option", {value: task}, task));
  const draw = () => drawMatrix(node, data.confusion[select.value]);
  select.addEventListener("change", draw);
  draw();
}

function drawMatrix(node, {classes, counts}) {
  const head = el("tr", {}, el("td"));
  for (const name of classes) head.append(el("th", {scope: "col", title: name}, name));
  const body = el("tbody");
  const mistakes = [];
  counts.forEach((row, i) => {
    const total = row.reduce((sum, count) => sum + count, 0);
    const line = el("tr", {}, el("th", {scope: "row", title: classes[i]}, classes[i]));
    row.forEach((count, j) => {
      const share = total ? count / total : 0;
      const cell = el("td", {title: `${classes[i]} taken for ${classes[j]}: ${count} of ${total}`}, count ? String(count) : "·");
      cell.style.setProperty("--share", share.toFixed(3));
      cell.classList.toggle("none", !count);
      cell.classList.toggle("diagonal", i === j);
      cell.classList.toggle("strong", share > 0.65);
      cell.classList.toggle("middling", share > 0.42);
      line.append(cell);
      if (count && i !== j) mistakes.push([count, `${classes[i]} taken for ${classes[j]}`]);
    });
    body.append(line);
  });
  node.querySelector(".scroll").replaceChildren(el("table", {class: "matrix"}, el("thead", {}, head), body));
  mistakes.sort((a, b) => b[0] - a[0]);
  const worst = mistakes.slice(0, 5).map(([count, text]) => `${text} (${count})`).join(", ");
  node.querySelector(".mistakes").textContent = worst ? `Most frequent mistakes: ${worst}.` : "No mistakes.";
}

// ---- Samples ----

// A sample's key, class and media: of one modality, or of all that it has.
function card(id, modality, ...more) {
  const sample = samples[id];
  const wanted = modality ? [modality] : ["image", "text", "audio"];
  const node = el("div", {class: "card"}, el("span", {class: "kind"}, sample.class));
  for (const name of wanted.filter((one) => one in sample)) {
    if (name === "image") node.append(el("img", {src: sample.image, alt: `image of sample ${sample.key}`}));
    if (name === "text") node.append(el("p", {class: "words", dir: "auto", title: sample.text}, sample.text));
    if (name === "audio") node.append(el("audio", {controls: "", preload: "none", src: sample.audio, "aria-label": `sound of sample ${sample.key}`}));
  }
  for (const note of sample.notes.filter((one) => !modality || one.startsWith(modality) || !(modality in sample))) {
    node.append(el("span", {class: "key"}, note));
  }
  node.append(...more, el("span", {class: "key"}, sample.key));
  return node;
}

// ---- Map of the joint space ----

const SHAPES = [
  "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z", "M-3.6,-3.6h7.2v7.2h-7.2Z", "M0,-5L4.8,3.6L-4.8,3.6Z", "M0,-5.2L5.2,0L0,5.2L-5.2,0Z",
  "M-4.5,-1.5h3v-3h3v3h3v3h-3v3h-3v-3h-3Z",
];
const COLOURS = 10;

function drawMap() {
  const node = section("map", data.map);
  if (!node) return;
  node.querySelector(".caption").textContent = data.map.caption;
  const points = data.map.points.map(([x, y, modality, name, sample]) => ({x, y, modality, name, sample}));
  const modalities = [...new Set(points.map((point) => point.modality))];
  const sizes = new Map();
  for (const point of points) sizes.set(point.name, (sizes.get(point.name) || 0) + 1);
  const names = [...sizes.keys()].sort((a, b) => a.localeCompare(b, "en", {numeric: true}));
  // The largest classes have colours; the others share one.
  const largest = [...names].sort((a, b) => sizes.get(b) - sizes.get(a)).slice(0, COLOURS);
  const coloured = names.filter((name) => largest.includes(name));
  const form = node.querySelector("form");
  const [plot, legend, pinned] = [".plot", ".colours", ".pinned"].map((part) => node.querySelector(part));
  const select = form.querySelector("select");
  for (const name of names) select.append(el("option", {value: name}, name));
  const shapeOf = (modality) => SHAPES[modalities.indexOf(modality) % SHAPES.length];
  const swatch = (shape, colour) => svg("svg", {width: 14, height: 14, viewBox: "-7 -7 14 14", "aria-hidden": "true"},
    svg("path", {class: "swatch", d: shape, fill: colour}));
  for (const modality of modalities) {
    const box = el("input", {type: "checkbox", checked: "", value: modality});
    form.querySelector(".modalities").append(el("label", {}, box, swatch(shapeOf(modality), "var(--ink)"), modality));
  }

  const ends = ["x", "y"].map((axis) => points.map((point) => point[axis])).map((all) => [Math.min(...all), Math.max(...all)]);
  const [sides, centre] = [ends.map(([low, high]) => high - low), ends.map(([low, high]) => (low + high) / 2)];
  let [picture, width, height, chosen] = [null, 0, 0, null];
  const byClass = () => form.elements.colour.value === "class";
  function colourOf(point) {
    if (!byClass()) return `var(--s${modalities.indexOf(point.modality) % 6})`;
    const place = coloured.indexOf(point.name);
    return place < 0 ? "var(--other)" : `var(--c${place})`;
  }
  function lay() {
    width = Math.max(280, plot.clientWidth);
    height = Math.round(Math.min(640, Math.max(320, 0.7 * width)));
    // One scale for both axes: a distance is one in any direction.
    const scale = Math.min((width - 32) / (sides[0] || 1), (height - 32) / (sides[1] || 1));
    picture = svg("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0,
      "aria-label": `Map of ${points.length} points: ${modalities.join(", ")}; ${names.length} classes. Arrow keys go from point to point.`});
    for (const point of points) {
      point.left = width / 2 + scale * (point.x - centre[0]);
      point.top = height / 2 - scale * (point.y - centre[1]);
      point.node = svg("path", {class: "point", d: shapeOf(point.modality), transform: `translate(${point.left.toFixed(1)},${point.top.toFixed(1)})`});
      picture.append(point.node);
    }
    picture.addEventListener("pointermove", (event) => {
      const near = nearest(event);
      choose(near, event.clientX, event.clientY);
    });
    picture.addEventListener("pointerleave", () => choose(null));
    picture.addEventListener("blur", () => choose(null));
    picture.addEventListener("click", (event) => pin(nearest(event)));
    picture.addEventListener("keydown", step);
    plot.replaceChildren(picture);
    paint();
  }
  function paint() {
    const shown = new Set([...form.querySelectorAll(".modalities input:checked")].map((box) => box.value));
    for (const point of points) {
      point.visible = shown.has(point.modality);
      point.node.setAttribute("visibility", point.visible ? "visible" : "hidden");
      point.node.setAttribute("fill", colourOf(point));
      point.faint = select.value !== "" && point.name !== select.value;
      point.node.classList.toggle("faint", point.faint);
    }
    const keys = byClass()
      ? [...coloured.map((name, i) => [SHAPES[0], `var(--c${i})`, name]),
        ...(names.length > coloured.length ? [[SHAPES[0], "var(--other)", `${names.length - coloured.length} other classes`]] : [])]
      : modalities.map((modality, i) => [shapeOf(modality), `var(--s${i % 6})`, modality]);
    legend.replaceChildren(...keys.map(([shape, colour, name]) => el("li", {}, swatch(shape, colour), name)));
  }
  function nearest(event) {
    const box = picture.getBoundingClientRect();
    const [x, y] = [(event.clientX - box.left) / box.width * width, (event.clientY - box.top) / box.height * height];
    let [best, reach] = [null, 18 ** 2];
    for (const point of points) {
      const distance = (point.left - x) ** 2 + (point.top - y) ** 2;
      if (point.visible && !point.faint && distance < reach) [best, reach] = [point, distance];
    }
    return best;
  }
  function choose(point, clientX, clientY) {
    if (chosen) chosen.node.classList.remove("chosen");
    chosen = point;
    if (!point) return hideTip();
    point.node.classList.add("chosen");
    const sample = samples[point.sample];
    const parts = [el("p", {}, el("b", {}, point.name), ` · ${point.modality}`)];
    if (sample.image) parts.push(el("img", {src: sample.image, alt: ""}));
    if (sample.text) parts.push(el("p", {dir: "auto"}, sample.text.length > 160 ? `${sample.text.slice(0, 159)}…` : sample.text));
    if (sample.audio) parts.push(el("p", {class: "key"}, "click to listen"));
    parts.push(el("p", {class: "key"}, sample.key));
    return showTip(clientX, clientY, ...parts);
  }
  function pin(point) {
    if (point) pinned.replaceChildren(card(point.sample, null));
  }
  function step(event) {
    const move = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
    if (event.key === "Enter") pin(chosen);
    if (!move) return;
    event.preventDefault();
    const open = points.filter((point) => point.visible && !point.faint).sort((a, b) => a.left - b.left);
    if (!open.length) return;
    const next = open[(open.indexOf(chosen) + move + open.length) % open.length];
    const box = picture.getBoundingClientRect();
    choose(next, box.left + next.left / width * box.width, box.top + next.top / height * box.height);
  }
  form.addEventListener("change", paint);
  form.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("resize", () => { if (Math.abs(plot.clientWidth - width) > 20) lay(); });
  lay();
}

// ---- Retrieval gallery ----

function drawGallery() {
  const node = section("gallery", data.gallery);
  if (!node) return;
  Object.entries(data.gallery).forEach(([direction, queries], i) => {
    const [asked, sought] = direction.split("_to_");
    const found = queries.flatMap((query) => query.found);
    const right = found.filter((one) => one.correct).length;
    const details = el("details", i ? {} : {open: ""},
      el("summary", {}, `${asked} → ${sought}: ${right} of ${found.length} found are right`));
    for (const query of queries) {
      const list = el("ol");
      for (const one of query.found) {
        const outcome = el("span", {class: "outcome"}, `${one.correct ? "✓ right" : "✗ wrong"} · ${one.cosine.toFixed(2)}`);
        const shown = card(one.sample, sought, outcome);
        shown.classList.add(one.correct ? "right" : "wrong");
        list.append(el("li", {}, shown));
      }
      details.append(el("div", {class: "query"}, card(query.query, asked), list));
    }
    node.append(details);
  });
}

// ---- The rest ----

function drawPictures() {
  const node = section("pictures", data.pictures);
  if (!node) return;
  for (const {title, png} of data.pictures) {
    node.querySelector(".figures").append(
      el("figure", {}, el("figcaption", {}, title), el("img", {src: png, alt: `Inputs, masks and reconstructions: ${title}`})));
  }
}

function drawLeftOut() {
  if (!data.left_out.length) return;
  const node = document.querySelector(".left-out");
  node.hidden = false;
  for (const sentence of data.left_out) node.querySelector("ul").append(el("li", {}, sentence));
}

drawCurves();
drawConfusion();
drawMap();
drawGallery();
drawPictures();
drawLeftOut();
for (const node of document.querySelectorAll("section:not([hidden])")) {
  document.querySelector("nav").append(el("a", {href: `#${node.id}`}, node.querySelector("h2").textContent));
}
// What is folded would not be printed.
let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const node of folded) node.open = true;
});
addEventListener("afterprint", () => { for (const node of folded) node.open = false; });
