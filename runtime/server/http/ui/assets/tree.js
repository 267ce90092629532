// The tree as an icicle: one row a depth, width by tokens, colour by last use. Requests are marked on their path with
// their progress, and what is evicted fades out where it was.
import { html, useEffect, useMemo, useRef, useState } from "/ui/vendor/htm-preact.js";
import { Details } from "/ui/node.js";
import { count, number, REASONS } from "/ui/text.js";

const ROW = 26; // pixels
const WIDTH = 100; // per cent of the window
const NARROW = 0.3; // per cent below which neighbours are drawn as one strip
const LISTED = 100; // nodes of a strip that a click lists
const LABEL = 3; // per cent from which on a node has a label
const REST = 0.1; // share of a node's width that stands for the children that the server left out
const FADE_MS = 2500; // as long as style.css lets an evicted node fade

export function TreeView({ snapshot }) {
  const [chosen, choose] = useState(null);
  const [focus, setFocus] = useState(null);
  const [opened, open] = useState(null); // key of a strip
  const { tree, requests } = snapshot;
  const uses = useMemo(() => usesOf(requests), [requests]);
  const index = useMemo(() => indexOf(tree), [tree]);
  const drawn = useMemo(() => layout(tree, focus && index.has(focus) ? index.get(focus).data : null), [tree, focus]);
  const evicted = useEvictions(tree, index, drawn);
  const newest = useMemo(() => Math.max(1, ...drawn.nodes.map((each) => each.data.last_access || 0)), [drawn]);
  const totals = tree.totals;
  return html`
    <p class="quiet">
      ${totals.nodes === undefined
        ? `${count(index.size, "node")} of yours`
        : `${count(totals.cached * totals.page_size, "token")} cached in ${count(totals.nodes, "node")}; ` +
          `${number(totals.evicted)} pages evicted; ${number(totals.free)} of ${number(totals.pages)} pages free`};${" "}
      ${count(requests.filter((each) => each.state === "running").length, "request")} running,
      ${" "}${number(requests.filter((each) => each.state === "waiting").length)} waiting
      ${tree.namespaces.length === 0 && " Nothing is cached yet: send a request, or write in the chat."}
      ${focus && html`<button onClick=${() => setFocus(null)}>show all</button>`}
    </p>
    <div class="icicle" role="tree" aria-label="cached prefixes: arrow keys move, Enter shows a node, Escape closes it"
      onKeyDown=${(event) => (event.key === "Escape" ? choose(null) : moveFocus(event))} style=${{ height: `${drawn.depth * ROW}px` }}>
      ${drawn.nodes.map((node) => html`<${Cell} key=${node.data.id} node=${node} uses=${uses.get(node.data.id)}
        heat=${(node.data.last_access || 0) / newest} chosen=${chosen === node.data.id} choose=${(id) => choose(id === chosen ? null : id)} />`)}
      ${drawn.strips.map((strip) => html`<button key=${strip.key} class="cell strip ${opened === strip.key ? "chosen" : ""}" style=${place(strip)}
        title=${sizeOf(strip)} tabindex="-1" onClick=${() => open(opened === strip.key ? null : strip.key)}>${strip.x1 - strip.x0 > LABEL ? sizeOf(strip) : ""}</button>`)}
      ${evicted.filter((each) => each.x1 > each.x0).map((each) => html`<div key=${each.key} class="cell evicted" style=${place(each)}>${each.text}</div>`)}
    </div>
    <p class="legend quiet"><span>width: tokens</span><span><i class="heat"></i>last use: longer ago to now</span>
      <span><i class="running"></i>used by a running request</span><span><i class="held"></i>held</span>
      <span><i class="below"></i>only in host memory or on disk</span><span><i class="gone"></i>just evicted</span></p>
    ${evicted.length > 0 && html`<p class="quiet" role="log">evicted: ${evicted.slice(0, 5).map((each) => `${each.text.slice(0, 40)} (${count(each.tokens, "token")})`).join(" · ")}</p>`}
    ${drawn.strips.filter((strip) => strip.key === opened).map((strip) => html`<${Strip} key=${opened} strip=${strip} choose=${choose} />`)}
    ${chosen !== null && index.has(chosen) && html`<${Details} key=${chosen} place=${index.get(chosen)} snapshot=${snapshot} focus=${() => setFocus(chosen)} />`}
    <${Requests} requests=${requests} omitted=${snapshot.requests_omitted} choose=${choose} />`;
}

function place({ x0, x1, depth }) {
  return { left: `${x0}%`, width: `${x1 - x0}%`, top: `${depth * ROW}px` };
}

function Cell({ node, uses, heat, chosen, choose }) {
  const { data } = node;
  const width = node.x1 - node.x0;
  if (data.rest) return html`<div class="cell strip" style=${place(node)} title="${data.text}: not shown, and not to scale">${width > LABEL ? data.text : ""}</div>`;
  const state = uses ? "running" : data.leases ? "held" : data.pages === 0 && !data.root ? "below" : "free";
  const ends = (uses || []).filter((each) => each.path[0] === data.id && each.state === "running");
  const done = ends.length ? Math.max(...ends.map((each) => Math.min(1, each.computed / Math.max(1, each.prompt_tokens)))) : null;
  return html`<button class="cell ${state} ${chosen ? "chosen" : ""}" role="treeitem" style=${{ ...place(node), "--heat": heat.toFixed(2) }} title=${label(data)}
    aria-label="${label(data)}, ${count(data.tokens, "token")}" aria-selected=${chosen} tabindex=${node.depth ? -1 : 0} onClick=${() => !data.root && choose(data.id)}>
    ${width > LABEL ? label(data) : ""}${done !== null && html`<i class="done" style=${{ width: `${100 * done}%` }} title="prompt computed: ${Math.round(100 * done)} %"></i>`}</button>`;
}

// Moves the focus from a node to the nearest one in the direction of an arrow key.
function moveFocus(event) {
  const direction = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] }[event.key];
  if (!direction) return;
  event.preventDefault();
  const from = event.target.getBoundingClientRect();
  const found = [...event.currentTarget.querySelectorAll("button.cell")]
    .map((cell) => [cell, cell.getBoundingClientRect()])
    .filter(([, to]) => Math.sign(to.top - from.top) === direction[1] && Math.abs(to.top - from.top) < 1.5 * ROW)
    .filter(([, to]) => (direction[0] ? Math.sign(to.left - from.left) === direction[0] : to.right > from.left && to.left < from.right))
    .sort(([, a], [, b]) => Math.abs(a.left - from.left) - Math.abs(b.left - from.left));
  if (found.length) found[0][0].focus();
}

// The nodes of a strip, the largest first.
function Strip({ strip, choose }) {
  const nodes = [...strip.nodes].sort((a, b) => b.tokens - a.tokens || b.hits - a.hits).slice(0, LISTED);
  return html`<div class="card"><h2>${sizeOf(strip)}${strip.nodes.length > LISTED ? `; the largest ${LISTED}` : ""}</h2>
    <div class="listed">${nodes.map((each) => html`<button key=${each.id} onClick=${() => choose(each.id)}>${label(each)} <span class="quiet">${count(each.tokens, "token")}</span></button>`)}</div></div>`;
}

function sizeOf(strip) {
  return `${count(strip.nodes.length, "small node")}, ${count(strip.nodes.reduce((sum, each) => sum + each.tokens, 0), "token")}`;
}

function Requests({ requests, omitted, choose }) {
  if (!requests.length) return html`<p class="quiet">no requests at the moment</p>`;
  return html`<div class="requests"><table>
    <thead><tr><th>request</th><th>state</th><th>prompt</th><th>reused</th><th>prompt computed</th><th>generated</th><th>why reuse ended</th></tr></thead>
    <tbody>${requests.slice(0, 100).map((each) => html`<tr key=${each.id}>
      <td>${each.path.length ? html`<button title="show its node" onClick=${() => choose(each.path[0])}>${each.id}</button>` : each.id}</td><td>${each.state}</td><td>${number(each.prompt_tokens)}</td><td>${number(each.hit_tokens)}</td>
      <td><progress max=${each.prompt_tokens} value=${Math.min(each.computed, each.prompt_tokens)}></progress> ${number(Math.min(each.computed, each.prompt_tokens))}</td>
      <td>${number(each.tokens - each.prompt_tokens)} of ${number(each.limit - each.prompt_tokens)}</td>
      <td>${REASONS[each.reason] || each.reason}</td></tr>`)}</tbody>
  </table></div>
  ${requests.length > 100 || omitted ? html`<p class="quiet">${number(Math.max(0, requests.length - 100) + omitted)} more</p>` : ""}`;
}

// The nodes that the newest snapshots have lost, for as long as they fade. A node that grew has another id and the same
// beginning: it is not among them.
function useEvictions(tree, index, drawn) {
  const before = useRef({ index, drawn });
  const [gone, setGone] = useState([]);
  useEffect(() => {
    const last = before.current;
    before.current = { index, drawn };
    const now = Date.now();
    const lost = last.index === index ? [] : lostNodes(last.index, index);
    const cells = lost.map(({ data }) => {
      const cell = last.drawn.byId.get(data.id);
      return { key: `gone ${data.id}`, at: now, text: label(data), tokens: data.tokens, x0: cell ? cell.x0 : 0, x1: cell ? cell.x1 : 0, depth: cell ? cell.depth : 0 };
    });
    if (cells.length || gone.length) setGone([...cells, ...gone.filter((each) => now - each.at < FADE_MS)].slice(0, 200));
  }, [tree]);
  useEffect(() => {
    if (!gone.length) return;
    const timer = setTimeout(() => setGone((all) => all.filter((each) => Date.now() - each.at < FADE_MS)), FADE_MS);
    return () => clearTimeout(timer);
  }, [gone]);
  return gone;
}

function lostNodes(old, now) {
  const beginnings = new Set([...now.values()].map(({ data }) => data.text.slice(0, 24)));
  return [...old.values()].filter(({ data }) => {
    const still = now.get(data.id);
    if (still) return data.pages > 0 && still.data.pages === 0; // moved to a lower tier
    return data.pages > 0 && !beginnings.has(data.text.slice(0, 24));
  });
}

function usesOf(requests) {
  const uses = new Map();
  for (const request of requests)
    for (const id of request.path) uses.set(id, [...(uses.get(id) || []), request]);
  return uses;
}

// Every node by id, with its namespace and the ids on the way to it.
function indexOf(tree) {
  const found = new Map();
  for (const space of tree.namespaces) {
    const stack = space.children.map((data) => ({ data, space, path: [data.id] }));
    while (stack.length) {
      const each = stack.pop();
      found.set(each.data.id, each);
      for (const data of each.data.children) stack.push({ data, space, path: [...each.path, data.id] });
    }
  }
  return found;
}

function layout(tree, focus) {
  const spaces = tree.namespaces.map((each, index) => ({
    ...each, id: `namespace ${index}`, root: true, tokens: 0, hits: 0, pages: 0, host: 0, disk: 0, text: title(each),
  }));
  const all = { id: "all", root: true, tokens: 0, hits: 0, pages: 0, host: 0, disk: 0, leases: 0, text: "everything cached", children: spaces, omitted: tree.omitted };
  const root = window.d3.hierarchy(focus || all, childrenOf);
  root.eachAfter((node) => {
    const below = (node.children || []).filter((each) => !each.data.rest).reduce((sum, each) => sum + each.value, 0);
    const rest = (node.children || []).find((each) => each.data.rest);
    if (rest) rest.value = Math.max(1, below * REST);
    node.value = node.data.rest ? 0 : (node.data.tokens || 0) + below + (rest ? rest.value : 0);
  });
  window.d3.partition().size([WIDTH, root.height + 1])(root);
  const nodes = [];
  const strips = [];
  root.each((node) => {
    if (node.x1 - node.x0 >= NARROW) return nodes.push(node);
    const last = strips[strips.length - 1];
    if (last && last.depth === node.depth && Math.abs(last.x1 - node.x0) < 1e-6) {
      last.x1 = node.x1;
      last.nodes.push(node.data);
    } else strips.push({ key: `strip ${node.data.id}`, depth: node.depth, x0: node.x0, x1: node.x1, nodes: [node.data] });
    return undefined;
  });
  return { nodes, strips, depth: root.height + 1, byId: new Map(nodes.map((each) => [each.data.id, each])) };
}

function childrenOf(data) {
  if (!data.omitted) return data.children;
  return [...data.children, { id: `rest of ${data.id}`, rest: true, tokens: 0, text: `+ ${number(data.omitted)} more` }];
}

function title({ owner, salt }) {
  const parts = [owner && `key ${owner.slice(0, 8)}`, salt && `salt ${salt.slice(0, 8)}`].filter(Boolean);
  return parts.join(", ") || "requests without a key or a salt";
}

function label(data) {
  return data.root ? data.text : data.text.replace(/\s+/g, " ");
}
