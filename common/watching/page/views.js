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

function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
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

// The width of a canvas is observed and kept, because reading it makes the browser lay out the page again.
const widths = new ResizeObserver((entries) => {
  for (const { target, contentRect } of entries) {
    if (target.room !== contentRect.width) window.page?.show();
    target.room = contentRect.width;
  }
});
function room(canvas) {
  if (canvas.room === undefined) widths.observe(canvas);
  return (canvas.room ??= canvas.clientWidth);
}

// Return a pen in CSS pixels that is sharp on any screen, the width, and whether a new size has cleared the canvas.
function surface(canvas, height) {
  const width = room(canvas), ratio = window.devicePixelRatio || 1;
  const isNew = canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio);
  if (isNew) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const pen = canvas.getContext("2d", { alpha: false });
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  return [pen, width, isNew];
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
  constructor(run, box) {
    const rows = run.requests.length;
    this.canvas = make("canvas", { tabIndex: -1, ariaLabel: `Timeline of ${plural(rows, "request")} over ${plural(run.steps.length, "step")}; in words below.` });
    this.canvas.setAttribute("role", "img");
    // The marks that move are elements above the picture, which is not redrawn when the step changes.
    [this.choice, this.mark, this.cursor] = ["choice", "mark", "cursor"].map((className) => make("i", { className }));
    box.append(this.canvas, this.choice, this.mark, this.cursor);
    this.rowHeight = Math.max(1.5, Math.min(16, 320 / rows));
    this.height = Math.max(40, Math.ceil(rows * this.rowHeight));
    Object.assign(this, { run, drawn: "" });
  }

  // The whole run as a picture with one pixel for each step and request, painted once.
  paint() {
    const { run } = this, width = Math.max(1, run.steps.length), height = Math.max(1, run.requests.length);
    this.picture = new OffscreenCanvas(width, height);
    const pen = this.picture.getContext("2d"), image = pen.createImageData(width, height);
    const table = ["paper", ...STATES.slice(1)].map((name) => packed[name]);
    new Uint32Array(image.data.buffer).set(run.cells.length ? Uint32Array.from(run.cells, (cell) => table[cell]) : []);
    pen.putImageData(image, 0, 0);
    this.drawn = "";
  }

  // first, count: the steps that are shown.
  draw(index, chosen, first, count, mark) {
    const { run, rowHeight, height } = this, width = room(this.canvas), cell = width / count;
    Object.assign(this, { first, count, width });
    const wanted = `${first} ${count} ${width} ${window.devicePixelRatio}`;
    if (this.drawn !== wanted) this.drawSteps(first, count, cell);
    this.drawn = wanted;
    const lay = (node, x, y, wide, high) => {
      node.style.transform = `translate(${x}px, ${y}px)`;
      node.style.width = `${wide}px`;
      node.style.height = `${high}px`;
    };
    lay(this.choice, 0, chosen * rowHeight, width, Math.max(3, rowHeight));
    lay(this.cursor, (index - first) * cell, 0, Math.max(2, cell), height);
    this.mark.hidden = mark === null || mark < first || mark > first + count;
    if (!this.mark.hidden) lay(this.mark, (mark - first) * cell - 1, 0, 2, height);
    this.choice.hidden = chosen < 0;
  }

  drawSteps(first, count, cell) {
    const [pen, width] = surface(this.canvas, this.height), { run, rowHeight, height } = this, rows = run.requests.length;
    pen.fillStyle = colours.paper;
    pen.fillRect(0, 0, width, height);
    pen.imageSmoothingEnabled = false;
    const shown = Math.min(count, run.steps.length - first);
    if (shown > 0) pen.drawImage(this.picture, first, 0, shown, rows, 0, 0, shown * cell, rows * rowHeight);
    if (rowHeight >= 5) {
      pen.fillStyle = colours.paper;
      for (let k = 1; k < rows; k++) pen.fillRect(0, k * rowHeight - 0.5, width, 1);
    }
    if (cell < 12 || rowHeight < 11) return;
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

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const step = this.first + Math.floor((event.clientX - box.left) / (this.width / this.count));
    return [step, Math.floor((event.clientY - box.top) / this.rowHeight)];
  }
}

// ---------------------------------------------------------------------------------------------------------------
// The step
// ---------------------------------------------------------------------------------------------------------------

function budgetOf(run, step) {
  const sums = {};
  for (const { kind, n } of step.entries) sums[kind] = (sums[kind] ?? 0) + n;
  return [Object.entries(sums), step.entries.reduce((sum, { n }) => sum + n, 0), run.config.max_num_batched_tokens];
}

function drawBudget(run, step) {
  const [sums, , budget] = budgetOf(run, step), box = element("budget");
  while (box.children.length < sums.length) box.append(make("i"));
  [...box.children].forEach((bar, i) => {
    const [kind, n] = sums[i] ?? ["waiting", 0];
    bar.hidden = n === 0;
    bar.style.width = `${(100 * n) / budget}%`;
    bar.style.background = colours[kind];
  });
}

function budgetInWords(run, step) {
  const [sums, used, budget] = budgetOf(run, step), parts = sums.map(([kind, n]) => `${n} ${MEANING[kind]}`);
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
  const table = element("entries"), count = run.isCalls ? -1 : rows.length;
  if (!table.rows.length) table.append(make("tr", {}, ...["request", "kind", "positions", "tokens", "why", "sampled"].map((text) => make("th", { textContent: text }))));
  while (table.rows.length < count + 1) table.append(entryRow(choose));
  while (table.rows.length > count + 1) table.lastChild.remove();
  rows.slice(0, Math.max(0, count)).forEach((entry, i) => {
    const { k, kind, start, n, sampled, kept } = entry, row = table.rows[i + 1];
    const end = run.requests[k].ended === step.index ? ` · ends: ${run.requests[k].reason}` : "";
    const found = sampled.slice(0, kept).map((token) => JSON.stringify(run.piece(token))).join(" ") + end;
    Object.assign(row, { k, className: k === chosen ? "chosen" : "" });
    row.mark.style.background = colours[kind];
    [run.requests[k].id, MEANING[kind], `${start}–${start + n - 1}`, `${n}`, why(run, entry), found].forEach((text, part) => put(row.parts[part], text));
  });
  const more = element("all-entries");
  more.hidden = entries.length <= MAX_ROWS;
  more.textContent = showAll ? "Show fewer" : `Show all ${entries.length}`;
}

// Rows are kept from step to step, since most of their cells stay as they are.
function entryRow(choose) {
  const name = make("button", { onclick: () => choose(row.k) }), mark = make("i"), kind = make("span"), rest = ["", "", "", ""].map(() => make("td"));
  const row = make("tr", { mark, parts: [name, kind, ...rest] }, make("td", {}, name), make("td", {}, mark, kind), ...rest);
  return row;
}

function eventsOf(run, step) {
  const name = (k) => run.requests[k].id, found = run.isCalls ? [step.plan.call, ...step.plan.state] : [];
  if (step.plan.reset) found.push("The step before was interrupted: all requests begin again from their tokens.");
  for (const preemption of step.plan.preempt ?? []) {
    const [victim, cause, lacks, free] = preemption;
    const how = (step.plan.host ?? {})[victim] ? "its blocks go to the host" : "its tokens will be computed again";
    const which = victim === cause ? "it is preempted itself" : `${name(victim)} is preempted`;
    found.push(`${name(cause)} lacks ${plural(lacks, "block")} and ${free} are free: ${which}; ${how}.`);
    found.push(make("li", { className: "rule", textContent: whichVictim(run, preemption) }));
  }
  for (const { k, start, lacks, admitted } of step.entries) {
    const tokens = `${start} of its ${start + lacks} tokens`;
    if (admitted === "host") found.push(`${name(k)} is admitted again: ${tokens} come back from the host.`);
    if (admitted === "again") found.push(`${name(k)} is admitted again: ${start ? tokens : "none of its tokens"} were found in the prefix cache.`);
  }
  for (const [word, moves] of [["out to the host", step.plan.swaps_out], ["in from the host", step.plan.swaps_in]]) {
    if (moves) found.push(`${plural(moves.length, "block")} swapped ${word}.`);
  }
  for (const [source, target, slots] of step.plan.copies ?? []) found.push(`Copy on write: ${plural(slots, "token")} of block ${source} to block ${target}.`);
  for (const [tenant, served] of Object.entries(step.plan.served ?? {})) found.push(`Served so far, this step included: tenant ${tenant}, ${plural(served, "token")}.`);
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
    Object.assign(this, { run, canvas, block: 0, kinds: [], shown: [] }); // shown: what is drawn in each cell, if it is known
    this.numHost = Math.min(run.config.num_host_blocks || 0, 4096);
    this.labels = run.requests.map((_, k) => label(run, k));
  }

  draw(state, chosen) {
    const numBlocks = this.run.config.num_blocks, { numHost } = this, wide = room(this.canvas);
    const size = Math.max(5, Math.min(30, Math.floor(Math.sqrt((wide * 320) / numBlocks))));
    const columns = Math.max(1, Math.floor((wide - 1) / size)), rows = Math.ceil(numBlocks / columns);
    const height = rows * size + 1 + (numHost ? Math.ceil(numHost / columns) * size + 22 : 0);
    const [pen, , isNew] = surface(this.canvas, height);
    Object.assign(this, { size, columns, kinds: state.kinds() });
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    pen.font = `${Math.max(7, Math.min(11, size * 0.42))}px ui-monospace, monospace`;
    if (isNew || !this.shown.length) {
      this.shown = new Array(numBlocks + numHost).fill(null);
      pen.fillStyle = colours.paper;
      pen.fillRect(0, 0, wide, height);
      pen.fillStyle = colours.faint;
      pen.textAlign = "left";
      if (numHost) pen.fillText("on the host", 2, rows * size + 11);
      pen.textAlign = "center";
    }
    for (let block = 0; block < numBlocks; block++) {
      const kind = this.kinds[block];
      const text = kind === 0 ? "" : kind === 1 ? "·" : kind === 2 ? this.labels[state.holder[block]] : kind === 3 ? `×${state.counts[block]}` : kind === 4 ? "!" : "≠";
      this.cell(pen, block, block, 0, kind, text);
    }
    const hosted = [];
    for (const [k, blocks] of state.hosts) for (const block of blocks) hosted[block] = this.labels[k];
    for (let block = 0; block < numHost; block++) {
      this.cell(pen, numBlocks + block, block, rows * size + 20, hosted[block] === undefined ? 0 : 2, hosted[block] ?? "");
    }
    pen.fillStyle = colours.paper;
    const marked = [...state.fresh, ...(state.tables.get(chosen) ?? []).filter((each) => each >= 0), this.block];
    for (const block of state.fresh) pen.fillRect((block % columns) * size + 2, Math.floor(block / columns) * size + 2, size / 5, size / 5);
    for (const block of marked.slice(state.fresh.length)) this.frame(pen, block, block === this.block ? colours.ink : colours.choice);
    for (const block of marked) this.shown[block] = null;
  }

  // Draw a cell, unless it shows this already. place: of the cell in `shown`.
  cell(pen, place, block, top, kind, text) {
    const wanted = `${kind}${text}`;
    if (this.shown[place] === wanted) return;
    this.shown[place] = wanted;
    const { size, columns } = this, x = (block % columns) * size, y = top + Math.floor(block / columns) * size;
    pen.fillStyle = colours.line;
    pen.fillRect(x, y, size + 1, size + 1);
    pen.fillStyle = colours[["paper", "cached", "held", "shared", "bad", "bad"][kind]];
    pen.fillRect(x + 1, y + 1, size - 1, size - 1);
    if (size < 14 || !text) return;
    pen.fillStyle = kind === 1 || kind === 2 ? colours.ink : colours.paper;
    pen.fillText(text, x + size / 2, y + size / 2 + 1);
  }

  summary(state) {
    const counts = new Array(BLOCKS.length).fill(0), numBlocks = this.run.config.num_blocks;
    for (const kind of this.kinds) counts[kind]++;
    const parts = [`${numBlocks - state.free} of ${numBlocks} blocks held`, `${counts[3]} of them shared`, `${state.free} free`, `${counts[1]} of those cached`];
    if (this.numHost) parts.push(`${[...state.hosts.values()].flat().length} of ${this.numHost} on the host used`);
    const words = element("pool-words");
    words.textContent = `${parts.join(", ")}.`;
    const which = (kind) => [...this.kinds.keys()].filter((block) => this.kinds[block] === kind).slice(0, 8).join(", ");
    if (counts[4]) words.append(make("span", { className: "bad", textContent: ` ${plural(counts[4], "block")} lost: not free, and in no block table: ${which(4)}.` }));
    if (counts[5]) words.append(make("span", { className: "bad", textContent: ` Miscounted, in more or fewer block tables than the reference count says: ${which(5)}.` }));
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

  // The contents of the chosen block, its holders, and the chain of hashes back to the first block.
  describe(state) {
    const { run, block } = this, holders = state.holders(block), kind = BLOCKS[this.kinds[block]];
    const lines = [];
    const count = state.counts[block];
    lines.push(`Block ${block}: ${{ free: "free", cached: "free, and in the prefix cache", held: "held", shared: "shared", lost: "lost: not free, and in no block table", miscounted: `miscounted: ${plural(holders.length, "block table")} ${holders.length === 1 ? "contains" : "contain"} it` }[kind]}, reference count ${count}.`);
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
  element("chosen").replaceChildren(make("div", {},
    make("b", { textContent: `${request.id}\n` }),
    make("span", { className: "prompt", textContent: request.prompt.map((token) => run.vocab[token] ?? "").join("") }),
    run.textBefore(chosen, step.index, 1500),
    ...(entry ? newPieces(run, entry) : []),
  ));
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

const STEPS_IN_VIEW = 24; // of usual length

class Lanes {
  constructor(run, canvas) {
    const begins = run.steps.map(({ plan }) => plan.t?.[0] ?? 0), ends = run.steps.map(({ plan, result }) => result?.t[2] ?? plan.t?.[2] ?? 0);
    const lasted = ends.map((end, i) => end - begins[i]), usual = begins.slice(1).map((begin, i) => begin - begins[i]).sort((a, b) => a - b);
    this.origin = begins[0] ?? 0;
    this.total = Math.max(1e-6, ends.reduce((a, b) => Math.max(a, b), this.origin) - this.origin);
    // The whole run has one scale, so that steps can be compared, with space for the longest step.
    this.span = Math.min(this.total, Math.max(STEPS_IN_VIEW * (usual[usual.length >> 1] ?? 0), lasted.reduce((a, b) => Math.max(a, b), 1e-6)));
    Object.assign(this, { run, canvas, begins, ends });
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
    const left = 74, { origin, total, span } = this, middle = (this.begins[step.index] + this.ends[step.index]) / 2;
    const begin = Math.max(origin, Math.min(origin + total - span, middle - span / 2)), end = begin + span;
    const scale = (width - left - 4) / span, ms = (time) => ((time - origin) * 1e3).toFixed(1);
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
      for (let i = this.seek(spans, begin); i < spans.length && spans[i][1] < end; i++) {
        const [index, from, to] = spans[i], x = left + Math.max(0, from - begin) * scale, x2 = left + (Math.min(to, end) - begin) * scale;
        pen.fillStyle = index === step.index ? colours.shared : colours.idle;
        pen.fillRect(x, y + 3, Math.max(1, x2 - x - 1), height - 6);
        if (x2 - x > 26) {
          pen.fillStyle = index === step.index ? colours.paper : colours.ink;
          pen.fillText(`${run.steps[index].number}`, x + 4, y + height / 2);
        }
        if (index === step.index) words.push(`${name} from ${ms(from)} to ${ms(to)} ms`);
      }
    });
    pen.fillStyle = colours.faint;
    const unit = 10 ** Math.floor(Math.log10(span * 1e3)), each = unit * (span * 1e3 < 2 * unit ? 0.2 : span * 1e3 < 5 * unit ? 0.5 : 1);
    pen.textAlign = "center";
    for (let tick = Math.ceil(+ms(begin) / each) * each; tick <= (end - origin) * 1e3; tick += each) {
      const x = left + (origin + tick / 1e3 - begin) * scale, text = `${+tick.toPrecision(6)} ms`, half = pen.measureText(text).width / 2;
      pen.fillRect(x, rows.length * height, 1, 4);
      if (x - half > left - 8 && x + half < width) pen.fillText(text, x, rows.length * height + 11);
    }
    pen.textAlign = "left";
    this.words = `Step ${step.number}, in milliseconds since the run began: ${words.join("; ")}.`;
  }

  describe() {
    this.canvas.ariaLabel = element("time-words").textContent = this.words;
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
