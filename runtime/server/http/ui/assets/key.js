// The question for the key, where the server needs one.
import { html } from "/ui/vendor/htm-preact.js";
import { hasKey, setKey } from "/ui/server.js";

export function AskKey() {
  const submit = (event) => {
    event.preventDefault();
    setKey(new FormData(event.target).get("key"));
    location.reload();
  };
  return html`<form class="card" onSubmit=${submit}>
    ${hasKey() && html`<p class="error" role="alert">The server refused that key.</p>`}
    <label>This server needs a key. It stays in this tab.
      <input name="key" type="password" autocomplete="off" autofocus required /></label>
    <button>Continue</button>
  </form>`;
}
