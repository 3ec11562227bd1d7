// A conversation's turns as messages for the API, and as nodes in the log.

import { $, h } from "./dom.js";
import { drawBoxes, linkBoxes, pictureView } from "./boxes.js";
import { openZoom } from "./zoom.js";
import { renderMarkdown } from "./markdown.js";

/** Messages in OpenAI's shape; `bounds` adds the bound on each picture's pixels. */
export function messages(turns, bounds = true) {
  return turns.map(({ role, text, raw, files = [] }) => {
    if (role === "assistant") return { role, content: raw ?? text };
    if (!files.length) return { role, content: text };
    const parts = files.map((file) => ({
      type: `${file.kind}_url`,
      [`${file.kind}_url`]: { url: file.url },
      ...(bounds && file.kind === "image" && file.maxPixels ? { max_pixels: file.maxPixels } : {}),
    }));
    return { role, content: [...parts, { type: "text", text }] };
  });
}

/** Every picture of the conversation, with the boxes that the turn after its own has in it. */
function boxesOf(turns, turn, file) {
  const pictures = turns.slice(0, turn).flatMap((t) => (t.files ?? []).filter((f) => f.kind === "image"));
  const number = pictures.indexOf(file) + 1;
  return (turns[turn]?.boxes ?? []).map((box, i) => [box, i])
    .filter(([box]) => (box.picture ?? pictures.length) === number);
}

/** Draws the boxes of a reply onto the pictures above it. */
export function drawReplyBoxes(turns, turn) {
  turns.slice(0, turn).forEach((asked, i) => (asked.files ?? []).forEach((file, j) => {
    const view = $("log").querySelector(`[data-picture="${i}:${j}"]`);
    const boxes = boxesOf(turns, turn, file);
    if (view && boxes.length) drawBoxes(view, file, boxes, turn);
  }));
}

/** The node of a turn; `actions` are buttons as [name, function]. */
export function turnNode(turns, i, actions) {
  const turn = turns[i];
  const body = h("div", { class: "body" });
  const speaker = turn.role === "user" ? "Question" : "Reply";
  const node = h("li", { class: turn.role, "data-turn": i, "aria-label": speaker }, h("div", { class: "message" }, body));
  if (turn.role === "user") {
    const last = () => turns.findLastIndex((t, k) => k > i && t.boxes?.length);
    const views = (turn.files ?? []).map((file, j) => {
      const zoom = file.width && (() => openZoom(file, boxesOf(turns, last(), file), last()));
      const view = pictureView(file, zoom || undefined);
      view.dataset.picture = `${i}:${j}`;
      return view;
    });
    if (views.length) body.append(h("div", { class: "pictures" }, ...views));
    body.append(h("p", {}, turn.text));
  } else {
    renderReply(node, turns, i);
  }
  if (actions.length) {
    const buttons = actions.map(([name, click]) => h("button", { class: "small", click }, name));
    node.append(h("div", { class: "actions" }, ...buttons, h("span", { class: "muted stats" }, stats(turn))));
  }
  return node;
}

/** The text of a reply anew, as more of it arrives. */
export function renderReply(node, turns, i) {
  const turn = turns[i];
  const body = node.querySelector(".body");
  renderMarkdown(body, turn.text);
  linkBoxes(body, turn.boxes ?? [], i);
  if (turn.problem) body.append(h("p", { class: "problem" }, turn.problem));
}

function stats({ usage, timings, stopped, finish }) {
  const parts = [];
  if (stopped) parts.push("stopped");
  if (finish === "length") parts.push("cut off at the longest reply allowed");
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`${usage.prompt_tokens} tokens read${cached ? `, ${cached} of them known` : ""}`);
    parts.push(`${usage.completion_tokens} written`);
  }
  if (timings?.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
