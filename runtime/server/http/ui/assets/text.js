// Words and numbers that several views show.
export const REASONS = {
  hit: "everything that could be reused was",
  tier: "what follows is in host memory or on disk, and was not loaded",
  evicted: "what follows was evicted to make room: a larger pool, or a pin, would keep it",
  diverged: "the prompt differs from what is cached",
  namespace: "the same text is cached under another cache_salt",
  cold: "nobody has sent what follows",
  disabled: "the request asked not to use the cache",
};

export function number(value) {
  return (value || 0).toLocaleString("en-US");
}

export function count(value, noun) {
  const many = noun.endsWith("ch") ? `${noun}es` : `${noun}s`;
  return `${number(value)} ${value === 1 ? noun : many}`;
}

// JSON is indented, everything else stays as it is.
export function pretty(text) {
  if (!isJson(text)) return text || "";
  return JSON.stringify(JSON.parse(text), null, 2);
}

export function isJson(text) {
  if (!/^\s*[[{]/.test(text || "")) return false;
  try {
    JSON.parse(text);
    return true;
  } catch {
    return false;
  }
}
