// A conversation with the served model in which every message can be continued in several ways.
import { html, useEffect, useRef, useState } from "/ui/vendor/htm-preact.js";
import { append, asCurl, asProgram, children, empty, path, turns, update } from "/ui/conversation.js";
import { events } from "/ui/server.js";
import { isJson, number, pretty } from "/ui/text.js";

const SETTINGS = { n: 1, temperature: 0.7, max_tokens: 256, system: "", tools: "", schema: "" };
const TOOL = `[{"type": "function", "function": {"name": "get_weather", "description": "Get the weather.",
  "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}]`;

export function Chat({ model }) {
  const [state, setState] = useState(empty);
  const [tip, setTip] = useState(null); // the message after which the next one is added
  const [settings, setSettings] = useState(SETTINGS);
  const [exported, setExported] = useState("");
  const running = useRef(new Map()); // message id -> AbortController
  const latest = useRef(state);
  latest.current = state;
  const change = (next) => setState((latest.current = next));

  useEffect(() => () => running.current.forEach((each) => each.abort()), []);

  const body = (messages) => ({
    model, messages: [...(settings.system ? [{ role: "system", content: settings.system }] : []), ...turns(messages)],
    max_tokens: settings.max_tokens, temperature: settings.temperature,
    ...(settings.tools.trim() ? { tools: JSON.parse(settings.tools) } : {}),
    ...(settings.schema.trim() ? { response_format: { type: "json_schema", json_schema: { name: "answer", schema: JSON.parse(settings.schema) } } } : {}),
  });

  async function answer(parent) {
    const [state, id] = append(latest.current, parent, { role: "assistant", content: "", note: "", busy: true });
    change(state);
    const stop = new AbortController();
    running.current.set(id, stop);
    let text = "";
    let thought = "";
    let calls = [];
    let began = performance.now();
    let first = null;
    let tokens = 0;
    try {
      const asked = { ...body(path(latest.current, parent)), stream: true, stream_options: { include_usage: true } };
      for await (const event of events("/v1/chat/completions", asked, stop.signal)) {
        for (const choice of event.choices) {
          first ??= performance.now();
          text += choice.delta.content || "";
          thought += choice.delta.reasoning_content || "";
          calls = addCalls(calls, choice.delta.tool_calls || []);
        }
        const usage = event.usage;
        if (usage) tokens = usage.completion_tokens;
        const cached = usage && (usage.prompt_tokens_details || {}).cached_tokens;
        const seconds = (performance.now() - (first ?? began)) / 1000;
        const note = usage
          ? `${number(cached)} of ${number(usage.prompt_tokens)} prompt tokens cached, ${number(usage.prompt_tokens - cached)} computed; ` +
            `${number(tokens)} generated, ${(tokens / Math.max(seconds, 0.001)).toFixed(0)} a second`
          : "";
        change(update(latest.current, id, { content: text, thought, calls, note }));
      }
      change(update(latest.current, id, { busy: false }));
    } catch (error) {
      const note = stop.signal.aborted ? "stopped" : `error: ${error.message}`;
      change(update(latest.current, id, { busy: false, note, failed: !stop.signal.aborted }));
    } finally {
      running.current.delete(id);
    }
    return id;
  }

  async function draw(parent) {
    const drawn = await Promise.all(Array.from({ length: settings.n }, () => answer(parent)));
    if (drawn.length === 1) setTip(drawn[0]);
  }

  function say(content, after) {
    const [next, id] = append(latest.current, after, { role: "user", content });
    change(next);
    setTip(id);
    return draw(id);
  }

  // The result of a tool, after the message that called it. The model goes on when every call of it has a result.
  function result(message, call, content) {
    let parent = message.id;
    for (const each of path(latest.current, tip)) if (each.role === "tool" && each.parent === parent) parent = each.id;
    const [next, id] = append(latest.current, parent, { role: "tool", content, call_id: call.id, name: call.name });
    change(next);
    setTip(id);
    const given = path(next, id).filter((each) => each.role === "tool").map((each) => each.call_id);
    return message.calls.every((each) => given.includes(each.id)) ? draw(id) : undefined;
  }

  const send = (event) => {
    event.preventDefault();
    const box = event.target.elements.text;
    const content = box.value.trim();
    if (!content) return;
    box.value = "";
    say(content, tip);
  };
  const act = { draw, setTip, result, stop: (id) => running.current.get(id)?.abort(), edit: (message, content) => say(content, message.parent) };
  const shown = path(state, tip);
  return html`
    <details class="settings"><summary>settings</summary>
      <label>continuations <input type="number" min="1" max="16" value=${settings.n} onInput=${set("n", Number)} /></label>
      <label>temperature <input type="number" min="0" max="2" step="0.1" value=${settings.temperature} onInput=${set("temperature", Number)} /></label>
      <label>max tokens <input type="number" min="1" value=${settings.max_tokens} onInput=${set("max_tokens", Number)} /></label>
      <label class="wide">system <input value=${settings.system} onInput=${set("system", String)} /></label>
      <label class="wide">tools (JSON) <textarea rows="2" placeholder=${TOOL} value=${settings.tools} onInput=${set("tools", String)}></textarea></label>
      <label class="wide">answer's JSON schema <textarea rows="2" value=${settings.schema} onInput=${set("schema", String)}></textarea></label>
      ${["tools", "schema"].filter((name) => settings[name].trim() && !isJson(settings[name])).map((name) => html`<p class="error">${name}: not JSON</p>`)}
      <button onClick=${() => set("tools", String)({ target: { value: TOOL } })}>example tool</button>
      <button onClick=${() => setExported(asProgram(state, location.origin, settings))}>as a program</button>
      <button onClick=${() => setExported(asCurl(location.origin, body(shown.filter((each) => !each.busy))))}>as curl</button>
      <button onClick=${() => { change(empty()); setTip(null); }}>new conversation</button>
    </details>
    ${!shown.length && html`<p class="quiet">Every message can be branched: several answers side by side, each with how much of its prompt was cached.</p>`}
    <div>${exported ? html`<pre class="card export">${exported}</pre>` : null}</div>
    <ol class="messages">
      ${shown.map((message) => html`<${Message} key=${message.id} message=${message} state=${state} act=${act} />`)}
    </ol>
    <div class="side">${children(state, tip).map((message) => html`<${Continuation} key=${message.id} message=${message} act=${act} />`)}</div>
    <form class="say" onSubmit=${send}>
      <textarea name="text" rows="2" aria-label="message" placeholder="Message: Enter sends, Shift+Enter is a new line"
        onKeyDown=${(event) => event.key === "Enter" && !event.shiftKey && (event.preventDefault(), event.target.form.requestSubmit())}></textarea>
      <button>Send</button>
    </form>`;

  function set(name, kind) {
    return (event) => setSettings((now) => ({ ...now, [name]: kind(event.target.value) }));
  }
}

function Message({ message, state, act }) {
  const [editing, setEditing] = useState(false);
  const siblings = children(state, message.parent);
  const save = (event) => {
    event.preventDefault();
    setEditing(false);
    act.edit(message, event.target.elements.text.value);
  };
  return html`<li class="message ${message.role}">
    ${siblings.length > 1 && html`<span class="siblings">${siblings.map((each, i) => html`<button aria-pressed=${each.id === message.id}
      onClick=${() => act.setTip(each.id)} title=${each.content.slice(0, 80)}>${i + 1}</button>`)}</span>`}
    ${editing
      ? html`<form onSubmit=${save}><textarea name="text" rows="3">${message.content}</textarea><button>Send as a branch</button></form>`
      : html`<${Content} message=${message} act=${act} />`}
    <span class="actions">
      ${message.role !== "assistant"
        ? html`${message.role === "user" && html`<button onClick=${() => setEditing(!editing)}>edit</button>`}<button onClick=${() => (act.setTip(message.id), act.draw(message.id))}>more answers</button>`
        : html`<button onClick=${() => act.setTip(message.id)}>branch here</button>
            ${message.busy && html`<button onClick=${() => act.stop(message.id)}>stop</button>`}
            ${!message.busy && html`<button onClick=${() => (act.setTip(message.parent), act.draw(message.parent))}>retry</button>`}`}
    </span>
  </li>`;
}

function Content({ message, act }) {
  const json = !message.busy && isJson(message.content);
  return html`
    ${message.thought && html`<details><summary>thinking</summary><pre>${message.thought}</pre></details>`}
    ${message.role === "tool" && html`<small class="quiet">result of ${message.name}</small>`}
    ${(message.content || message.busy) && html`<pre class=${json ? "json" : "text"}>${json ? pretty(message.content) : message.content}${message.busy ? "▍" : ""}</pre>`}
    ${(message.calls || []).map((call) => html`<${Call} key=${call.id} message=${message} call=${call} act=${act} />`)}
    ${message.note && html`<small class=${message.failed ? "error" : "quiet"}>${message.note}</small>`}`;
}

// A call as a card: the function, its arguments, and where its result is written.
function Call({ message, call, act }) {
  const answer = (event) => {
    event.preventDefault();
    act.result(message, call, event.target.elements.result.value);
    event.target.reset();
  };
  return html`<div class="call card"><strong>${call.name}</strong> <small class="quiet">${call.id}</small>
    <pre class="json">${pretty(call.arguments)}</pre>
    ${act && !message.busy && html`<form onSubmit=${answer}><input name="result" aria-label="result of ${call.name}" placeholder='its result, such as {"status": "sunny"}' /><button>Send the result</button></form>`}</div>`;
}

// One of several continuations, side by side; the chosen one becomes part of the conversation.
function Continuation({ message, act }) {
  return html`<div class="card">
    <${Content} message=${message} />
    <p>${message.busy
      ? html`<button onClick=${() => act.stop(message.id)}>stop</button>`
      : html`<button onClick=${() => act.setTip(message.id)}>continue from here</button>`}</p>
  </div>`;
}

function addCalls(calls, deltas) {
  const found = [...calls];
  for (const { index, id, function: part } of deltas) {
    const before = found[index] || { id: "", name: "", arguments: "" };
    found[index] = { id: id || before.id, name: before.name + (part.name || ""), arguments: before.arguments + (part.arguments || "") };
  }
  return found;
}
