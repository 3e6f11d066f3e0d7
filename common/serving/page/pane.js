// One conversation on the page: its settings, its messages, the field to write in, and the answer that is being written.

import { LEFT } from "./store.js";
import { streamChat } from "./stream.js";
import { make, rendered } from "./text.js";

export class Pane {
  // page: what all panes share, see main.js.
  constructor(conversation, page) {
    this.conversation = conversation;
    this.page = page;
    this.controller = null; // of the answer that is being written
    this.element = document.getElementById("pane-template").content.firstElementChild.cloneNode(true);
    const find = (selector) => this.element.querySelector(selector);
    this.title = find("h2");
    this.list = find(".messages");
    this.settings = find(".settings");
    this.field = find(".composer textarea");
    this.sendButton = find(".send");
    this.stopButton = find(".stop");
    find(".close").onclick = () => page.close(this);
    find(".composer").onsubmit = (event) => {
      event.preventDefault();
      page.send(this);
    };
    this.stopButton.onclick = () => this.stop();
    this.element.addEventListener("focusin", () => page.activate(this));
    this.element.addEventListener("keydown", (event) => this.press(event));
    this.field.oninput = () => {
      this.conversation.draft = this.field.value;
      page.save(this.conversation);
    };
    this.settings.oninput = () => this.changeSettings();
    this.list.onscroll = () => { // a reader who has scrolled up stays there
      const { scrollTop, scrollHeight, clientHeight } = this.list;
      this.isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
    };
    new ResizeObserver(() => this.follow()).observe(this.list); // another pane, the settings, or a phone's keyboard
    this.showAll();
  }

  showAll() {
    this.field.value = this.conversation.draft ?? "";
    for (const input of this.settings.querySelectorAll("[name]")) input.value = this.conversation.settings[input.name] ?? "";
    this.showSettings();
    this.showMessages();
  }

  // text: which pane of how many this is, "" for the only one.
  setNumber(text) {
    this.element.querySelector("header").dataset.number = text;
  }

  // -- Keys and settings ---------------------------------------------------------------------------------------

  press(event) {
    if (event.key === "Escape" && this.controller) {
      this.stop();
      event.preventDefault();
    }
    if (event.target === this.field && event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.page.send(this);
    }
  }

  changeSettings() {
    const settings = {};
    for (const input of this.settings.querySelectorAll("[name]")) {
      const value = input.type === "number" ? input.valueAsNumber : input.value.trim();
      if (value !== "" && !Number.isNaN(value)) settings[input.name] = value;
    }
    this.conversation.settings = settings;
    this.page.save(this.conversation);
    this.showSettings();
  }

  showSettings() {
    const { system, ...numbers } = this.conversation.settings;
    const texts = Object.entries(numbers).map(([name, value]) => `${name} ${value}`);
    if (system) texts.push("system prompt");
    this.settings.querySelector("summary").replaceChildren("Settings: ", make("b", {}, texts.join(", ") || "the server's"));
    const wrong = [...this.settings.querySelectorAll("input")].find((each) => !each.checkValidity());
    this.problem = wrong ? `${wrong.name}: ${wrong.validationMessage}` : "";
    const problem = this.settings.querySelector(".problem");
    problem.textContent = this.problem;
    problem.hidden = !wrong;
  }

  // -- Messages ------------------------------------------------------------------------------------------------

  showMessages() {
    const { messages, title } = this.conversation;
    const hadFocus = this.element.contains(document.activeElement);
    this.title.textContent = title || "New conversation";
    this.element.setAttribute("aria-label", this.title.textContent);
    this.list.replaceChildren(...messages.map((message, index) => this.item(message, index)));
    if (!messages.length) {
      this.list.append(make("li", { className: "empty" },
        "Ask something. Open conversations beside this one, ask in each of them, and the engine answers all in one batch."));
    }
    this.sendButton.hidden = this.busy;
    this.stopButton.hidden = !this.busy;
    this.isAtEnd = true;
    this.follow();
    // A button that was pressed may be gone by now: then the keyboard goes on at what follows from it.
    if (hadFocus && !this.element.contains(document.activeElement)) (this.busy ? this.stopButton : this.field).focus();
  }

  item(message, index) {
    const item = make("li", { className: `message ${message.role}` });
    item.setAttribute("aria-label", message.role === "user" ? "You" : "The model");
    item.setAttribute("aria-busy", String(Boolean(message.pending)));
    item.append(make("div", { className: "text" }), make("div", { className: "foot" }));
    this.fill(item, message, index);
    return item;
  }

  // Bring an item up to date with its message.
  fill(item, message, index) {
    item.querySelector(".text").replaceChildren(message.role === "user" ? message.content : rendered(message.content));
    const foot = item.querySelector(".foot");
    const figures = make("span", {}, summary(message));
    if (message.pending) {
      foot.replaceChildren(figures);
      return;
    }
    const button = (name, action) => make("button", { type: "button", onclick: action, disabled: this.busy }, name);
    const buttons = [];
    if (message.role === "user") buttons.push(button("Edit", () => this.edit(item, index)));
    else if (index === this.conversation.messages.length - 1) {
      buttons.push(button(message.error ? "Try again" : "Regenerate", () => this.regenerate()));
    }
    if (message.content && navigator.clipboard) {
      buttons.push(make("button", { type: "button", onclick: () => navigator.clipboard.writeText(message.content) }, "Copy"));
    }
    foot.replaceChildren(figures, ...buttons);
    if (message.error) foot.before(make("p", { className: "problem", role: "alert" }, message.error));
  }

  edit(item, index) {
    const { messages } = this.conversation;
    const field = make("textarea", { value: messages[index].content, rows: 3 });
    field.setAttribute("aria-label", "The message, to be edited");
    const again = () => {
      const text = field.value.trim();
      if (!text) return;
      messages.splice(index);
      this.send(text);
    };
    const form = make("form", { className: "edit" }, field, make("button", { className: "send" }, "Ask again"),
      make("button", { type: "button", onclick: () => this.showMessages() }, "Cancel"));
    if (index < messages.length - 1) form.append(make("small", {}, "What follows this message is replaced."));
    form.onsubmit = (event) => { event.preventDefault(); again(); };
    form.onkeydown = (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.target === field) {
        event.preventDefault();
        again();
      }
      if (event.key === "Escape") this.showMessages();
    };
    item.replaceChildren(form);
    field.focus();
  }

  // -- Answers -------------------------------------------------------------------------------------------------

  get busy() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  regenerate() {
    if (this.busy) return;
    this.conversation.messages.pop();
    this.answer();
  }

  send(text) {
    if (this.busy) return;
    const { conversation } = this;
    conversation.title ||= text.slice(0, 60);
    conversation.messages.push({ role: "user", content: text });
    this.answer();
  }

  request() {
    const { settings: { system, ...sampling }, messages } = this.conversation;
    const turns = messages.filter((each) => each.content).map(({ role, content }) => ({ role, content }));
    if (system) turns.unshift({ role: "system", content: system });
    return { model: this.page.model(), messages: turns, ...sampling };
  }

  // Ask for an answer to the messages so far, and show it as it comes.
  async answer() {
    const { conversation, page } = this;
    const body = this.request();
    const message = { role: "assistant", content: "", pending: true, tokens: 0 };
    conversation.messages.push(message);
    this.controller = new AbortController();
    page.save(conversation, true);
    this.showMessages();
    const item = this.list.lastElementChild;
    const start = performance.now();
    const elapsed = () => (performance.now() - start) / 1000;
    let frame = 0;
    try {
      if (this.problem) throw new Error(`Nothing was asked. ${this.problem}`);
      for await (const chunk of streamChat(body, { key: page.key(), signal: this.controller.signal })) {
        const [choice] = chunk.choices ?? [];
        if (choice?.delta?.content) {
          message.content += choice.delta.content;
          message.seconds = elapsed();
          message.firstToken ??= message.seconds;
          message.tokens += 1; // about one token a chunk; the usage at the end says how many there were
        }
        if (choice?.finish_reason) message.finish = choice.finish_reason;
        if (chunk.usage) {
          message.tokens = chunk.usage.completion_tokens;
          message.counted = true;
        }
        frame ||= requestAnimationFrame(() => {
          frame = 0;
          if (message.pending) this.showProgress(item, message);
        });
        page.save(conversation);
      }
    } catch (error) {
      if (this.controller.signal.aborted) message.note = "stopped";
      else if (page.isLeft) message.note = LEFT;
      else message.error = error.message;
      if (error.status === 401) page.askForKey();
    }
    delete message.pending;
    this.controller = null;
    page.save(conversation, true);
    this.showMessages();
  }

  showProgress(item, message) {
    this.fill(item, message);
    this.follow();
  }

  follow() {
    if (this.isAtEnd) this.list.scrollTop = this.list.scrollHeight;
  }
}

// What an answer took, in words.
function summary({ role, tokens, counted, seconds, firstToken, finish, note, pending }) {
  if (role === "user") return "";
  const parts = [];
  if (firstToken !== undefined) {
    parts.push(`first token after ${firstToken.toFixed(2)} s`);
    if (tokens > 1 && seconds > firstToken) parts.push(`${((tokens - 1) / (seconds - firstToken)).toFixed(1)} tokens/s`);
    parts.push(`${counted || pending ? "" : "about "}${tokens} token${tokens === 1 ? "" : "s"}`);
  } else if (pending) parts.push("waiting for the first token");
  if (finish === "length") parts.push("cut off at max_tokens");
  if (note) parts.push(note);
  return parts.join(" · ");
}
