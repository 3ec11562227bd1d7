// Boxes over pictures, and their mentions in the text: pointing at one lights up the other.

import { h, svg } from "./dom.js";

const COLORS = ["#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008b8b", "#f032e6", "#9a6324"];
const color = (i) => COLORS[i % COLORS.length];

/** A picture or video of a message, with a layer for boxes; `open` enlarges it. */
export function pictureView(file, open) {
  if (file.kind === "video") return h("div", { class: "picture" }, h("video", { src: file.url, controls: true }));
  const image = h("img", { src: file.url, alt: file.name });
  const layer = svg("svg", { viewBox: `0 0 ${file.width || 1} ${file.height || 1}`, preserveAspectRatio: "none" });
  const label = `Enlarge ${file.name}`;
  // labels have one size on the screen, whatever the picture's
  new ResizeObserver(() => {
    if (image.clientWidth) layer.style.setProperty("--pixel", (file.width || 1) / image.clientWidth);
  }).observe(image);
  return h(open ? "button" : "div", { class: "picture", "aria-label": open && label, click: open }, image, layer);
}

/** Draws boxes: each is {label, box | quad | point} in pixels of the picture as it was sent. */
export function drawBoxes(view, file, boxes, turn) {
  const layer = view.querySelector("svg");
  if (!layer) return;
  layer.replaceChildren(...boxes.map(([box, i]) => {
    const group = svg("g", { "data-box": `${turn}:${i}`, class: "mark" }, ...shape(box, color(i), file));
    group.style.color = color(i);
    return group;
  }));
  light(layer);
}

function shape(box, stroke, file) {
  const [x, y] = box.box ?? box.point ?? box.quad[0];
  const outline = box.box
    ? svg("rect", { x, y, width: box.box[2] - x, height: box.box[3] - y })
    : box.point
      ? svg("circle", { cx: x, cy: y, r: Math.max(file.width, file.height) / 56 })
      : svg("polygon", { points: box.quad.map((point) => point.join(",")).join(" ") });
  outline.setAttribute("class", "shape");
  outline.setAttribute("stroke", stroke);
  const text = svg("text", { x, y, dy: y > file.height / 16 ? "-.35em" : "1.1em" });
  text.textContent = box.label;
  return [outline, text];
}

/** Marks in the text what each box was read from; boxes come in the order of the text. */
export function linkBoxes(node, boxes, turn) {
  const walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
  let text = walker.nextNode();
  boxes.forEach((box, i) => {
    while (box.text && text) {
      const at = text.data.indexOf(box.text);
      if (at < 0) {
        text = walker.nextNode();
        continue;
      }
      const found = text.splitText(at);
      text = found.splitText(box.text.length);
      const mention = h("span", { class: "box-ref", "data-box": `${turn}:${i}`, tabindex: 0 }, found.data);
      mention.style.borderColor = color(i);
      found.replaceWith(mention);
      walker.currentNode = mention.lastChild;
      text = walker.nextNode();
      break;
    }
  });
  light(node);
}

function light(node) {
  for (const part of node.querySelectorAll("[data-box]")) {
    const all = () => document.querySelectorAll(`[data-box="${part.dataset.box}"]`);
    const on = () => all().forEach((other) => other.classList.add("lit"));
    const off = () => all().forEach((other) => other.classList.remove("lit"));
    part.addEventListener("mouseenter", on);
    part.addEventListener("mouseleave", off);
    part.addEventListener("focus", on);
    part.addEventListener("blur", off);
  }
}
