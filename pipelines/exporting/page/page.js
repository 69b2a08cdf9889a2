/** The page: fields, pictures and paint; worker.js does the computation. */
import { batchSize, keptCodes } from "./sampler.js";

const MOST = 64;
const draw = part("draw");
const redraw = part("redraw");
const canvas = document.querySelector("canvas");
const brush = document.querySelector("[name=brush]");
const file = document.querySelector("[name=file]");

let model = null;
let loaded = false;
/** Selected picture, whose parts are redrawn: `{codes, pixels, label}`. */
let chosen = null;
/** Mask of the selected picture's painted pixels, (H * W). */
let painted = null;

/** Return the elements of a section that shows pictures from the worker. */
function part(id) {
  const section = document.getElementById(id);
  const [form, progress, line, pictures] = ["form", "progress", ".line", ".pictures"].map((selector) => section.querySelector(selector));
  return { section, form, progress, line, pictures };
}

// ---- the worker

// A worker inherits the page's Content-Security-Policy if it is created from a blob, but not from a file.
const script = `import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`;
const worker = new Worker(URL.createObjectURL(new Blob([script], { type: "text/javascript" })), { type: "module" });
const waiting = new Map();
let lastId = 0;
let failure = null;

worker.addEventListener("message", ({ data }) => {
  const { resolve, reject, progress, part } = waiting.get(data.id);
  if ("progress" in data) progress(data.progress);
  else if ("part" in data) part(data.part);
  else {
    waiting.delete(data.id);
    if ("error" in data) reject(new Error(data.error));
    else resolve(data.result);
  }
});
// Failures of the worker itself, not of a request.
worker.addEventListener("error", (event) => {
  failure = new Error(`This page cannot compute: a file is missing, or this browser is too old (${event.message ?? "its worker does not start"}).`);
  for (const { reject } of waiting.values()) reject(failure);
  waiting.clear();
});

/** Send a request to the worker. Returns a promise of its result. */
function request(action, content, progress, part) {
  return new Promise((resolve, reject) => {
    if (failure) return reject(failure);
    waiting.set(++lastId, { resolve, reject, progress, part });
    worker.postMessage({ id: lastId, action, ...content });
  });
}

/** Send a request of a section to the worker: its buttons are disabled meanwhile, and an error is shown in its line. */
async function work(where, action, content, part = () => {}) {
  const focused = document.activeElement;
  busy(where, true, action === "sample" || action === "complete");
  try {
    return await request(action, content, (share) => (where.progress.value = share), part);
  } finally {
    busy(where, false);
    if (document.activeElement === document.body) focused.focus({ preventScroll: true }); // a disabled button loses the focus
  }
}

function busy(where, is, stoppable = false) {
  where.progress.hidden = !is;
  where.progress.value = 0;
  where.form.elements.stop.hidden = !stoppable;
  for (const name of ["draw", "another"]) draw.form.elements[name].disabled = is;
  for (const button of [redraw.form.elements.redraw, file]) button.disabled = is;
}

function say(where, text, isError = false) {
  where.line.textContent = text;
  where.line.classList.toggle("error", isError);
}

// ---- fields

/** Read the number in a field. Errors: Error with the line to show. */
function numberIn(form, name, { whole = false, least = -Infinity, most = Infinity } = {}) {
  const field = form.elements[name];
  const title = field.labels[0].firstChild.textContent.trim();
  const value = field.valueAsNumber;
  if (Number.isFinite(value) && value >= least && value <= most && (!whole || Number.isSafeInteger(value))) return value;
  if (whole && Number.isInteger(value) && !Number.isSafeInteger(value)) most = Number.MAX_SAFE_INTEGER;
  const range = Number.isFinite(least) && Number.isFinite(most) ? ` from ${least} to ${most}` : Number.isFinite(least) ? ` of at least ${least}` : Number.isFinite(most) ? ` up to ${most}` : "";
  throw new Error(`${title}: expected a ${whole ? "whole " : ""}number${range}, found ${field.value || "none"}.`);
}

/** Read the settings that both sections share. */
function drawingIn() {
  const settings = { temperature: numberIn(draw.form, "temperature", { least: 0 }) };
  if (supports("guidance")) settings.guidance = numberIn(draw.form, "guidance");
  return { seed: numberIn(draw.form, "seed", { whole: true }), settings };
}

/** Return whether the model supports a feature: "labels" or "guidance". */
function supports(feature) {
  const labels = Boolean(model.label_names?.length);
  return feature === "labels" ? labels : labels && model.supports_unconditional;
}

/** Read the labels of `count` pictures from the field. */
function labelsIn(form, count) {
  const { value } = form.elements.label;
  const numbers = Array.from({ length: count }, (_, number) => number);
  if (!supports("labels") || value === "none") return numbers.map(() => null);
  return numbers.map((number) => (value === "turns" ? number % model.label_names.length : Number(value)));
}

// ---- pictures

/** Convert an image (H * W * C) to a canvas's content. */
function imageData(pixels) {
  const [height, width, channels] = model.image_shape;
  const data = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    for (let channel = 0; channel < 3; channel++) data.data[4 * i + channel] = pixels[i * channels + (channels === 3 ? channel : 0)];
    data.data[4 * i + 3] = 255;
  }
  return data;
}

/** Create a canvas of the run's size with an image on it. */
function drawnOn(pixels) {
  const result = document.createElement("canvas");
  [result.height, result.width] = model.image_shape;
  result.getContext("2d").putImageData(imageData(pixels), 0, 0);
  return result;
}

/** Create placeholders for `count` pictures, which become buttons. */
function places(where, count) {
  const [height, width] = model.image_shape;
  const placeholders = Array.from({ length: count }, () => {
    const place = document.createElement("div");
    place.className = "waiting";
    place.style.aspectRatio = `${width} / ${height}`;
    return place;
  });
  where.pictures.replaceChildren(...placeholders);
  return placeholders;
}

/** Create a button with a picture `{codes, pixels, label}` that selects it. */
function pictureButton(picture, number) {
  const button = document.createElement("button");
  const image = document.createElement("img");
  const name = picture.label === null ? "" : model.label_names[picture.label];
  button.type = "button";
  button.setAttribute("aria-pressed", "false");
  image.alt = `${name ? `${name}, ` : ""}picture ${number}`;
  image.src = drawnOn(picture.pixels).toDataURL();
  button.append(image);
  if (name) {
    const caption = document.createElement("span");
    caption.textContent = button.title = name;
    button.append(caption);
  }
  button.addEventListener("click", () => {
    choose(picture, button);
    redraw.section.scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  });
  return button;
}

/** Draw pictures into a section. Returns the first one, and its button. */
async function pictures(where, action, content, labels) {
  const start = performance.now();
  const placeholders = places(where, labels.length);
  say(where, "Drawing …");
  let first = null;
  try {
    await work(where, action, { ...content, labels }, (part) => {
      part.images.forEach((pixels, row) => {
        const number = part.first + row;
        const picture = { codes: part.codes[row], pixels, label: labels[number] };
        const button = pictureButton(picture, number);
        placeholders[number].replaceWith(button);
        first ??= [picture, button];
      });
    });
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    say(where, `${labels.length} picture${labels.length === 1 ? "" : "s"} in ${seconds} seconds.`);
  } finally {
    for (const place of placeholders) place.remove();
  }
  return first;
}

async function drawPictures() {
  if (!loaded) await load();
  const count = numberIn(draw.form, "number", { whole: true, least: 1, most: MOST });
  const drawing = drawingIn();
  const labels = labelsIn(draw.form, count);
  document.querySelector(".command code").textContent = commandLine(count, drawing);
  document.querySelector(".command").hidden = false;
  const first = await pictures(draw, "sample", drawing, labels);
  if (chosen === null) choose(...first);
}

/** Return the command that draws the same samples from the run. */
function commandLine(count, { seed, settings }) {
  const quoted = (text) => (/^[\w./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
  const options = { run: model.run, prior: model.prior, n: count, seed, ...settings };
  if (supports("labels") && draw.form.elements.label.value !== "turns") options.label = model.label_names[draw.form.elements.label.value];
  const typed = Object.entries(options).map(([name, value]) => ` --${name}=${quoted(String(value))}`);
  return `${model.command}${typed.join("")}`;
}

// ---- redrawing a part

function choose(picture, button) {
  chosen = picture;
  for (const other of document.querySelectorAll("[aria-pressed=true]")) other.setAttribute("aria-pressed", "false");
  button?.setAttribute("aria-pressed", "true");
  if (supports("labels")) redraw.form.elements.label.value = picture.label ?? (supports("guidance") ? "none" : 0);
  clear();
}

function clear() {
  const [height, width] = model.image_shape;
  painted = new Uint8Array(height * width);
  show();
}

/** Show the selected picture, the patches to redraw, and the paint. */
function show() {
  const [height, width] = model.image_shape;
  const scale = canvas.width / width;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(drawnOn(chosen.pixels), 0, 0, canvas.width, canvas.height);
  const colour = getComputedStyle(document.documentElement).getPropertyValue("--paint");
  context.fillStyle = context.strokeStyle = colour;
  context.lineWidth = Math.max(1, scale / 10);
  const kept = keptCodes(model, painted);
  let code = 0;
  for (const [rows, columns] of model.grids) {
    for (let i = 0; i < rows * columns; i++, code++) {
      if (kept[code]) continue;
      const patch = [(i % columns) * (canvas.width / columns), Math.floor(i / columns) * (canvas.height / rows), canvas.width / columns, canvas.height / rows];
      context.globalAlpha = 0.3 / model.grids.length;
      context.fillRect(...patch);
      context.globalAlpha = 0.8;
      context.strokeRect(...patch);
    }
  }
  context.globalAlpha = 0.6;
  painted.forEach((is, i) => is && context.fillRect((i % width) * scale, Math.floor(i / width) * scale, scale, scale));
  context.globalAlpha = 1;
}

/** Paint a round spot at a pixel of the picture. */
function spot(x, y) {
  const [height, width] = model.image_shape;
  const radius = Math.max(brush.valueAsNumber / 2, Math.SQRT1_2); // at least one pixel
  for (let row = Math.max(0, Math.floor(y - radius)); row < Math.min(height, y + radius); row++) {
    for (let column = Math.max(0, Math.floor(x - radius)); column < Math.min(width, x + radius); column++) {
      if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) painted[row * width + column] = 1;
    }
  }
}

let before = null;
function stroke(event) {
  const [height, width] = model.image_shape;
  const { left, top, width: across, height: down } = canvas.getBoundingClientRect();
  const [x, y] = [((event.clientX - left) / across) * width, ((event.clientY - top) / down) * height];
  const [fromX, fromY] = before ?? [x, y];
  const steps = Math.ceil(2 * Math.hypot(x - fromX, y - fromY)) || 1;
  for (let step = 1; step <= steps; step++) spot(fromX + ((x - fromX) * step) / steps, fromY + ((y - fromY) * step) / steps);
  before = [x, y];
  show();
}
canvas.addEventListener("pointerdown", (event) => {
  if (!chosen || !event.isPrimary || event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  before = null;
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && stroke(event));

async function redrawPart() {
  if (!loaded) await load();
  const count = numberIn(redraw.form, "number", { whole: true, least: 1, most: MOST });
  const drawing = drawingIn();
  if (!chosen || !painted.includes(1)) throw new Error("Paint: expected some, found none: paint over the part to change.");
  await pictures(redraw, "complete", { ...drawing, codes: chosen.codes, painted }, labelsIn(redraw.form, count));
}

/** Read a file as an image (H * W * C), cropped (stage1_vqvae/data/crops.py) and scaled to the run's size. */
async function pixelsOf(opened) {
  const [height, width, channels] = model.image_shape;
  let source;
  try {
    source = await createImageBitmap(opened);
  } catch {
    throw new Error(`${opened.name}: expected a picture that this browser can read, found something else.`);
  }
  const { area, across, down } = model.crop;
  const scale = Math.min(source.width / width, source.height / height) * Math.sqrt(area);
  const [cropWidth, cropHeight] = [width * scale, height * scale];
  let crop = [(source.width - cropWidth) * across, (source.height - cropHeight) * down, cropWidth, cropHeight];
  // Browsers alias when they scale down by more than two, so halve repeatedly.
  let halvings = Math.max(0, Math.floor(Math.log2(scale)));
  for (; ; halvings--) {
    const smaller = document.createElement("canvas");
    [smaller.width, smaller.height] = [width * 2 ** halvings, height * 2 ** halvings];
    const context = smaller.getContext("2d", { willReadFrequently: true });
    context.fillStyle = model.background;
    context.fillRect(0, 0, smaller.width, smaller.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(source, ...crop, 0, 0, smaller.width, smaller.height);
    [source, crop] = [smaller, [0, 0, smaller.width, smaller.height]];
    if (halvings === 0) break;
  }
  const { data } = source.getContext("2d").getImageData(0, 0, width, height);
  const pixels = new Uint8ClampedArray(width * height * channels);
  for (let i = 0; i < width * height; i++) {
    const [red, green, blue] = data.subarray(4 * i);
    if (channels === 3) pixels.set([red, green, blue], 3 * i);
    else pixels[i] = 0.299 * red + 0.587 * green + 0.114 * blue;
  }
  return pixels;
}

async function openFile() {
  const [opened] = file.files;
  file.value = ""; // so that the same file may be opened again
  if (!opened) return;
  if (!loaded) await load();
  const pixels = await pixelsOf(opened);
  say(redraw, "Opening …");
  const { codes, image } = await work(redraw, "encode", { pixels });
  choose({ codes, pixels: image, label: null });
  say(redraw, `${opened.name}, as reconstructed by the model: paint over the part to change.`);
}

// ---- facts about the run, and buttons

function describe() {
  const { loss, bytes, grids } = model;
  const [height, width, channels] = model.image_shape;
  const megabytes = (Object.values(bytes).reduce((a, b) => a + b) / 1e6).toFixed(1);
  const codes = grids.map(([rows, columns]) => `${rows} × ${columns}`).join(", then ");
  const percent = (share) => `${(100 * share).toFixed(1)}%`;
  const { excess_bits: excess, excess_bits_error: error } = loss;
  const more = excess > 2 * error ? `${excess.toPrecision(2)} ± ${error.toPrecision(1)} additional bits per code` : `no measurable additional bits (below ${(2 * error).toPrecision(1)} per code)`;
  const facts = {
    "Sampling":
      `A picture of ${width} × ${height} pixels${channels === 1 ? ", in grey," : ""} has ${codes} codes. A prior draws them one after another, each given those before it; ` +
      "a decoder converts them to pixels.",
    "Temperature": "Below 1: less varied pictures; above 1: more varied ones; 0: always the most likely code.",
    ...(supports("guidance") && { "Guidance": "Weight of the label: 1 is the prior itself, above 1 pictures follow the label more closely, 0 ignores it." }),
    "Size": `${megabytes} MB, weights in ${model.bits} bits; computed in float32 by onnxruntime-web.`,
    "Likelihood": `Codes drawn from the run's prior cost ${loss.bits.toFixed(2)} bits each under it; under this page's rounded prior: ${more} (labels given, temperature 1, no guidance).`,
    "Different pictures": `${loss.pictures_that_differ} of ${loss.pictures} pictures differ from those that the run draws from the same seed (${percent(loss.codes_that_differ / loss.codes)} of their codes): a draw within the rounding error changes the codes after it. The likelihood above holds for them too.`,
    "Different codes": `For sampled pictures that were opened again, ${percent(loss.encoded_differ)} of the codes differ from those of the run's encoder.`,
    "Different pixels": `Pixels of the same codes differ by at most ${loss.pixels_differ_at_most} of 255; on average by ${loss.pixels_differ_on_average.toFixed(3)}.`,
    "Prior": `${model.prior} of run ${model.run}, sha256 ${model.prior_sha256.slice(0, 16)}…`,
  };
  document.querySelector("dl").replaceChildren(
    ...Object.entries(facts).flatMap(([term, text]) => {
      const [title, content] = [document.createElement("dt"), document.createElement("dd")];
      title.textContent = term;
      content.textContent = text;
      return [title, content];
    }),
  );
  document.querySelector("footer").hidden = false;
}

/** Run an action of a section; an error is shown in its line. */
function attempt(where, action) {
  return async (event) => {
    event?.preventDefault();
    try {
      await action();
    } catch (error) {
      say(where, error.message, error.message !== "Stopped.");
    }
  };
}

function prepare() {
  const names = model.label_names ?? [];
  const options = (extra) => [...extra, ...names.map((name, number) => [name, number])].map(([text, value]) => new Option(text, value));
  draw.form.elements.label.replaceChildren(...options([["each in turn", "turns"]]));
  redraw.form.elements.label.replaceChildren(...options(model.supports_unconditional ? [["none", "none"]] : []));
  for (const element of document.querySelectorAll("[data-needs]")) element.hidden = !supports(element.dataset.needs);
  for (const element of document.querySelectorAll("[data-lacks]")) element.hidden = supports(element.dataset.lacks);
  draw.form.elements.number.value = batchSize(model); // one batch
  for (const name of ["temperature", "guidance"]) draw.form.elements[name].value = model.sampling[name];
  const [height, width] = model.image_shape;
  const scale = Math.max(1, Math.round(720 / width));
  [canvas.width, canvas.height] = [width * scale, height * scale];
  brush.max = Math.ceil(Math.max(height, width) / 3);
  brush.value = Math.ceil(Math.max(height, width) / 8);
  document.getElementById("title").textContent = document.title = model.run;
  describe();
}

draw.form.addEventListener("submit", attempt(draw, drawPictures));
draw.form.elements.another.addEventListener("click", attempt(draw, async () => {
  draw.form.elements.seed.value = numberIn(draw.form, "seed", { whole: true }) + 1;
  await drawPictures();
}));
redraw.form.addEventListener("submit", attempt(redraw, redrawPart));
file.addEventListener("change", attempt(redraw, openFile));
for (const { form } of [draw, redraw]) form.elements.stop.addEventListener("click", () => worker.postMessage({ action: "stop" }));
document.querySelector("[name=clear]").addEventListener("click", () => chosen && clear());
document.querySelector("[name=half]").addEventListener("click", () => {
  if (!chosen) return;
  painted.fill(1, Math.floor(model.image_shape[0] / 2) * model.image_shape[1]);
  show();
});
document.querySelector("[name=save]").addEventListener("click", () => {
  if (!chosen) return;
  const link = document.createElement("a");
  link.href = drawnOn(chosen.pixels).toDataURL();
  link.download = `${[model.run, ...(chosen.label === null ? [] : [model.label_names[chosen.label]])].join("-")}.png`;
  link.click();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chosen && show());

/** Load the worker's files. Called whenever they are missing, so that a button press retries after a failure. */
async function load() {
  if (model === null) {
    const answer = await fetch(new URL("model.json", import.meta.url), { cache: "no-cache" });
    if (!answer.ok) throw new Error(`model.json: expected a file, found none (${answer.status}).`);
    model = await answer.json();
    prepare();
  }
  const bytes = Object.entries(model.bytes).reduce((sum, [name, size]) => sum + (name === "encoder.onnx" ? 0 : size), 0);
  say(draw, `Loading ${(bytes / 1e6).toFixed(1)} MB …`);
  await work(draw, "load", { model });
  loaded = true;
  redraw.section.hidden = false;
}

attempt(draw, drawPictures)();
