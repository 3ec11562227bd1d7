// Pictures and videos waiting to be sent: thumbnails, the cost of each, and the slider for detail.

import { $, h } from "./dom.js";
import * as api from "./api.js";

const TOKENS = [128, 256, 640, 1280, 4096]; // steps of the slider: most tokens of a picture
const NAMES = ["lowest", "low", "medium", "high", "highest"];

export const waiting = [];
let model = {};
let changed = () => {};

export function setUpAttachments(onChange) {
  changed = onChange;
  $("attach").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    add([...$("files").files]);
    $("files").value = "";
  });
  $("detail").addEventListener("input", estimateAll);
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (files.length) event.preventDefault();
    add(files);
  });
  for (const kind of ["dragenter", "dragover"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      document.body.classList.add("dropping");
    });
  }
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    add([...event.dataTransfer.files]);
  });
}

export function setModel(found) {
  const auto = found.meta?.auto_tokens;
  if (auto && auto !== model.meta?.auto_tokens) $("detail").value = TOKENS.findLastIndex((n, i) => n <= auto || !i);
  model = found;
  draw();
}

/** Most pixels that a picture may have after resizing, as the slider says. */
export const maxPixels = () => TOKENS[$("detail").value] * (model.meta?.pixels_per_token ?? 784);

export async function add(files) {
  for (const file of files) {
    const video = file.type.startsWith("video/") || /\.(mkv|avi|mov|webm|mp4|m4v)$/i.test(file.name);
    const item = { kind: video ? "video" : "image", name: file.name || "pasted picture", url: await dataUrl(file) };
    Object.assign(item, await (video ? videoSize(item.url) : imageSize(item.url)));
    waiting.push(item);
  }
  estimateAll();
}

export function restore(files) {
  waiting.splice(0, waiting.length, ...files);
  estimateAll();
}

export function take() {
  const taken = waiting.splice(0, waiting.length).map((file) => ({ ...file, maxPixels: maxPixels() }));
  draw();
  return taken;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function imageSize(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
    return { width: image.naturalWidth, height: image.naturalHeight };
  } catch {
    return { width: 0, height: 0 }; // the browser cannot show it; the server may still read it
  }
}

function videoSize(url) {
  return new Promise((resolve) => {
    const video = h("video", { src: url, preload: "metadata" });
    video.onloadedmetadata = () =>
      resolve({ width: video.videoWidth, height: video.videoHeight, duration: video.duration });
    video.onerror = () => resolve({ width: 0, height: 0, duration: 0 });
  });
}

async function estimateAll() {
  draw();
  await Promise.all(waiting.map(async (item) => {
    if (!item.width) return;
    const { kind, width, height, duration } = item;
    try {
      item.cost = await api.cost({ kind, width, height, duration, max_pixels: maxPixels() });
    } catch {
      item.cost = undefined;
    }
  }));
  draw();
}

function costText(item) {
  if (!item.width) return "cannot be shown here; it is sent as it is";
  if (!item.cost) return `${item.width} × ${item.height}`;
  const { width, height, tokens, seconds } = item.cost;
  const time = seconds == null ? "" : `, about ${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
  return `resized to ${width} × ${height}: ${tokens} tokens${time}`;
}

function draw() {
  $("detail-row").hidden = !waiting.length || Boolean(model.meta?.fixed_size);
  $("detail-text").textContent = `${NAMES[$("detail").value]}, at most ${TOKENS[$("detail").value]} tokens a picture`;
  $("attachments").replaceChildren(...waiting.map((item, i) => h("li", {},
    thumbnail(item),
    h("span", { class: "name" }, item.name),
    h("span", { class: "muted cost" }, costText(item)),
    h("button", {
      type: "button", class: "small", "aria-label": `Remove ${item.name}`,
      click: () => { waiting.splice(i, 1); draw(); },
    }, "Remove"),
  )));
  changed();
}

function thumbnail(item) {
  if (!item.width) return h("span", { class: "thumb unseen" }, item.kind);
  return item.kind === "video"
    ? h("video", { class: "thumb", src: item.url, muted: true })
    : h("img", { class: "thumb", src: item.url, alt: "" });
}
