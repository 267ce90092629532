// Figures over time: what the cache saved, memory, queue, latencies, and the reasons why reuse ended.
import { html, useEffect, useRef, useState } from "/ui/vendor/htm-preact.js";
import { json } from "/ui/server.js";
import { count, number, REASONS } from "/ui/text.js";

const KEPT = 600; // snapshots: five minutes at two a second
const REASONS_MS = 3000;
const HEIGHT = 180; // pixels of a chart
const ADVICE = {
  tier: ["wait for the copy, or raise --kv-cache-tokens", ""],
  evicted: ["raise --kv-cache-tokens, pin what matters", "pins"],
  diverged: ["move what changes behind what does not", "explain"],
  namespace: ["send the same cache_salt for what may be shared", "salts"],
  cold: ["warm the prompt before its first request", "warm"],
  disabled: ["leave no_cache out", ""],
};

// Rates between snapshots. Kept outside of the view, so that it goes on while another one is shown.
export class History {
  constructor() {
    this.rows = [];
    this.before = null;
  }

  add(snapshot) {
    const now = Date.now() / 1000;
    const found = snapshot.figures;
    if (!found) return;
    const then = this.before;
    this.before = { now, found };
    if (!then || found.steps < then.found.steps) return; // the first, or a server that started again
    const seconds = Math.max(0.05, now - then.now);
    const rate = (name) => (found[name] - then.found[name]) / seconds;
    const mean = (name) => {
      const [n, sum] = [0, 1].map((i) => found[name][i] - then.found[name][i]);
      return n > 0 ? (1000 * sum) / n : null;
    };
    this.rows.push({
      now,
      generated: rate("generated_tokens"), cached: rate("cached_tokens"), computed: rate("computed_tokens"),
      running: found.running, waiting: found.waiting,
      used: 1 - (found.pages_free + found.pages_cached) / found.pages_total, kept: found.pages_cached / found.pages_total,
      first: mean("first_token"), between: mean("inter_token"),
    });
    if (this.rows.length > KEPT) this.rows.shift();
  }
}

const CHARTS = [
  ["tokens a second", [["generated", "generated"], ["cached", "prompt, from the cache"], ["computed", "prompt, computed"]]],
  ["requests", [["running", "running"], ["waiting", "waiting"]]],
  ["share of the KV pool", [["used", "in use"], ["kept", "cached, evictable"]]],
  ["milliseconds", [["first", "to the first token"], ["between", "between tokens"]]],
];

export function Figures({ history, snapshot }) {
  const found = snapshot.figures;
  if (!found) return html`<p class="quiet">Sums over all tenants need the admin key. <${Reasons} /></p>`;
  const prompts = found.cached_tokens + found.computed_tokens;
  return html`
    <div class="tiles">
      <${Tile} title="prompt tokens saved" value=${number(found.cached_tokens)} note="of ${number(prompts)}" />
      <${Tile} title="hit rate, last minute" value="${(100 * found.hit_rate).toFixed(1)} %" note="of prompt tokens" />
      <${Tile} title="generated tokens" value=${number(found.generated_tokens)} note=${count(found.steps, "step")} />
      <${Tile} title="pages evicted" value=${number(found.evicted_pages)} note=${count(found.retractions, "retraction")} />
    </div>
    ${!history.rows.length && html`<p class="quiet">The charts begin with the next request that the server serves.</p>`}
    <div class="charts" hidden=${!history.rows.length}>${history.rows.length > 0 && CHARTS.map(([title, series]) => html`<${Chart} key=${title} title=${title} series=${series} rows=${history.rows} />`)}</div>
    <${Reasons} />`;
}

function Tile({ title, value, note }) {
  return html`<div class="card tile"><span class="quiet">${title}</span><strong>${value}</strong><span class="quiet">${note}</span></div>`;
}

function Chart({ title, series, rows }) {
  const place = useRef(null);
  const plot = useRef(null);
  const data = [rows.map((row) => row.now), ...series.map(([name]) => rows.map((row) => row[name]))];
  useEffect(() => {
    const color = (i) => getComputedStyle(document.documentElement).getPropertyValue(`--line${i}`);
    const ink = color("");
    const axis = { stroke: ink, grid: { stroke: color("grid") } };
    plot.current = new window.uPlot(
      { width: place.current.clientWidth, height: HEIGHT, title, cursor: { y: false }, axes: [axis, { ...axis, size: 60 }],
        series: [{}, ...series.map(([, name], i) => ({ label: name, stroke: color(i), width: 1.5, spanGaps: true }))] },
      data, place.current);
    const resized = new ResizeObserver(() => plot.current.setSize({ width: place.current.clientWidth, height: HEIGHT }));
    resized.observe(place.current);
    return () => (resized.disconnect(), plot.current.destroy());
  }, []);
  useEffect(() => plot.current && plot.current.setData(data), [rows[rows.length - 1]]);
  return html`<div class="card chart"><div ref=${place}></div></div>`;
}

function Reasons() {
  const [found, setFound] = useState(null);
  useEffect(() => {
    const ask = () => json("/cache/stats").then((all) => setFound((all.everybody || all).reasons), () => {});
    ask();
    const timer = setInterval(ask, REASONS_MS);
    return () => clearInterval(timer);
  }, []);
  if (!found || !Object.keys(found).length) return "";
  return html`<table>
    <caption>Where reuse ended</caption>
    <thead><tr><th>reason</th><th>requests</th><th>tokens computed</th><th>meaning</th><th>what helps</th></tr></thead>
    <tbody>${Object.entries(found).map(([reason, sums]) => html`<tr key=${reason}>
      <td>${reason}</td><td>${number(sums.requests)}</td><td>${number(sums.computed_tokens)}</td>
      <td>${REASONS[reason] || ""}</td><td>${(ADVICE[reason] || [""])[0]}</td></tr>`)}</tbody>
  </table>`;
}
