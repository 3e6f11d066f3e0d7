// Conversations, in the browser's localStorage: one entry each, so that two tabs do not overwrite each other's.
//
// A conversation is {id, created, title, settings, draft, messages}; a message {role, content} and, of an answer, what
// became of it: tokens, seconds, firstToken (seconds), finish, error, note.

// Returns localStorage or sessionStorage, or, where the browser allows none, an object that is forgotten with the page.
function storage(name) {
  try {
    return window[name];
  } catch {
    areKept = false;
    return Object.create({
      getItem(key) { return this[key] ?? null; },
      setItem(key, value) { this[key] = value; },
      removeItem(key) { delete this[key]; },
    });
  }
}

export let areKept = true; // whether a reload finds the conversations again
const local = storage("localStorage");
const session = storage("sessionStorage");
const PREFIX = "conversation.";
export const LEFT = "the page was left during this answer";
const DEFAULTS = { temperature: 0.7, max_tokens: 256 };

// Returns all conversations, newest first. An answer that was being written when the page was left says so.
export function load() {
  const found = [];
  for (const name of Object.keys(local).filter((each) => each.startsWith(PREFIX))) {
    const conversation = read(name);
    if (!conversation) continue;
    for (const message of conversation.messages) {
      if (message.pending) message.note = LEFT;
      delete message.pending;
    }
    found.push(conversation);
  }
  return found.sort((a, b) => b.created - a.created);
}

// Returns the conversation under a name of localStorage, or null if there is none or it cannot be read.
export function read(name) {
  try {
    const conversation = JSON.parse(local.getItem(name));
    return Array.isArray(conversation?.messages) ? conversation : null;
  } catch {
    return null;
  }
}

// Returns the id of the conversation under a name of localStorage, or null if the name is another thing's.
export function idOf(name) {
  return name?.startsWith(PREFIX) ? name.slice(PREFIX.length) : null;
}

export function create(settings = DEFAULTS) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, created: Date.now(), title: "", settings: { ...settings }, draft: "", messages: [] };
}

// Throws QuotaExceededError if the browser's storage is full.
export function save(conversation) {
  local.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(id) {
  local.removeItem(PREFIX + id);
}

// Write to a storage that may be full, which `save` reports.
function keep(place, name, value) {
  try {
    place.setItem(name, value);
  } catch {
    // A reload does not find it.
  }
}

// Which conversations are shown, by id, is each tab's own, and so is the key: it is forgotten with the tab.
let ownKey = session.getItem("key") ?? "";
export const tab = {
  get open() { return JSON.parse(session.getItem("open") ?? local.getItem("open") ?? "[]"); },
  set open(ids) {
    for (const place of [session, local]) keep(place, "open", JSON.stringify(ids)); // the next tab begins with local's
  },
  get key() { return ownKey; },
  set key(key) {
    ownKey = key;
    keep(session, "key", key);
  },
};
