// The page: a conversation, its history, and the state of the server.

import { $, h } from "./dom.js";
import * as api from "./api.js";
import * as attachments from "./attachments.js";
import * as store from "./store.js";
import { setUpZoom } from "./zoom.js";
import { drawReplyBoxes, messages, renderReply, turnNode } from "./turns.js";

let model = {};
let conversation = blank();
let running = null; // the AbortController of the reply under way

function blank() {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2)}`;
  return { id, title: "", changed: 0, turns: [] };
}

// ---- the server

async function connect() {
  try {
    [model] = await api.models();
    $("model").textContent = model.id;
    attachments.setModel(model);
    notice("");
  } catch (error) {
    if (error.status === 401) return askKey();
    await waitForServer();
  }
}

async function waitForServer() {
  for (;;) {
    const status = await api.healthy();
    if (status === 200) break;
    notice(status === 503 ? "The model is loading …" : "The server does not answer. Trying again …");
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  notice("");
  await connect();
}

async function askKey() {
  $("key-dialog").showModal();
  await new Promise((resolve) => $("key-dialog").addEventListener("close", resolve, { once: true }));
  api.setKey($("key").value);
  await connect();
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

// ---- the conversation

function draw() {
  const { turns } = conversation;
  $("welcome").hidden = turns.length > 0;
  const last = turns.length - 1;
  $("log").replaceChildren(...turns.map((_, i) => turnNode(turns, i, running ? [] : actions(i, last))));
  turns.forEach((turn, i) => turn.boxes?.length && drawReplyBoxes(turns, i));
  $("log").scrollTop = $("log").scrollHeight;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  const usage = turns.findLast((turn) => turn.usage)?.usage;
  const used = usage ? usage.prompt_tokens + usage.completion_tokens : 0;
  $("context").textContent = used && model.meta?.n_ctx ? `${used} of ${model.meta.n_ctx} tokens` : "";
}

function actions(i, last) {
  const { turns } = conversation;
  const list = [["Copy", () => copy(turns[i].text)]];
  if (turns[i].role === "assistant" && i === last) list.push(["Retry", () => retry(i)]);
  if (turns[i].role === "user" && i === turns.findLastIndex((turn) => turn.role === "user")) {
    list.push(["Edit", () => edit(i)]);
  }
  return list;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    status("copied");
  } catch {
    status("this browser does not let the page copy");
  }
}

function retry(i) {
  conversation.turns.length = i;
  reply();
}

function edit(i) {
  const [turn] = conversation.turns.splice(i);
  $("question").value = turn.text;
  attachments.restore(turn.files ?? []);
  draw();
  grow();
  $("question").focus();
}

async function ask(event) {
  event?.preventDefault();
  const text = $("question").value.trim();
  if (running || (!text && !attachments.waiting.length)) return;
  const files = attachments.take();
  const alone = files.some((file) => file.kind === "video") ? "Describe this video." : "Describe this image.";
  conversation.turns.push({ role: "user", text: text || alone, files });
  conversation.title ||= (text || files[0]?.name || "").slice(0, 60);
  $("question").value = "";
  grow();
  await reply();
}

async function reply() {
  const { turns } = conversation;
  const here = conversation;
  const body = { model: model.id, messages: messages(turns) };
  const turn = { role: "assistant", text: "", boxes: [] };
  const controller = new AbortController();
  running = controller;
  turns.push(turn);
  await keep(here);
  draw();
  const i = turns.length - 1;
  let lost = false;
  try {
    for await (const chunk of api.complete(body, controller.signal)) {
      take(turn, chunk);
      if (conversation === here) show(i);
    }
  } catch (error) {
    if (controller.signal.aborted) turn.stopped = true;
    else {
      turn.problem = error.status ? error.message : "The server went away before the reply was complete.";
      lost = !error.status;
    }
  }
  running = null;
  status("");
  await keep(here);
  draw();
  if (lost) waitForServer();
}

function take(turn, chunk) {
  if (chunk.progress) status(progressText(chunk.progress), chunk.progress.fraction);
  if (chunk.usage) turn.usage = chunk.usage;
  if (chunk.timings) turn.timings = chunk.timings;
  for (const choice of chunk.choices ?? []) {
    if (choice.delta?.content) {
      turn.text += choice.delta.content;
      status("writing …");
    }
    if (choice.boxes) turn.boxes.push(...choice.boxes);
    if (choice.raw) turn.raw = choice.raw;
    if (choice.finish_reason) turn.finish = choice.finish_reason;
  }
}

let shown = 0;
function show(i) {
  if (shown) return;
  shown = requestAnimationFrame(() => {
    shown = 0;
    const log = $("log");
    const node = log.querySelector(`[data-turn="${i}"]`);
    if (!node) return;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    renderReply(node, conversation.turns, i);
    drawReplyBoxes(conversation.turns, i);
    if (atEnd) log.scrollTop = log.scrollHeight;
  });
}

function progressText({ stage, position }) {
  if (stage === "queue") return position ? `waiting: ${position} before this one` : "waiting";
  return { frames: "reading frames", encode: "encoding the picture", prefill: "reading the prompt" }[stage] ?? stage;
}

function status(text, fraction) {
  const bar = fraction == null || !text ? null : h("progress", { value: fraction, max: 1, "aria-label": text });
  $("status").replaceChildren(text, ...(bar ? [" ", bar] : []));
}

// ---- the history

async function keep(changed) {
  try {
    await store.save(changed);
  } catch (error) {
    notice(`This browser could not keep the conversation: ${error.message}`);
  }
  await drawHistory();
}

async function drawHistory() {
  const all = await store.list();
  $("history").replaceChildren(...all.map((one) => h("li", {},
    h("button", { class: one.id === conversation.id ? "open current" : "open", click: () => open(one) }, one.title || "Untitled"),
    h("button", { class: "icon", "aria-label": `Delete ${one.title || "Untitled"}`, click: () => forget(one) }, "✕"),
  )));
}

function open(one) {
  running?.abort();
  conversation = one;
  location.hash = one.turns.length ? one.id : "";
  draw();
  drawHistory();
}

async function forget(one) {
  await store.remove(one.id);
  if (one.id === conversation.id) open(blank());
  await drawHistory();
}

function exportJson() {
  const shape = { model: model.id, title: conversation.title, messages: messages(conversation.turns, false), turns: conversation.turns };
  const url = URL.createObjectURL(new Blob([JSON.stringify(shape, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: `${(conversation.title || "conversation").replace(/[^\w -]+/g, "_")}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// ---- the controls

function grow() {
  const box = $("question");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight + 2, 190)}px`;
}

$("composer").addEventListener("submit", ask);
$("question").addEventListener("input", grow);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
});
$("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
$("new").addEventListener("click", () => { open(blank()); $("question").focus(); });
$("export").addEventListener("click", exportJson);
$("menu").addEventListener("click", () => {
  const hidden = $("conversations").toggleAttribute("hidden");
  $("menu").setAttribute("aria-expanded", String(!hidden));
});

attachments.setUpAttachments(() => {});
setUpZoom();
await drawHistory();
const id = location.hash.slice(1);
const kept = (await store.list()).find((one) => (id ? one.id === id : true));
if (kept) open(kept);
else draw();
await connect();
document.body.dataset.ready = "";
