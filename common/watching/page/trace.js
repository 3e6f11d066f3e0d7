"use strict";
// A trace, and the numbers that follow from it. `recorder.py` describes its lines; `trace.py` computes the same numbers.

const STATES = ["", "waiting", "idle", "prefill", "recompute", "decode", "verify", "preempted", "swapped"];
const STATE = Object.fromEntries(STATES.map((name, number) => [name, number]));
const BLOCKS = ["free", "cached", "held", "shared", "lost", "miscounted"];
const KEYFRAME = 64; // lines from one full copy of the state to the next

// The engine's state after the lines so far. Tables are replaced, never changed, so that copies can share them.
class State {
  constructor(numBlocks) {
    this.counts = new Int32Array(numBlocks);
    this.hashes = new Array(numBlocks).fill(null);
    this.parents = new Array(numBlocks).fill(null);
    this.holder = new Int32Array(numBlocks).fill(-1); // the request whose table had it last, and its place there
    this.place = new Int32Array(numBlocks);
    this.before = new Int32Array(numBlocks).fill(-1); // and the block before it there
    this.fresh = []; // blocks whose content was replaced in the newest plan
    this.waiting = []; // the waiting line, in the policy's order
    this.tables = new Map();
    this.hosts = new Map();
    this.computed = new Map(); // of the requests that have not ended
    this.free = numBlocks;
  }

  copy() {
    const copy = Object.assign(Object.create(State.prototype), this);
    for (const name of ["counts", "hashes", "parents", "holder", "place", "before", "fresh"]) copy[name] = this[name].slice();
    for (const name of ["tables", "hosts", "computed"]) copy[name] = new Map(this[name]);
    return copy;
  }

  apply(line) {
    for (const request of line.requests ?? []) this.computed.set(request.number, 0);
    if (line.reset) {
      this.counts.fill(0);
      this.hashes.fill(null);
      this.before.fill(-1);
      this.tables.clear();
      this.hosts.clear();
      for (const k of this.computed.keys()) this.computed.set(k, 0);
    }
    if (line.plan !== undefined) {
      this.fresh = [];
      for (const entry of line.run) this.computed.set(entry.k, entry.start + entry.n);
    }
    for (const { k, spec, sampled } of line.entries ?? []) {
      if (sampled.length) this.computed.set(k, this.computed.get(k) - (spec + 1 - sampled.length));
    }
    if (line.waiting) {
      const [front, end, ...between] = line.waiting;
      this.waiting = [...this.waiting.slice(0, front), ...between, ...this.waiting.slice(this.waiting.length - end)];
    }
    for (const [k, [same, ...blocks]] of Object.entries(line.tables ?? {})) {
      const before = this.tables.get(+k) ?? [];
      const table = [...before.slice(0, same), ...blocks];
      if (table.length) this.tables.set(+k, table);
      else this.tables.delete(+k);
      blocks.forEach((block, i) => {
        this.holder[block] = +k;
        this.place[block] = same + i;
        this.before[block] = table[same + i - 1] ?? -1;
      });
    }
    for (const [block, count, ...hash] of line.blocks ?? []) {
      if (line.plan !== undefined && count > 0 && this.counts[block] === 0) this.fresh.push(block);
      this.counts[block] = count;
      if (!hash.length) continue;
      const [own, parent = this.hashes[this.before[block]] ?? null] = hash;
      this.hashes[block] = own;
      this.parents[block] = own === null ? null : parent;
    }
    for (const [k, blocks] of Object.entries(line.host ?? {})) blocks.length ? this.hosts.set(+k, blocks) : this.hosts.delete(+k);
    for (const [k, count] of Object.entries(line.computed ?? {})) this.computed.set(+k, count);
    for (const k of Object.keys(line.ends ?? {})) this.computed.delete(+k);
    this.free = line.free ?? this.free;
  }

  // Requests whose tables contain a block, as [request, place].
  holders(block) {
    const found = [];
    for (const [k, table] of this.tables) {
      const place = table.indexOf(block);
      if (place >= 0) found.push([k, place]);
    }
    return found;
  }

  // The kind of each block, as an index into BLOCKS. A block is lost if it is not free although no table contains it, and
  // miscounted if its reference count otherwise differs from the number of tables that contain it.
  kinds() {
    const { counts, hashes } = this, holders = new Int32Array(counts.length), found = new Uint8Array(counts.length);
    for (const table of this.tables.values()) for (const block of table) holders[block] += 1;
    for (let block = 0; block < found.length; block++) {
      const count = counts[block];
      if (count !== holders[block]) found[block] = holders[block] ? 5 : 4;
      else found[block] = count > 1 ? 3 : count === 1 ? 2 : +(hashes[block] !== null);
    }
    return found;
  }
}

class Run {
  constructor(text) {
    this.lines = text.trim().split("\n").map((line) => JSON.parse(line));
    const [head] = this.lines;
    Object.assign(this, { config: head.config, model: head.model, files: head.files });
    Object.assign(this, { requests: [], steps: [], vocab: {}, keyframes: [], atStep: new Map(), miscounted: null });
    const last = this.lines.at(-1);
    Object.assign(this, { metrics: last.metrics, ranks: last.ranks ?? {}, failure: last.failure });
    const state = new State(this.config.num_blocks), running = new Set(), highest = [];
    this.lines.forEach((line, number) => {
      Object.assign(this.vocab, line.vocab);
      for (const request of line.requests ?? []) this.enter(request, highest);
      if (line.reset) running.clear();
      if (line.plan !== undefined) this.plan(line, number, state, running, highest);
      if (line.result !== undefined) this.collect(line);
      state.apply(line);
      if (line.plan !== undefined && this.miscounted === null && state.kinds().some((kind) => kind > 3)) {
        this.miscounted = this.steps.length - 1; // the first step after which a reference count is wrong
      }
      for (const [k, reason] of Object.entries(line.ends ?? {})) {
        running.delete(+k);
        Object.assign(this.requests[k], { reason, ended: line.result === undefined ? this.steps.length : this.atStep.get(line.result).index });
      }
      if (line.result !== undefined) {
        const step = this.atStep.get(line.result);
        step.free = state.free;
        step.running = running.size;
        step.waiting = state.computed.size - running.size;
        step.stored = 0;
        for (const k of running) step.stored += state.computed.get(k);
      }
      if (number % KEYFRAME === 0) this.keyframes.push(state.copy());
    });
    this.isCalls = this.steps.some((step) => step.plan.call !== undefined);
    this.word = this.isCalls ? "call" : "step";
    this.cursor = null;
    this.sums = this.add();
    this.cells = this.draw();
  }

  enter(request, highest) {
    request.number = this.requests.length;
    if (request.parent !== null) request.prompt = this.requests[request.parent].prompt;
    Object.assign(request, { tokens: [], tokenSteps: [], pieces: [], cached: null, arrived: this.steps.length, first: null, preempted: [] });
    highest.push(0);
    this.requests.push(request);
  }

  plan(line, number, state, running, highest) {
    const index = this.steps.length;
    for (const [victim] of line.preempt ?? []) {
      running.delete(victim);
      this.requests[victim].preempted.push(index);
    }
    if (line.reset) for (const k of state.computed.keys()) state.computed.set(k, 0);
    line.run = line.run.map((each) => {
      const [k, n, spec = 0, from] = Array.isArray(each) ? each : [each, 1];
      const request = this.requests[k], start = from ?? state.computed.get(k) ?? 0;
      request.cached ??= start;
      request.first ??= index;
      const kind = start < highest[k] ? "recompute" : spec ? "verify" : start + n <= request.prompt.length ? "prefill" : "decode";
      const lacks = request.prompt.length + request.tokens.length + spec - start;
      highest[k] = Math.max(highest[k], start + n - spec);
      // Whether it waited until now: for the first time, or since it was preempted.
      const admitted = running.has(k) ? null : !request.preempted.length ? "first" : state.hosts.has(k) ? "host" : "again";
      running.add(k);
      return { k, start, n, spec, kind, lacks, admitted, drafts: line.drafts?.[k] ?? [], sampled: [], kept: 0 };
    });
    const swapped = new Set([...state.hosts.keys(), ...Object.keys(line.host ?? {}).map(Number)]);
    const step = { index, number: line.plan, plan: line, line: number, entries: line.run, result: null, busy: new Set(running), swapped };
    step.free = line.free;
    this.steps.push(step);
    this.atStep.set(line.plan, step);
  }

  collect(line) {
    const step = this.atStep.get(line.result);
    step.result = line;
    line.entries = step.entries;
    step.entries.forEach((entry, i) => {
      const out = line.out[i], request = this.requests[entry.k];
      entry.sampled = out === null ? [] : Array.isArray(out) ? out : [out];
      entry.kept = line.kept?.[entry.k] ?? entry.sampled.length;
      for (const token of entry.sampled.slice(0, entry.kept)) {
        request.tokens.push(token);
        request.tokenSteps.push(step.index);
      }
      const text = line.text?.[entry.k] ?? entry.sampled.map((token) => this.vocab[token]).join("");
      if (text) request.pieces.push([step.index, text]);
    });
  }

  // Sums over the steps up to and including each, so that the totals of any step are read directly.
  add() {
    const names = ["seconds", "computed", "output", "preemptions", "drafts", "accepted", "held", "stored", "collected", "finished", "prompt", "cached"];
    const sums = Object.fromEntries(names.map((name) => [name, new Float64Array(this.steps.length + 1)]));
    for (const request of this.requests) {
      if (request.reason === undefined) continue;
      const at = Math.min(request.ended, this.steps.length - 1) + 1;
      sums.finished[at] += 1;
      sums.prompt[at] += request.prompt.length;
      sums.cached[at] += request.cached ?? 0;
    }
    this.steps.forEach((step, i) => {
      if (step.result) {
        for (const { n, spec, sampled, kept } of step.entries) {
          sums.computed[i + 1] += n;
          sums.output[i + 1] += kept;
          sums.drafts[i + 1] += spec;
          sums.accepted[i + 1] += Math.min(kept, Math.max(0, sampled.length - 1));
        }
        sums.collected[i + 1] = 1;
        sums.seconds[i + 1] = step.result.seconds;
        sums.preemptions[i + 1] = step.plan.preempt?.length ?? 0;
        sums.held[i + 1] = this.config.num_blocks - step.free;
        sums.stored[i + 1] = step.stored;
      }
      for (const name of names) sums[name][i + 1] += sums[name][i];
    });
    return sums;
  }

  // The result of `engine.metrics()` after a step: the names are those of EngineMetrics.
  totals(index = this.steps.length - 1) {
    const at = (name) => this.sums[name][index + 1], { block_size: size, num_blocks: blocks } = this.config;
    return {
      num_steps: at("collected"), seconds: at("seconds"), num_computed_tokens: at("computed"), num_output_tokens: at("output"),
      num_prompt_tokens: at("prompt"), num_cached_tokens: at("cached"), num_preemptions: at("preemptions"),
      num_draft_tokens: at("drafts"), num_accepted_tokens: at("accepted"), num_finished: at("finished"),
      slots_held: at("held") * size, tokens_stored: at("stored"), num_slots: blocks * size,
    };
  }

  // The state of each request in each step, as an index into STATES, row by row.
  draw() {
    const width = this.steps.length, cells = new Uint8Array(width * this.requests.length);
    for (const step of this.steps) {
      for (const request of this.requests) {
        const alive = request.arrived <= step.index && !(request.ended < step.index);
        if (!alive) continue;
        const k = request.number;
        cells[k * width + step.index] = step.busy.has(k) ? STATE.idle : step.swapped.has(k) ? STATE.swapped : STATE.waiting;
      }
      for (const { k, kind } of step.entries) cells[k * width + step.index] = STATE[kind];
      for (const [victim] of step.plan.preempt ?? []) cells[victim * width + step.index] = STATE.preempted;
      step.numBusy = step.busy.size;
      delete step.busy;
    }
    return cells;
  }

  cell(k, index) { return STATES[this.cells[k * this.steps.length + index]]; }

  // The engine's state while a step is computed.
  state(index) {
    const target = this.steps[index].line;
    let { number, state } = this.cursor ?? { number: Infinity };
    const frame = Math.floor(target / KEYFRAME);
    if (number > target || target - number > KEYFRAME) [number, state] = [frame * KEYFRAME, this.keyframes[frame].copy()];
    while (number < target) state.apply(this.lines[++number]);
    this.cursor = { number, state };
    return state;
  }

  // The tokens whose keys and values a block holds, as far as they are computed; of a free block only if it is cached.
  blockTokens(state, block) {
    const k = state.holder[block], size = this.config.block_size;
    if (k < 0 || (state.counts[block] === 0 && state.hashes[block] === null)) return [];
    const request = this.requests[k], start = state.place[block] * size;
    const computed = state.hashes[block] !== null ? start + size : state.computed.get(k) ?? start;
    const found = [];
    for (let p = start; p < Math.min(computed, start + size, request.prompt.length + request.tokens.length); p++) {
      found.push(p < request.prompt.length ? request.prompt[p] : request.tokens[p - request.prompt.length]);
    }
    return found;
  }

  // The output of a request before a step; only the end of a long one.
  textBefore(k, index, longest = Infinity) {
    const { pieces } = this.requests[k];
    let low = 0, high = pieces.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (pieces[middle][0] < index) low = middle + 1;
      else high = middle;
    }
    let text = "";
    while (low > 0 && text.length < longest) text = pieces[--low][1] + text;
    return low > 0 ? `… ${text}` : text;
  }

  // A request's history as [state, first step, last step].
  history(k) {
    const found = [];
    for (let i = 0; i < this.steps.length; i++) {
      const state = this.cell(k, i);
      if (found.at(-1)?.[0] === state) found.at(-1)[2] = i;
      else found.push([state, i, i]);
    }
    return found.filter(([state]) => state);
  }

  piece(token) { return this.vocab[token] || `⟨${token}⟩`; }
}

// Why a request got as many tokens as it did.
function why(run, entry) {
  return (entry.admitted === "first" || !entry.admitted ? "" : "admitted again: ") + whyTokens(run, entry);
}

function whyTokens(run, entry) {
  const { k, kind, n, spec, start, lacks, admitted } = entry, { parent } = run.requests[k];
  if (n < lacks) {
    const limit = run.config.long_prefill_token_threshold;
    return n === limit ? `a chunk: at most ${limit} of one request; ${lacks - n} tokens are left`
      : `what the budget had left; ${lacks - n} tokens are left`;
  }
  if (kind === "prefill" && start === 0) return "its whole prompt";
  if (kind === "prefill" && admitted === "first") {
    return parent === null ? `the rest of its prompt; ${start} tokens were in the prefix cache`
      : `the last token of its prompt; ${run.requests[parent].id} has computed the others`;
  }
  if (kind === "prefill") return "the rest of its prompt";
  if (kind === "recompute") return "computed before its preemption";
  return kind === "verify" ? `its newest token and ${spec} draft token${spec === 1 ? "" : "s"}` : "its newest token";
}

// Which requests could have been preempted, and by which rule one was: the last of the policy's order.
const SORTED_BY = { fcfs: ["arrival"], priority: ["priority", "arrival"], fair: ["served to its tenant", "arrival"] };
function whichVictim(run, [victim, , , , candidates = []]) {
  const { scheduling_policy: policy } = run.config, names = SORTED_BY[policy] ?? [];
  const told = ([k, ...rank]) => {
    const sample = rank.at(-1), known = rank.length === names.length + 1;
    const parts = known ? [...names.map((name, i) => `${name} ${rank[i]}`), ...(sample ? [`sample ${sample}`] : [])] : rank;
    return `${run.requests[k].id} (${parts.join(", ")})`;
  };
  if (!candidates.length) return "";
  if (candidates.length < 2) return "No other request could be preempted: all that ran besides were in the step already.";
  const last = candidates.at(-1)[0], most = 6, shown = candidates.slice(-most).map(told).join(", ");
  const rule = victim === last ? "the last one is taken" : `the last one, ${run.requests[last].id}, should be taken`;
  return `Of those not yet in the step, in the order of the policy ${policy}, ${rule}: ${candidates.length > most ? "…, " : ""}${shown}.`;
}

// The waiting line once a step is scheduled; the first in line is the next to be admitted.
function waitingInWords(run, state, step, most = 12) {
  const { scheduling_policy: policy } = run.config;
  const told = (k) => {
    const { id, preempted, parent, priority, tenant } = run.requests[k];
    const facts = [state.hosts.has(k) ? "on the host" : preempted.some((each) => each <= step.index) ? "preempted" : parent === null ? "new" : `sample of ${run.requests[parent].id}`];
    if (policy === "priority") facts.push(`priority ${priority}`);
    if (policy === "fair") facts.push(`tenant ${tenant}`);
    return `${id} (${facts.join(", ")})`;
  };
  const { waiting } = state, more = waiting.length > most ? `, and ${waiting.length - most} more` : "";
  return waiting.length ? `Waiting after this step, in the order of the policy ${policy}: ${waiting.slice(0, most).map(told).join(", ")}${more}.` : "";
}

// Why no more waiting requests were admitted.
function whyWaiting(run, step) {
  const { max_num_batched_tokens: budget, max_num_seqs: most } = run.config;
  if (step.plan.preempt) return "None is admitted in a step with a preemption.";
  if (step.plan.refused) {
    const [k, blocks] = step.plan.refused;
    return `${run.requests[k].id} is first in line; it needs ${blocks} blocks, and too few are free.`;
  }
  const used = step.entries.reduce((sum, { n }) => sum + n, 0);
  if (used >= budget) return "The budget is spent.";
  return step.numBusy >= most ? `${most} requests run already.` : "They wait for the first sample of their prompt, or arrived later.";
}

// For each aspect, the first step in which two runs differ, and the difference. A check ends with the call that fails, so
// later calls of the other run do not count as a difference.
function partings(a, b) {
  const schedule = (run, step) => [
    ...step.entries.map((each) => `${run.requests[each.k].id} ${each.kind} ${each.start}–${each.start + each.n - 1}`),
    ...(step.plan.preempt ?? []).map(([victim, cause]) => `${run.requests[victim].id} preempted for ${run.requests[cause].id}`),
  ];
  const tokens = (run, step) => step.entries.filter(({ sampled }) => sampled.length)
    .map(({ k, sampled, kept }) => `${run.requests[k].id}: ${JSON.stringify(sampled.slice(0, kept).map((token) => run.piece(token)).join(""))}`);
  const blocks = (run, step) => [`${step.free} blocks free after it`];
  const call = (run, step) => [step.plan.call, ...step.plan.state];
  const found = [];
  const steps = a.isCalls ? Math.min(a.steps.length, b.steps.length) : Math.max(a.steps.length, b.steps.length);
  for (const [aspect, list] of a.isCalls ? [["call", call]] : [["schedule", schedule], ["blocks", blocks], ["tokens", tokens]]) {
    for (let i = 0; i < steps; i++) {
      const [one, two] = [a, b].map((run) => (run.steps[i] ? list(run, run.steps[i]) : ["the run has ended"]));
      if (one.join("|") === two.join("|")) continue;
      const only = (mine, others) => mine.filter((each) => !others.includes(each));
      const [here, there] = [only(one, two), only(two, one)];
      found.push({ aspect, index: i, here: here.length ? here : ["the same, in another order"], there });
      break;
    }
  }
  return found.sort((one, two) => one.index - two.index);
}

// For each request of both runs: steps until it was first scheduled, the step in which it ended, and its preemptions.
function byRequest(a, b) {
  const others = new Map(b.requests.map((request) => [request.id, request]));
  const facts = (run, { arrived, first, ended, preempted, tokens }) => ({
    waited: (first ?? run.steps.length) - arrived, ended: ended === undefined ? null : ended + 1, preempted: preempted.length, tokens: tokens.length,
  });
  const rows = a.requests.filter(({ id }) => others.has(id))
    .map((request) => ({ id: request.id, here: facts(a, request), there: facts(b, others.get(request.id)) }));
  const size = ({ here, there }) => Math.abs((here.ended ?? Infinity) - (there.ended ?? Infinity)) || 0;
  return rows.sort((one, two) => size(two) - size(one));
}
