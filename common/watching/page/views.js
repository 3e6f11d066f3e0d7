"use strict";
// The views: each draws one step. Colours come from the style sheet, so light and dark need no code.

const LETTERS = { prefill: "P", recompute: "R", decode: "D", verify: "V", preempted: "×", swapped: "S" };
const MEANING = {
  waiting: "waits", idle: "runs, nothing in this step", prefill: "prefill", recompute: "computed again", decode: "decode",
  verify: "verifies draft tokens", preempted: "preempted", swapped: "waits, its blocks on the host",
};
const MAX_ROWS = 16; // of a table that follows every step

const element = (id) => document.getElementById(id);
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

function make(tag, attributes = {}, ...children) {
  const node = Object.assign(document.createElement(tag), attributes);
  node.append(...children);
  return node;
}

// Fill a list or a table with rows; a row is a node, or the text of an item.
function fill(node, rows) {
  node.replaceChildren(...rows.map((row) => (typeof row === "string" ? make("li", { textContent: row }) : row)));
}

let colours = {}, packed = {}; // by name: as a style sheet has them, and as a pixel
function readColours() {
  const style = getComputedStyle(document.documentElement);
  const names = [...STATES.slice(1), "paper", "raised", "line", "ink", "faint", "accent", "bad", "held", "shared", "cached", "choice"];
  colours = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
  const probe = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  packed = Object.fromEntries(names.map((name) => {
    probe.fillStyle = colours[name];
    probe.fillRect(0, 0, 1, 1);
    return [name, new Uint32Array(probe.getImageData(0, 0, 1, 1).data.buffer)[0]];
  }));
}

// A canvas in CSS pixels, sharp on any screen.
function surface(canvas, height) {
  const width = canvas.clientWidth, ratio = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d", { alpha: false });
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [pen, width];
}

function legend(node, kinds) {
  fill(node, kinds.map(([colour, letter, text]) => {
    const mark = make("i", { textContent: letter });
    mark.style.background = colour;
    return make("li", {}, mark, text);
  }));
}

// ---------------------------------------------------------------------------------------------------------------
// The timeline: requests down, steps across
// ---------------------------------------------------------------------------------------------------------------

class Timeline {
  constructor(run, canvas) {
    Object.assign(this, { run, canvas });
    const rows = run.requests.length;
    this.rowHeight = Math.max(1.5, Math.min(16, 320 / rows));
    this.height = Math.max(40, Math.ceil(rows * this.rowHeight));
    this.canvas.setAttribute("role", "img");
  }

  // The whole run as a picture with one pixel for each step and request, painted once.
  paint() {
    const { run } = this, width = Math.max(1, run.steps.length), height = Math.max(1, run.requests.length);
    this.picture = new OffscreenCanvas(width, height);
    const pen = this.picture.getContext("2d"), image = pen.createImageData(width, height);
    const table = ["paper", ...STATES.slice(1)].map((name) => packed[name]);
    new Uint32Array(image.data.buffer).set(run.cells.length ? Uint32Array.from(run.cells, (cell) => table[cell]) : []);
    pen.putImageData(image, 0, 0);
  }

  // first, count: the steps that are shown.
  draw(index, chosen, first, count, mark) {
    const [pen, width] = surface(this.canvas, this.height), { run, rowHeight, height } = this;
    Object.assign(this, { first, count, width });
    const cell = width / count, rows = run.requests.length;
    pen.fillStyle = colours.paper;
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingEnabled = false;
    const shown = Math.min(count, run.steps.length - first);
    if (shown > 0) pen.drawImage(this.picture, first, 0, shown, rows, 0, 0, shown * cell, rows * rowHeight);
    if (rowHeight >= 5) {
      pen.fillStyle = colours.paper;
      for (let k = 1; k < rows; k++) pen.fillRect(0, k * rowHeight - 0.5, width, 1);
    }
    if (cell >= 12 && rowHeight >= 11) {
      pen.fillStyle = colours.paper;
      pen.font = `bold ${Math.min(11, rowHeight - 2)}px ui-monospace, monospace`;
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      for (let k = 0; k < rows; k++) {
        for (let i = 0; i < shown; i++) {
          const letter = LETTERS[run.cell(k, first + i)];
          if (letter) pen.fillText(letter, (i + 0.5) * cell, (k + 0.5) * rowHeight + 0.5);
        }
      }
    }
    if (chosen >= 0) {
      pen.strokeStyle = colours.choice;
      pen.lineWidth = 2;
      pen.strokeRect(1, chosen * rowHeight, width - 2, Math.max(2, rowHeight));
    }
    if (mark !== null) {
      pen.fillStyle = colours.bad;
      for (let y = 0; y < height; y += 8) pen.fillRect((mark - first) * cell - 1, y, 2, 5);
    }
    pen.fillStyle = colours.ink;
    pen.globalAlpha = 0.85;
    pen.fillRect((index - first) * cell, 0, Math.max(1.5, Math.min(cell, 2)), height);
    if (cell > 4) pen.fillRect((index - first + 1) * cell - 1.5, 0, 1.5, height);
    pen.globalAlpha = 1;
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const step = this.first + Math.floor((event.clientX - box.left) / (this.width / this.count));
    return [step, Math.floor((event.clientY - box.top) / this.rowHeight)];
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The step
// ---------------------------------------------------------------------------------------------------------------

function drawBudget(run, step) {
  const budget = run.config.max_num_batched_tokens, entries = step.entries;
  const used = entries.reduce((sum, { n }) => sum + n, 0);
  const sums = {};
  for (const { kind, n } of entries) sums[kind] = (sums[kind] ?? 0) + n;
  element("budget").replaceChildren(...Object.entries(sums).map(([kind, n]) => {
    const bar = make("i", { title: `${MEANING[kind]}: ${n}` });
    bar.style.cssText = `width:${(100 * n) / budget}%;background:var(--${kind})`;
    return bar;
  }));
  const parts = Object.entries(sums).map(([kind, n]) => `${n} ${MEANING[kind]}`);
  const words = `${used} of ${budget} tokens of the budget${parts.length ? `: ${parts.join(", ")}` : ""}. ${step.numBusy} run, ${step.waiting ?? 0} wait.`;
  element("budget").ariaLabel = words;
  element("budget-words").textContent = step.waiting ? `${words} ${whyWaiting(run, step)}` : words;
}

function drawStep(run, step, chosen, choose, showAll) {
  const { entries } = step;
  fill(element("events"), eventsOf(run, step));
  const rows = showAll ? entries : entries.slice(0, MAX_ROWS);
  const at = entries.findIndex(({ k }) => k === chosen);
  if (at >= rows.length) rows.push(entries[at]);
  const cells = (tag, texts) => texts.map((text) => make(tag, { textContent: text }));
  fill(element("entries"), run.isCalls ? [] : [
    make("tr", {}, ...cells("th", ["request", "kind", "positions", "tokens", "why", "sampled"])),
    ...rows.map((entry) => {
      const { k, kind, start, n, sampled, kept } = entry;
      const mark = make("i");
      mark.style.background = `var(--${kind})`;
      const name = make("button", { textContent: run.requests[k].id, onclick: () => choose(k) });
      const end = run.requests[k].ended === step.index ? ` · ends: ${run.requests[k].reason}` : "";
      const found = sampled.slice(0, kept).map((token) => JSON.stringify(run.piece(token))).join(" ") + end;
      return make("tr", { className: k === chosen ? "chosen" : "" },
        make("td", {}, name), make("td", {}, mark, MEANING[kind]),
        ...cells("td", [`${start}–${start + n - 1}`, n, why(run, entry), found]));
    }),
  ]);
  const more = element("all-entries");
  more.hidden = entries.length <= MAX_ROWS;
  more.textContent = showAll ? "Show fewer" : `Show all ${entries.length}`;
}

function eventsOf(run, step) {
  const name = (k) => run.requests[k].id, found = run.isCalls ? [step.plan.call, ...step.plan.state] : [];
  if (step.plan.reset) found.push("The step before was interrupted: all requests begin again from their tokens.");
  for (const [victim, cause, lacks, free] of step.plan.preempt ?? []) {
    const how = (step.plan.host ?? {})[victim] ? "its blocks go to the host" : "its tokens will be computed again";
    const which = victim === cause ? "it is preempted itself" : `${name(victim)} is preempted`;
    found.push(`${name(cause)} lacks ${plural(lacks, "block")} and ${free} are free: ${which}; ${how}.`);
  }
  for (const [word, moves] of [["out to the host", step.plan.swaps_out], ["in from the host", step.plan.swaps_in]]) {
    if (moves) found.push(`${plural(moves.length, "block")} swapped ${word}.`);
  }
  for (const [source, target, slots] of step.plan.copies ?? []) found.push(`Copy on write: ${plural(slots, "token")} of block ${source} to block ${target}.`);
  for (const [tenant, served] of Object.entries(step.plan.served ?? {})) found.push(`Served before this step: tenant ${tenant}, ${plural(served, "token")}.`);
  for (const [k, error] of Object.entries(step.result?.errors ?? {})) found.push(`${name(k)} fails: ${error}`);
  if (!step.result) found.push("This step was never collected: it was interrupted.");
  return found;
}

// ---------------------------------------------------------------------------------------------------------------
// The pool
// ---------------------------------------------------------------------------------------------------------------

// A request's id, short enough for a block.
const label = (run, k) => (run.requests[k]?.id ?? "").replace(/^(request|turn)-/, "").slice(0, 4);

class Pool {
  constructor(run, canvas) {
    Object.assign(this, { run, canvas, block: 0 });
    this.numHost = run.config.num_host_blocks || 0;
  }

  draw(state, chosen) {
    const numBlocks = this.run.config.num_blocks, numHost = Math.min(this.numHost, 4096), room = this.canvas.clientWidth;
    const size = Math.max(5, Math.min(30, Math.floor(Math.sqrt((room * 320) / numBlocks))));
    const columns = Math.max(1, Math.floor(room / size)), rows = Math.ceil(numBlocks / columns);
    const [pen] = surface(this.canvas, rows * size + (numHost ? Math.ceil(numHost / columns) * size + 22 : 0));
    Object.assign(this, { size, columns, kinds: state.kinds() });
    pen.fillStyle = colours.paper;
    pen.fillRect(0, 0, room, this.canvas.clientHeight);
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.font = `${Math.max(7, Math.min(11, size * 0.42))}px ui-monospace, monospace`;
    this.cells(pen, 0, this.kinds, (block) => ["", "·", label(this.run, state.holder[block]), `×${state.counts[block]}`, "!"][this.kinds[block]]);
    if (numHost) {
      const hosted = new Map([...state.hosts].flatMap(([k, blocks]) => blocks.map((block) => [block, k])));
      const kinds = Uint8Array.from({ length: numHost }, (_, block) => (hosted.has(block) ? 2 : 0));
      pen.fillStyle = colours.faint;
      pen.textAlign = "left";
      pen.fillText("on the host", 2, rows * size + 11);
      pen.textAlign = "center";
      this.cells(pen, rows * size + 20, kinds, (block) => (hosted.has(block) ? label(this.run, hosted.get(block)) : ""));
    }
    pen.fillStyle = colours.paper;
    for (const block of state.fresh) pen.fillRect((block % columns) * size + 2, Math.floor(block / columns) * size + 2, size / 5, size / 5);
    for (const block of (state.tables.get(chosen) ?? []).filter((each) => each >= 0)) this.frame(pen, block, colours.choice);
    this.frame(pen, this.block, colours.ink);
    this.summary(state);
  }

  // A row of cells for each `columns` blocks: one pixel each, enlarged; then the lines between them, and their texts.
  cells(pen, top, kinds, text) {
    const { size, columns } = this, rows = Math.ceil(kinds.length / columns);
    const picture = new OffscreenCanvas(columns, rows), small = picture.getContext("2d"), image = small.createImageData(columns, rows);
    const pixels = new Uint32Array(image.data.buffer), table = ["paper", "cached", "held", "shared", "bad"].map((name) => packed[name]);
    for (let block = 0; block < kinds.length; block++) pixels[block] = table[kinds[block]];
    small.putImageData(image, 0, 0);
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, top, columns * size, rows * size);
    pen.fillStyle = colours.line;
    for (let i = 0; i <= columns; i++) pen.fillRect(i * size - 0.5, top, 1, rows * size);
    for (let i = 0; i <= rows; i++) pen.fillRect(0, top + i * size - 0.5, columns * size, 1);
    if (size < 14) return;
    for (let block = 0; block < kinds.length; block++) {
      pen.fillStyle = kinds[block] === 1 ? colours.ink : colours.paper;
      pen.fillText(text(block), ((block % columns) + 0.5) * size, top + (Math.floor(block / columns) + 0.5) * size + 1);
    }
  }

  summary(state) {
    const counts = [0, 0, 0, 0, 0], numBlocks = this.run.config.num_blocks;
    for (const kind of this.kinds) counts[kind]++;
    const parts = [`${numBlocks - state.free} of ${numBlocks} blocks held`, `${counts[3]} of them shared`, `${state.free} free`, `${counts[1]} of those cached`];
    if (this.numHost) parts.push(`${[...state.hosts.values()].flat().length} of ${this.numHost} on the host used`);
    const words = element("pool-words");
    words.textContent = `${parts.join(", ")}.`;
    if (counts[4]) words.append(make("span", { className: "bad", textContent: ` ${plural(counts[4], "block")} lost: not free, and in no block table.` }));
  }

  frame(pen, block, colour) {
    pen.strokeStyle = colour;
    pen.lineWidth = 2;
    pen.strokeRect((block % this.columns) * this.size + 1, Math.floor(block / this.columns) * this.size + 1, this.size - 2, this.size - 2);
  }

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const block = Math.floor((event.clientY - box.top) / this.size) * this.columns + Math.floor((event.clientX - box.left) / this.size);
    return Math.min(block, this.run.config.num_blocks - 1);
  }

  move(key) {
    const by = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, Home: -Infinity, End: Infinity }[key];
    if (by === undefined) return false;
    this.block = Math.max(0, Math.min(this.run.config.num_blocks - 1, this.block + by));
    return true;
  }

  // What is in the chosen block, who holds it, and the chain of hashes that it ends.
  describe(state) {
    const { run, block } = this, holders = state.holders(block), kind = BLOCKS[this.kinds[block]];
    const lines = [];
    const count = state.counts[block];
    lines.push(`Block ${block}: ${{ free: "free", cached: "free, and in the prefix cache", held: "held", shared: "shared", lost: "lost: not free, and in no block table" }[kind]}, reference count ${count}.`);
    if (holders.length) lines.push(`Holders: ${holders.map(([k, place]) => `${run.requests[k].id} (its block ${place})`).join(", ")}.`);
    const chain = [];
    for (let hash = state.hashes[block], at = block; hash !== null && at >= 0 && chain.length < 64;) {
      chain.push(`${at} (${hash})`);
      hash = state.parents[at];
      at = hash === null ? -1 : state.hashes.indexOf(hash);
      if (at < 0 && hash !== null) chain.push(`a block that is gone (${hash})`);
    }
    lines.push(chain.length ? `Hash chain, back to the first block: ${chain.join(" ← ")}.` : "No hash: it is not full and verified, so no other request finds it.");
    const tokens = run.blockTokens(state, block);
    lines.push(tokens.length ? `${plural(tokens.length, "token")}: ${tokens.map((token) => JSON.stringify(run.piece(token))).join(" ")}` : "No tokens.");
    fill(element("block"), lines.map((text) => make("p", { textContent: text })));
  }
}

function tablesInWords(run, state) {
  return [...state.tables].sort(([a], [b]) => a - b).map(([k, table]) => `${run.requests[k].id}: ${table.join(", ")} (${plural(state.computed.get(k) ?? 0, "token")} computed)`);
}

// ---------------------------------------------------------------------------------------------------------------
// Text
// ---------------------------------------------------------------------------------------------------------------

// The pieces of this step: accepted draft tokens, the token that was sampled, and the rejected draft tokens.
function newPieces(run, entry) {
  const accepted = Math.min(entry.kept, Math.max(0, entry.sampled.length - 1));
  const pieces = entry.sampled.slice(0, entry.kept).map((token, i) => make("ins", { className: i < accepted ? "accepted" : "", textContent: run.piece(token) }));
  return [...pieces, ...entry.drafts.slice(Math.max(0, entry.sampled.length - 1)).map((token) => make("del", { textContent: run.piece(token) }))];
}

function drawText(run, step, chosen, choose) {
  const request = run.requests[chosen], entry = step.entries.find(({ k }) => k === chosen);
  const box = element("chosen");
  box.replaceChildren(
    make("b", { textContent: `${request.id}\n` }),
    make("span", { className: "prompt", textContent: request.prompt.map((token) => run.vocab[token] ?? "").join("") }),
    run.textBefore(chosen, step.index, 1500),
    ...(entry ? newPieces(run, entry) : []),
  );
  box.scrollTop = box.scrollHeight;
  const others = step.entries.filter(({ k, sampled, drafts }) => k !== chosen && (sampled.length || drafts.length)).slice(0, 10);
  fill(element("others"), others.map((each) => {
    const name = make("button", { textContent: run.requests[each.k].id, onclick: () => choose(each.k) });
    const text = run.textBefore(each.k, step.index, 60).slice(-60).replaceAll("\n", " ");
    return make("li", {}, name, make("span", {}, make("bdi", {}, text, ...newPieces(run, each))));
  }));
}

// ---------------------------------------------------------------------------------------------------------------
// Time: the engine and its ranks
// ---------------------------------------------------------------------------------------------------------------

class Lanes {
  constructor(run, canvas) {
    Object.assign(this, { run, canvas });
    this.rows = [["scheduler", []], ["submit", []], ["collect", []]];
    for (const step of run.steps) {
      const [begun, submitted, done] = step.plan.t ?? [0, 0, 0];
      this.rows[0][1].push([step.index, begun, submitted]);
      this.rows[1][1].push([step.index, submitted, done]);
      if (step.result) this.rows[2][1].push([step.index, step.result.t[0], step.result.t[2]]);
    }
    for (const [rank, times] of Object.entries(run.ranks)) {
      const found = times.filter(([step]) => run.atStep.has(step)).map(([step, start, end]) => [run.atStep.get(step).index, start, end]);
      this.rows.push([`rank ${rank}`, found]);
    }
  }

  draw(step) {
    const { run, rows } = this, height = 24, [pen, width] = surface(this.canvas, rows.length * height + 18);
    const left = 74, near = run.steps.slice(Math.max(0, step.index - 2), step.index + 3);
    const begin = near[0].plan.t[0], end = Math.max(...near.map((each) => each.result?.t[2] ?? each.plan.t[2]));
    const scale = (width - left - 4) / Math.max(1e-6, end - begin);
    pen.fillStyle = colours.paper;
    pen.fillRect(0, 0, width, rows.length * height + 18);
    pen.font = "12px system-ui, sans-serif";
    pen.textBaseline = "middle";
    const words = [];
    rows.forEach(([name, spans], row) => {
      const y = row * height;
      pen.fillStyle = colours.ink;
      pen.fillText(name, 0, y + height / 2);
      pen.fillStyle = colours.raised;
      pen.fillRect(left, y + 3, width - left, height - 6);
      for (let i = this.seek(spans, begin); i < spans.length && spans[i][1] <= end; i++) {
        const [index, from, to] = spans[i], x = left + Math.max(0, from - begin) * scale, x2 = left + (Math.min(to, end) - begin) * scale;
        pen.fillStyle = index === step.index ? colours.shared : colours.idle;
        pen.fillRect(x, y + 3, Math.max(1, x2 - x - 1), height - 6);
        if (x2 - x > 26) {
          pen.fillStyle = colours.paper;
          pen.fillText(`${run.steps[index].number}`, x + 4, y + height / 2);
        }
        if (index === step.index) words.push(`${name} from ${((from - begin) * 1e3).toFixed(1)} to ${((to - begin) * 1e3).toFixed(1)} ms`);
      }
    });
    pen.fillStyle = colours.faint;
    pen.fillText("0 ms", left, rows.length * height + 9);
    pen.textAlign = "right";
    pen.fillText(`${((end - begin) * 1e3).toFixed(1)} ms`, width - 2, rows.length * height + 9);
    pen.textAlign = "left";
    const text = `${words.join("; ")}.`;
    this.canvas.ariaLabel = text;
    element("time-words").textContent = text;
  }

  // The first span that has not ended before `begin`.
  seek(spans, begin) {
    let low = 0, high = spans.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (spans[middle][2] < begin) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}
