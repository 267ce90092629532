// A conversation that branches: a tree of messages. Pure functions; every change returns a new state.
let last = 0;

export function empty() {
  return { messages: {}, root: { id: null, children: [] } };
}

const childrenOf = (state, id) => (id === null ? state.root.children : state.messages[id].children);

// A message after `parent` (null: at the beginning). Returns [state, id].
export function append(state, parent, message) {
  const id = `m${++last}`;
  const messages = { ...state.messages, [id]: { ...message, id, parent, children: [] } };
  const children = [...childrenOf(state, parent), id];
  if (parent === null) return [{ messages, root: { id: null, children } }, id];
  messages[parent] = { ...messages[parent], children };
  return [{ ...state, messages }, id];
}

export function update(state, id, change) {
  return { ...state, messages: { ...state.messages, [id]: { ...state.messages[id], ...change } } };
}

// The messages from the beginning to `id`.
export function path(state, id) {
  const found = [];
  for (let at = id; at !== null; at = state.messages[at].parent) found.unshift(state.messages[at]);
  return found;
}

export function children(state, id) {
  return childrenOf(state, id).map((each) => state.messages[each]);
}

// Messages as the API takes them, with calls and the results of tools.
export function turns(messages) {
  return messages.map(({ role, content, calls, call_id }) => ({
    role, content,
    ...(calls && calls.length ? { tool_calls: calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } })) } : {}),
    ...(call_id ? { tool_call_id: call_id } : {}),
  }));
}

// The conversation as a request for curl.
export function asCurl(origin, body) {
  const quoted = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  return `curl ${origin}/v1/chat/completions -H 'Content-Type: application/json' -d '${quoted}'`;
}

// The whole tree as a program in Branchwise's language: a fork wherever a message has several continuations.
export function asProgram(state, origin, settings) {
  const lines = ["import branchwise as bw", "", "", "@bw.function", "def conversation(s):"];
  const role = { system: "system", user: "user", assistant: "assistant" };
  let answers = 0;
  const text = (message) =>
    message.role === "tool"
      ? `bw.user(${JSON.stringify(`Result of ${message.name}: ${message.content}`)})`
      : message.role === "assistant"
      ? `bw.assistant(bw.gen("answer${++answers}", max_tokens=${settings.max_tokens}, temperature=${settings.temperature}))`
      : `bw.${role[message.role]}(${JSON.stringify(message.content)})`;
  const write = (id, name, indent) => {
    const next = children(state, id);
    if (next.length === 1) {
      lines.push(`${indent}${name} += ${text(next[0])}`);
      write(next[0].id, name, indent);
    } else if (next.length > 1) {
      const forks = `${name}_${lines.length}`;
      lines.push(`${indent}${forks} = ${name}.fork(${next.length})`);
      next.forEach((each, i) => {
        const branch = `${forks}_${i}`;
        lines.push(`${indent}${branch} = ${forks}[${i}]`, `${indent}${branch} += ${text(each)}`);
        write(each.id, branch, indent);
      });
    }
  };
  write(null, "s", "    ");
  if (lines.length === 5) lines.push("    pass");
  lines.push("", "", `bw.set_default_backend(bw.connect(${JSON.stringify(origin)}))`, "print(conversation.run().text())");
  return lines.join("\n") + "\n";
}
