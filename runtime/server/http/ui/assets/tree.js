// The tree as an icicle: one row a depth, width by tokens, colour by last use. Requests are marked on their path.
import { html, useMemo, useState } from "/ui/vendor/htm-preact.js";

const ROW = 26; // pixels
const WIDTH = 100; // per cent of the window
const NARROW = 0.08; // per cent below which a node is too narrow to be drawn
const LABEL = 3; // per cent from which on a node has a label

export const REASONS = {
  hit: "everything that could be reused was",
  evicted: "what follows was evicted to make room: a larger pool, or a pin, would keep it",
  diverged: "the prompt differs from what is cached inside a page",
  namespace: "the same text is cached under another cache_salt",
  cold: "nobody has sent what follows",
  disabled: "the request asked not to use the cache",
};

export function TreeView({ snapshot }) {
  const [chosen, choose] = useState(null);
  const [focus, setFocus] = useState(null);
  const { tree, requests } = snapshot;
  const uses = useMemo(() => usesOf(requests), [requests]);
  const drawn = useMemo(() => layout(tree, focus), [tree, focus]);
  const newest = useMemo(() => Math.max(1, ...drawn.nodes.map((each) => each.data.last_access || 0)), [drawn]);
  const selected = chosen && drawn.byId.get(chosen);
  const totals = tree.totals;
  return html`
    <p class="quiet">
      ${totals.nodes === undefined
        ? `${count(drawn.nodes.length - 1, "node")} of yours`
        : `${count(totals.cached * totals.page_size, "token")} cached in ${count(totals.nodes, "node")}; ` +
          `${number(totals.evicted)} pages evicted; ${number(totals.free)} of ${number(totals.pages)} pages free`};${" "}
      ${count(requests.filter((each) => each.state === "running").length, "request")} running,
      ${" "}${number(requests.filter((each) => each.state === "waiting").length)} waiting
      ${focus && html`<button onClick=${() => setFocus(null)}>show all</button>`}
    </p>
    <div class="icicle" role="tree" aria-label="cached prefixes" style=${{ height: `${drawn.depth * ROW}px` }}>
      ${drawn.nodes.map((node) => html`<${Cell} key=${node.data.id} node=${node} uses=${uses.get(node.data.id)}
        heat=${(node.data.last_access || 0) / newest} chosen=${chosen === node.data.id} choose=${choose} />`)}
    </div>
    <p class="legend quiet">width: tokens · colour: last use · <i class="running"></i> used by a running request ·
      <i class="held"></i> held · <i class="free"></i> evictable · <i class="below"></i> only in host memory or on disk</p>
    ${selected && html`<${Details} node=${selected} uses=${uses.get(chosen) || []} focus=${() => setFocus(chosen)} />`}
    <${Requests} requests=${requests} omitted=${snapshot.requests_omitted} choose=${choose} />`;
}

function Cell({ node, uses, heat, chosen, choose }) {
  const { data } = node;
  const width = node.x1 - node.x0;
  if (width < NARROW) return null;
  const state = uses ? "running" : data.leases ? "held" : data.pages === 0 && !data.root ? "below" : "free";
  const place = { left: `${node.x0}%`, width: `${width}%`, top: `${node.depth * ROW}px`, "--heat": heat.toFixed(2) };
  return html`<button class="cell ${state} ${chosen ? "chosen" : ""}" role="treeitem" style=${place} title=${label(data)}
    aria-label="${label(data)}, ${count(data.tokens, "token")}" aria-selected=${chosen} onClick=${() => choose(data.id)}>
    ${width > LABEL ? label(data) : ""}</button>`;
}

function Details({ node, uses, focus }) {
  const { data } = node;
  const path = [];
  for (let at = node; at && !at.data.root; at = at.parent) path.unshift(at.data.text);
  const holders = data.leases - uses.length;
  return html`<aside class="card">
    <h2>${count(data.tokens, "token")}, ${count(data.hits, "hit")} ${data.stub ? "· a partial page" : ""}</h2>
    <dl>
      <dt>begins with</dt><dd><code>${data.text}</code></dd>
      <dt>path</dt><dd><code>${path.join(" … ")}</code></dd>
      <dt>pages</dt><dd>${number(data.pages)} on the device, ${number(data.host)} in host memory, ${number(data.disk)} on disk</dd>
      <dt>held by</dt><dd>${count(uses.length, "request")}${holders > 0 ? ` and ${number(holders)} branches, pins or requests further on` : ""}
        ${data.leases ? "" : ": evictable"}</dd>
      ${data.omitted ? html`<dt>below</dt><dd>${count(data.omitted, "more branch")} not shown</dd>` : ""}
    </dl>
    ${uses.map((each) => html`<p>request ${each.id}: ${count(each.hit_tokens, "token")} reused, then ${REASONS[each.reason] || each.reason}</p>`)}
    <button onClick=${focus}>show only what is below</button>
  </aside>`;
}

function Requests({ requests, omitted, choose }) {
  if (!requests.length) return html`<p class="quiet">no requests at the moment</p>`;
  return html`<table class="requests">
    <thead><tr><th>request</th><th>state</th><th>prompt</th><th>reused</th><th>progress</th><th>why reuse ended</th></tr></thead>
    <tbody>${requests.slice(0, 100).map((each) => html`<tr key=${each.id} tabindex="0" onClick=${() => choose(each.path[0])}>
      <td>${each.id}</td><td>${each.state}</td><td>${number(each.prompt_tokens)}</td><td>${number(each.hit_tokens)}</td>
      <td><progress max=${each.limit} value=${each.computed}></progress> ${number(each.computed)} of ${number(each.limit)}</td>
      <td>${REASONS[each.reason] || each.reason}</td></tr>`)}</tbody>
  </table>
  ${requests.length > 100 || omitted ? html`<p class="quiet">${number(requests.length - 100 + omitted)} more</p>` : ""}`;
}

function usesOf(requests) {
  const uses = new Map();
  for (const request of requests)
    for (const id of request.path) uses.set(id, [...(uses.get(id) || []), request]);
  return uses;
}

function layout(tree, focus) {
  const spaces = tree.namespaces.map((each, index) => ({
    ...each, id: `namespace ${index}`, root: true, tokens: 0, hits: 0, pages: 0, host: 0, disk: 0, text: title(each),
  }));
  let data = { id: "all", root: true, tokens: 0, hits: 0, pages: 0, host: 0, disk: 0, leases: 0, text: "everything cached", children: spaces };
  data = (focus !== null && find(data, focus)) || data;
  const root = window.d3.hierarchy(data).sum((each) => each.tokens || 0);
  window.d3.partition().size([WIDTH, root.height + 1])(root);
  const nodes = root.descendants();
  return { nodes, depth: root.height + 1, byId: new Map(nodes.map((each) => [each.data.id, each])) };
}

function find(data, id) {
  const stack = [data];
  while (stack.length) {
    const each = stack.pop();
    if (each.id === id) return each;
    stack.push(...(each.children || []));
  }
  return null;
}

function title({ owner, salt }) {
  const parts = [owner && `key ${owner.slice(0, 8)}`, salt && `salt ${salt.slice(0, 8)}`].filter(Boolean);
  return parts.join(", ") || "requests without key and salt";
}

function label(data) {
  return data.root ? data.text : data.text.replace(/\s+/g, " ");
}

export function number(value) {
  return (value || 0).toLocaleString("en-US");
}

export function count(value, noun) {
  const many = noun.endsWith("ch") ? `${noun}es` : `${noun}s`;
  return `${number(value)} ${value === 1 ? noun : many}`;
}
