// One node in full, asked for when it is chosen: its text, who holds it, and why requests stopped in it.
import { html, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { json } from "/ui/server.js";
import { count, number, REASONS } from "/ui/text.js";

const REFRESH_MS = 2000;

export function Details({ place, snapshot, focus }) {
  const { data, space, path } = place;
  const [state, setState] = useState({});
  useEffect(() => {
    const stop = new AbortController();
    const ask = () =>
      json("/ui/node", { owner: space.owner, salt: space.salt, path }, stop.signal).then(
        (found) => setState({ found }),
        (error) => stop.signal.aborted || setState((now) => ({ ...now, error: error.message })),
      );
    ask();
    const timer = setInterval(ask, REFRESH_MS);
    return () => (clearInterval(timer), stop.abort());
  }, [path.join()]);
  const { found, error } = state;
  return html`<aside class="card">
    <h2>${count(data.tokens, "token")}, ${count(data.hits, "hit")} ${data.stub ? "· a partial page" : ""}</h2>
    ${error && html`<p class="error">${error}</p>`}
    ${found && html`<${Facts} found=${found} omitted=${data.omitted} />`}
    <button onClick=${focus}>show only what is below</button>
  </aside>`;
}

function Facts({ found, omitted }) {
  const holders = [
    found.requests.length && count(found.requests.length, "request") + ` (${found.requests.slice(0, 8).join(", ")})`,
    found.pins && count(found.pins, "pin"),
    found.branches && count(found.branches, "branch"),
  ].filter(Boolean);
  return html`<dl>
      <dt>tokens</dt><dd>${number(found.start)} to ${number(found.end)} of a prompt</dd>
      <dt>text</dt><dd><pre class="full">${found.head}${found.between ? html`<em class="quiet"> … ${count(found.between, "token")} left out … </em>` : ""}${found.tail}</pre></dd>
      <dt>pages</dt><dd>${number(found.pages)} on the device, ${number(found.host)} in host memory, ${number(found.disk)} on disk</dd>
      <dt>held by</dt><dd>${holders.length ? holders.join(", ") : found.locks ? "a lock" : "nobody: evictable"}</dd>
      ${omitted ? html`<dt>below</dt><dd>${count(omitted, "more branch")} not shown</dd>` : ""}
    </dl>
    <h3>Why requests stopped here</h3>
    ${found.stops.length
      ? html`<table class="stops"><thead><tr><th>request</th><th>reused</th><th>why</th><th>went on with</th><th>cached instead</th></tr></thead>
        <tbody>${found.stops.map((each) => html`<tr key=${each.request}><td>${each.request}</td><td>${count(each.position, "token")}</td>
          <td>${each.reason}: ${REASONS[each.reason]}</td><td><code>${each.after}</code></td><td><code>${each.instead}</code></td></tr>`)}</tbody></table>`
      : html`<p class="quiet">none of the last 512 requests</p>`}`;
}
