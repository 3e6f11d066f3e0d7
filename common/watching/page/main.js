"use strict";
// The page: which step and which request are shown, and what the keys and buttons do.

async function unpack(id) {
  const text = element(id).textContent.trim();
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Run(await new Response(stream).text());
}

class Page {
  constructor(run, other) {
    Object.assign(this, { run, other, index: 0, chosen: 0, showAll: false, timer: null, pending: false, rendered: -Infinity, turn: 0 });
    this.length = Math.max(run.steps.length, other?.steps.length ?? 0);
    this.partings = other ? partings(run, other) : [];
    this.pool = new Pool(run, element("grid"));
    this.lanes = new Lanes(run, element("time"));
    this.timelines = [run, other].filter(Boolean).map((each, i) => {
      const box = make("div", { className: "chart" });
      element("charts").append(...(other ? [make("h3", { textContent: i ? "the other run" : "this run" })] : []), box);
      return new Timeline(each, box);
    });
    this.head();
    this.listen();
    this.repaint();
  }

  head() {
    const { config, model, files } = this.run;
    const { run, other } = this, isLonger = other && other.steps.length !== run.steps.length;
    document.title = element("title").textContent = `${model}: ${plural(run.requests.length, "request")}, ${plural(run.steps.length, run.word)}`
      + (isLonger ? `; the other run has ${other.steps.length}` : "");
    const parts = [`${plural(config.num_blocks, "block")} of ${plural(config.block_size, "token")}`], budget = config.max_num_batched_tokens;
    if (config.scheduling_policy) parts.unshift(`policy ${config.scheduling_policy}`, `preemption by ${config.preemption}`, `${budget} tokens a step`);
    if (config.speculative) parts.push(`draft tokens: ${config.speculative}`);
    element("about").textContent = `${parts.join(", ")}. ${files}`;
    if (run.miscounted !== null && !run.isCalls) {
      const go = make("button", { textContent: `step ${run.miscounted + 1}`, onclick: () => this.go(run.miscounted) });
      element("about").append(" From ", go, make("b", { textContent: " on, the reference count of a block is not the number of block tables that contain it." }));
    }
    if (this.run.failure) element("about").append(make("b", { textContent: ` The check says: ${this.run.failure}` }));
    document.body.classList.toggle("calls", this.run.isCalls);
    element("step").max = Math.max(0, this.length - 1);
    for (const id of ["texts", "lanes", "preemption", "totals", "budget", "budget-words", "waiting"]) element(id).hidden = this.run.isCalls;
    element("timeline").hidden = budget === null;
    element("preemption").disabled = !this.run.steps.some(({ plan }) => plan.preempt);
    element("stepping-title").textContent = `The ${this.run.word}`;
    if (!this.other) return;
    element("difference").hidden = element("parting").hidden = false;
    const most = this.run.isCalls ? 12 : 4;
    const clip = (list) => list.length === 0 ? "nothing" : list.slice(0, most).join("; ") + (list.length > most ? `; and ${list.length - most} more` : "");
    fill(element("partings"), this.partings.length ? this.partings.map(({ aspect, index, here, there }) => {
      const go = make("button", { textContent: `${this.run.word} ${index + 1}`, onclick: () => this.go(index) });
      return make("li", {}, make("b", { textContent: `${aspect}: ` }), "part in ", go, ` This run: ${clip(here)}. The other: ${clip(there)}.`);
    }) : [`The two runs are the same in every ${this.run.word}.`]);
    element("by-request").closest("details").hidden = this.run.isCalls;
    const cells = (tag, texts) => texts.map((text) => make(tag, { textContent: text }));
    const shown = ({ waited, ended, preempted }) => [waited, ended ?? "never", preempted];
    fill(element("by-request"), [
      make("tr", {}, ...cells("th", ["request", "steps waited", "ends in step", "preemptions", "the other: steps waited", "ends in step", "preemptions"])),
      ...byRequest(this.run, this.other).map(({ id, here, there }) => make("tr", {}, ...cells("td", [id, ...shown(here), ...shown(there)]))),
    ]);
  }

  repaint() {
    readColours();
    this.pool.shown = [];
    legend(element("legend"), Object.entries(MEANING).map(([name, text]) => [colours[name], LETTERS[name] ?? "", text]));
    legend(element("pool-legend"), [
      [colours.paper, "", "free"], [colours.cached, "·", "free, cached"], [colours.held, "", "held, by the request of this number"],
      [colours.shared, "", "shared"], [colours.bad, "!", "lost: not free, and in no block table"], [colours.bad, "≠", "in more or fewer block tables than it counts"], [colours.paper, "", "of the chosen request"],
    ]);
    element("pool-legend").lastChild.firstChild.style.borderColor = colours.choice;
    for (const timeline of this.timelines) timeline.paint();
    this.show();
  }

  // Draw at the next frame; several changes before it are drawn once.
  show() {
    if (this.pending) return;
    this.pending = true;
    requestAnimationFrame(() => {
      this.pending = false;
      this.render();
    });
  }

  go(index) {
    this.index = Math.max(0, Math.min(this.length - 1, index));
    this.show();
  }

  // The number of a request in another run, where it has the same id; -1 if there is none.
  same(from, to, k) { return from === to ? k : to.requests.findIndex(({ id }) => id === from.requests[k].id); }

  choose = (k) => {
    this.chosen = Math.max(0, Math.min(this.run.requests.length - 1, k));
    this.show();
  };

  render() {
    const { run, index, chosen } = this;
    if (!run.steps.length) return;
    const step = run.steps[Math.min(index, run.steps.length - 1)], state = run.state(step.index);
    element("step").value = index;
    const isOver = index >= run.steps.length;
    element("step").ariaValueText = element("where").textContent = `${run.word} ${index + 1} of ${this.length}${isOver ? ": this run has ended" : ""}`;
    const zoom = +element("zoom").value, count = zoom ? Math.min(zoom, this.length) : this.length;
    const first = Math.max(0, Math.min(this.length - count, index - (count >> 1)));
    const mark = this.partings.length ? this.partings[0].index : null;
    for (const timeline of this.timelines) timeline.draw(index, this.same(run, timeline.run, chosen), first, count, mark);
    this.pool.draw(state, chosen);
    this.lanes.draw(step);
    drawBudget(run, step);
    // While the step changes quickly, a frame has time for all pictures and one of the texts; the next frames write the others.
    const now = performance.now(), isScrubbing = now - this.rendered < 100, texts = this.texts();
    this.rendered = now;
    clearTimeout(this.textTimer);
    if (!isScrubbing) return texts.forEach((write) => write());
    texts[this.turn++ % texts.length]();
    this.textTimer = setTimeout(() => this.texts().forEach((write) => write()), 100);
  }

  // The functions that write the texts of this step.
  texts() {
    const { run, index, chosen } = this, step = run.steps[Math.min(index, run.steps.length - 1)], state = run.state(step.index);
    const history = () => [`${run.requests[chosen].id}, which is chosen:`, ...run.history(chosen).map(([name, from, to]) => `steps ${from + 1} to ${to + 1}: ${MEANING[name]}`)];
    return [
      () => {
        this.drawTotals(step.index);
        budgetInWords(run, step);
        this.lanes.describe();
      },
      () => {
        drawStep(run, step, chosen, this.choose, this.showAll);
        element("waiting").textContent = waitingInWords(run, state, step);
      },
      () => {
        this.pool.summary(state);
        this.pool.describe(state);
        this.inWords("pool", "tables", () => tablesInWords(run, state));
      },
      () => {
        drawText(run, step, chosen, this.choose);
        this.inWords("timeline", "timeline-words", history);
      },
    ];
  }

  // The descriptions in words are written only where they are open.
  inWords(section, list, lines) {
    if (document.querySelector(`#${section} .words`).open) fill(element(list), lines());
  }

  drawTotals(index) {
    const t = this.run.totals(index), share = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(0)} %` : "–");
    const shown = {
      "tokens out": t.num_output_tokens, "tokens/s": t.seconds ? (t.num_output_tokens / t.seconds).toFixed(1) : "–",
      computed: t.num_computed_tokens, preemptions: t.num_preemptions, finished: t.num_finished,
      "pool held": share(t.slots_held, t.num_slots * t.num_steps),
      "slots/token": t.tokens_stored ? (t.slots_held / t.tokens_stored).toFixed(2) : "–",
      "prefix hits": share(t.num_cached_tokens, t.num_prompt_tokens), "drafts accepted": share(t.num_accepted_tokens, t.num_draft_tokens),
    };
    const box = element("totals");
    if (!box.children.length) fill(box, Object.keys(shown).map((name) => make("div", {}, make("dt", { textContent: name }), make("dd"))));
    Object.values(shown).forEach((value, i) => { box.children[i].lastChild.textContent = value.toLocaleString("en"); });
  }

  // Controls ------------------------------------------------------------------------------------------------

  listen() {
    const press = (id, action) => element(id).addEventListener("click", action);
    press("play", () => this.play(this.timer === null));
    press("back", () => this.go(this.index - 1));
    press("forward", () => this.go(this.index + 1));
    press("preemption", () => this.nextPreemption());
    press("parting", () => this.goToParting());
    press("all-entries", () => { this.showAll = !this.showAll; this.show(); });
    element("step").addEventListener("input", (event) => this.go(+event.target.value));
    element("zoom").addEventListener("change", () => this.show());
    for (const words of document.querySelectorAll(".words")) words.addEventListener("toggle", () => this.show());
    for (const timeline of this.timelines) {
      const pick = (event) => {
        const [step, row] = timeline.at(event), { run } = this;
        this.go(step);
        this.choose(this.same(timeline.run, run, Math.min(row, timeline.run.requests.length - 1)));
      };
      timeline.canvas.addEventListener("pointerdown", (event) => { timeline.canvas.setPointerCapture(event.pointerId); pick(event); });
      timeline.canvas.addEventListener("pointermove", (event) => { if (event.buttons) pick(event); });
    }
    element("grid").addEventListener("pointerdown", (event) => { this.pool.block = this.pool.at(event); this.show(); });
    element("grid").addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !this.pool.move(event.key)) return;
      event.preventDefault();
      event.stopPropagation();
      this.show();
    });
    document.addEventListener("keydown", (event) => this.key(event));
    window.addEventListener("resize", () => this.show());
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.repaint());
  }

  key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, [popover]")) return;
    const far = event.shiftKey ? 10 : 1, isButton = event.target.closest("button, summary, .scroll, #chosen") !== null;
    const vertical = isButton && event.target.closest(".scroll, #chosen") !== null;
    const actions = {
      ArrowLeft: () => this.go(this.index - far), ArrowRight: () => this.go(this.index + far),
      Home: () => this.go(0), End: () => this.go(this.length - 1),
      ...(vertical ? {} : { ArrowUp: () => this.choose(this.chosen - 1), ArrowDown: () => this.choose(this.chosen + 1) }),
      ...(isButton ? {} : { " ": () => this.play(this.timer === null) }),
      p: () => this.nextPreemption(), d: () => this.goToParting(), b: () => element("grid").focus(),
    };
    const action = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  play(isOn) {
    clearInterval(this.timer);
    this.timer = null;
    element("play").textContent = isOn ? "Stop" : "Play";
    element("play").ariaPressed = isOn;
    if (!isOn) return;
    if (this.index >= this.length - 1) this.go(0);
    let last = performance.now();
    this.timer = setInterval(() => {
      const now = performance.now(), steps = Math.floor(((now - last) / 1000) * +element("speed").value);
      if (!steps) return;
      last = now;
      this.go(this.index + steps);
      if (this.index >= this.length - 1) this.play(false);
    }, 8);
  }

  nextPreemption() {
    const { steps } = this.run;
    for (let i = 1; i <= steps.length; i++) {
      const step = steps[(this.index + i) % steps.length];
      if (!step.plan.preempt) continue;
      this.choose(step.plan.preempt[0][0]);
      this.go(step.index);
      return;
    }
  }

  goToParting() {
    if (this.partings.length) this.go(this.partings[0].index);
  }
}

Promise.all([unpack("trace"), unpack("other")]).then(([run, other]) => {
  if (!run.steps.length) throw new Error("the trace has no step");
  window.page = new Page(run, other);
}).catch((error) => {
  element("problem").textContent = `This page could not be shown: ${error.message}. It needs a browser of 2023 or later.`;
  element("problem").hidden = false;
  throw error;
});
