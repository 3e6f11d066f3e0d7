// The page: which conversations are open side by side, the list of all, the model, the key, and what is wrong.

import { Pane } from "./pane.js";
import { LivePanel } from "./panel.js";
import * as store from "./store.js";
import { ask } from "./stream.js";
import { make } from "./text.js";

const $ = (selector) => document.querySelector(selector);
const MOST_PANES = 16;
const conversations = new Map(store.load().map((each) => [each.id, each]));
let panes = [];
let active = null; // the pane that had the focus last

// -- What all panes share --------------------------------------------------------------------------------------

const unsaved = new Map(); // conversation -> timer
const deleted = new Set(); // ids
const page = {
  isLeft: false,
  key: () => store.tab.key,
  model: () => $("#model").value || undefined,
  activate: (pane) => { active = pane; },

  // Write a conversation to the browser's storage: at once, or within half a second.
  save(conversation, now = false) {
    if (now) write(conversation);
    else if (!unsaved.has(conversation)) unsaved.set(conversation, setTimeout(() => write(conversation), 500));
  },

  // Send what is written in a pane, there or in all that are idle.
  send(pane) {
    const text = pane.field.value.trim();
    const together = $("#together input").checked && panes.length > 1;
    const idle = (together ? panes : [pane]).filter((each) => !each.busy);
    if (!text || !idle.length) return;
    pane.conversation.draft = pane.field.value = "";
    for (const each of idle) each.send(text);
  },

  close(pane) {
    pane.stop();
    if (panes.length === 1 && !pane.conversation.messages.length) return;
    const index = panes.indexOf(pane);
    panes.splice(index, 1);
    pane.element.remove();
    if (!panes.length) open(store.create(pane.conversation.settings));
    remember();
    (panes[index] ?? panes.at(-1)).field.focus();
  },

  askForKey() {
    $("#key-form").hidden = false;
  },
};

function write(conversation) {
  clearTimeout(unsaved.get(conversation));
  unsaved.delete(conversation);
  if (!conversations.has(conversation.id) && !conversation.messages.length && !conversation.draft) return;
  if (deleted.has(conversation.id)) return;
  conversations.set(conversation.id, conversation);
  try {
    store.save(conversation);
    trouble("storage", "");
  } catch {
    trouble("storage", "The browser's storage is full: what is new will be lost at a reload. Delete conversations from the list.");
  }
}

// -- Trouble: one line per kind, until it is over ----------------------------------------------------------------

const troubles = new Map();
function trouble(kind, message) {
  if ((troubles.get(kind) ?? "") === message) return;
  troubles.set(kind, message);
  $("#trouble").textContent = [...troubles.values()].filter(Boolean).join(" ");
  $("#trouble").hidden = !$("#trouble").textContent;
}

if (!store.areKept) trouble("private", "This browser lets the page keep nothing: a reload loses all conversations.");

// -- Panes -----------------------------------------------------------------------------------------------------

// Show a conversation: in a pane of its own, or in place of another pane.
function open(conversation, instead = null) {
  let pane = panes.find((each) => each.conversation.id === conversation.id);
  if (!pane) {
    pane = new Pane(conversation, page);
    if (instead && !instead.busy) {
      instead.element.replaceWith(pane.element);
      panes[panes.indexOf(instead)] = pane;
    } else {
      $("#panes").append(pane.element);
      panes.push(pane);
    }
    remember();
  }
  active = pane;
  return pane;
}

function remember() {
  store.tab.open = panes.map((each) => each.conversation.id);
  panes.forEach((each, index) => each.setNumber(panes.length > 1 ? `${index + 1}/${panes.length}` : ""));
  $("#together").hidden = panes.length < 2;
  $("#beside").disabled = panes.length >= MOST_PANES;
}

function openAndFocus(conversation, instead) {
  const pane = open(conversation, instead);
  pane.element.scrollIntoView({ inline: "start", block: "nearest" });
  pane.field.focus({ preventScroll: true });
}

$("#beside").onclick = () => openAndFocus(store.create(active?.conversation.settings));

// -- The list of all conversations -------------------------------------------------------------------------------

$("#history").addEventListener("toggle", (event) => event.newState === "open" && showHistory());
$("#new").onclick = () => {
  $("#history").hidePopover();
  openAndFocus(store.create(active?.conversation.settings), active);
};

function showHistory() {
  for (const pane of panes) write(pane.conversation);
  const sorted = [...conversations.values()].sort((a, b) => b.created - a.created);
  $("#history ul").replaceChildren(...sorted.map((conversation) => {
    const title = conversation.title || conversation.draft || "New conversation";
    const show = (instead) => {
      $("#history").hidePopover();
      openAndFocus(conversation, instead);
    };
    const item = make("li", {},
      make("button", { className: "open", title, onclick: () => show(active) }, title),
      make("button", { title: "Open beside", ariaLabel: `Open beside: ${title}`, onclick: () => show(null) }, "+"),
      make("button", { title: "Delete", ariaLabel: `Delete: ${title}`, onclick: () => remove(conversation) }, "✕"));
    item.classList.toggle("shown", panes.some((each) => each.conversation === conversation));
    return item;
  }));
  if (!sorted.length) $("#history ul").append(make("li", { className: "empty" }, "No conversation yet."));
}

function remove(conversation) {
  const title = conversation.title || "New conversation";
  if (!confirm(`Delete "${title}"? It cannot be brought back.`)) return;
  deleted.add(conversation.id);
  conversations.delete(conversation.id);
  store.remove(conversation.id);
  const pane = panes.find((each) => each.conversation === conversation);
  if (pane) page.close(pane);
  showHistory();
  $("#new").focus();
}

// -- The server ------------------------------------------------------------------------------------------------

async function readModels() {
  const { data } = await (await ask("v1/models", { key: page.key() })).json();
  const names = data.map((each) => each.id);
  const select = $("#model");
  if (names.join() === [...select.options].map((each) => each.value).join()) return;
  const before = select.value;
  select.replaceChildren(...names.map((name) => make("option", { value: name }, name)));
  if (names.includes(before)) select.value = before;
  document.title = `Chat with ${select.value}`;
}

let modelsAreKnown = false;
async function onReading(error) {
  try {
    if (error && error.status !== 404) throw error; // a server without metrics can be talked to
    if (!modelsAreKnown) await readModels();
    modelsAreKnown = true;
    $("#key-form").hidden = true;
    trouble("server", "");
  } catch (problem) {
    modelsAreKnown = false;
    if (problem.status === 401) page.askForKey();
    trouble("server", problem.message);
  }
}

$("#key-form").onsubmit = (event) => {
  event.preventDefault();
  store.tab.key = $("#key").value.trim();
  $("#key").value = "";
  live.read();
};

// -- Start, and leave ------------------------------------------------------------------------------------------

for (const id of store.tab.open) if (conversations.has(id)) open(conversations.get(id));
if (!panes.length) open(store.create());
panes[0].field.focus();
remember();
const live = new LivePanel($("#live"), page.key, onReading);

addEventListener("pagehide", () => {
  page.isLeft = true;
  panes.forEach((each) => write(each.conversation));
});
addEventListener("pageshow", () => { page.isLeft = false; });
addEventListener("storage", (event) => { // another tab has written
  const id = store.idOf(event.key);
  if (id === null) return;
  const pane = panes.find((each) => each.conversation.id === id);
  if (pane?.busy) return;
  const conversation = event.newValue === null ? null : store.read(event.key);
  if (!conversation) conversations.delete(id);
  else {
    conversations.set(id, conversation);
    if (pane) {
      pane.conversation = conversation;
      pane.showAll();
    }
  }
});
