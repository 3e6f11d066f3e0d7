// The live panel: reads /metrics once a second, in the text format of Prometheus, under vLLM's names.

import { ask } from "./stream.js";

const NAMES = {
  running: "vllm:num_requests_running",
  waiting: "vllm:num_requests_waiting",
  pool: "vllm:kv_cache_usage_perc",
  generated: "vllm:generation_tokens_total",
  queries: "vllm:prefix_cache_queries_total",
  hits: "vllm:prefix_cache_hits_total",
  drafted: "vllm:spec_decode_num_draft_tokens_total",
  accepted: "vllm:spec_decode_num_accepted_tokens_total",
};

// Returns the sum over all engines and labels of each metric, by its name; of a share, the mean.
export function parse(text) {
  const values = {};
  for (const line of text.split("\n")) {
    const match = /^([\w:]+)(?:\{.*\})? (\S+)/.exec(line);
    if (match) (values[match[1]] ??= []).push(Number(match[2]));
  }
  const total = (name, found) => found.reduce((sum, each) => sum + each) / (name.endsWith("_perc") ? found.length : 1);
  return Object.fromEntries(Object.entries(values).map(([name, found]) => [name, total(name, found)]));
}

export class LivePanel {
  // onTrouble(error) is called after each reading, with null if it succeeded.
  constructor(element, getKey, onTrouble) {
    Object.assign(this, { element, getKey, onTrouble, rates: [], previous: null });
    this.tick();
  }

  async tick() {
    if (!document.hidden) await this.read();
    setTimeout(() => this.tick(), 1000);
  }

  async read() {
    try {
      this.show(parse(await (await ask("metrics", { key: this.getKey() })).text()));
      await this.onTrouble(null);
    } catch (error) {
      this.previous = null;
      this.element.querySelectorAll("dd").forEach((each) => { each.textContent = "–"; });
      await this.onTrouble(error);
    }
  }

  show(sums) {
    const now = Object.fromEntries(Object.entries(NAMES).map(([short, name]) => [short, sums[name]]));
    now.time = performance.now() / 1000;
    const seconds = this.previous && now.time - this.previous.time;
    const rate = seconds ? Math.max(0, (now.generated - this.previous.generated) / seconds) : NaN;
    this.previous = now;
    this.write("running", number(now.running));
    this.write("waiting", number(now.waiting));
    this.write("rate", number(rate, 1));
    this.write("pool", percent(now.pool));
    this.write("hits", percent(now.hits / now.queries));
    this.write("accepted", percent(now.accepted / now.drafted));
    this.element.querySelector("meter").value = now.pool || 0;
    this.rates = [...this.rates, rate || 0].slice(-60);
    const top = Math.max(1, ...this.rates);
    const points = this.rates.map((each, index) => `${60 - this.rates.length + index},${15 - (14 * each) / top}`);
    this.element.querySelector("polyline").setAttribute("points", points.join(" "));
  }

  write(metric, text) {
    this.element.querySelector(`[data-metric=${metric}] dd`).textContent = text;
  }
}

function number(value, digits = 0) {
  return Number.isFinite(value) ? value.toFixed(digits) : "–";
}

function percent(share) {
  return Number.isFinite(share) ? `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%` : "–";
}
