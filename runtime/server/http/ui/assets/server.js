// Calls to the server. The key, if one is needed, stays in this tab's session storage.
const KEY = "branchwise-key";

export class NoKey extends Error {
  constructor() {
    super("the server refused the key");
  }
}

export function hasKey() {
  return sessionStorage.getItem(KEY) !== null;
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

export async function call(path, body, signal) {
  const options = { headers: headers(), signal, credentials: "omit" };
  if (body !== undefined) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options).catch((error) => {
    throw error instanceof TypeError ? new Error("the server cannot be reached") : error;
  });
  if (response.status === 401) throw new NoKey();
  if (!response.ok) throw new Error(await reason(response));
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

export async function json(path, body, signal) {
  return (await call(path, body, signal)).json();
}

// Yields the objects of a stream of server-sent events, until [DONE] or the end.
export async function* events(path, body, signal) {
  const response = await call(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (line === undefined) continue;
      if (line === "data: [DONE]") return;
      const found = JSON.parse(line.slice(6));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}
