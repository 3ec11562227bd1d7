// A picture in a window of its own, with its boxes, at any size.

import { $ } from "./dom.js";
import { drawBoxes, pictureView } from "./boxes.js";

let scale = 1;

export function setUpZoom() {
  const view = $("zoom-view");
  const actions = { in: () => zoom(1.25), out: () => zoom(0.8), fit: () => zoom(0), close: () => $("zoom").close() };
  for (const button of document.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", actions[button.dataset.zoom]);
  }
  view.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY < 0 ? 1.1 : 0.9);
  }, { passive: false });
  $("zoom").addEventListener("keydown", (event) => {
    const action = { "+": "in", "=": "in", "-": "out", 0: "fit" }[event.key];
    if (action) actions[action]();
  });
}

function zoom(factor) {
  const picture = $("zoom-view").firstElementChild;
  if (!picture) return;
  scale = factor ? Math.min(20, Math.max(0.1, scale * factor)) : 1;
  picture.style.width = `${fitting(picture) * scale}px`;
}

function fitting(picture) {
  const { width, height } = picture.file;
  const view = $("zoom-view");
  return Math.min(view.clientWidth, (view.clientHeight * width) / height);
}

export function openZoom(file, boxes, turn) {
  const picture = pictureView(file);
  picture.file = file;
  $("zoom-view").replaceChildren(picture);
  $("zoom").showModal();
  drawBoxes(picture, file, boxes, turn);
  zoom(0);
}
