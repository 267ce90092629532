// The page: a live connection, three views, and a question for the key where one is needed.
import { html, render, useEffect, useState } from "/ui/vendor/htm-preact.js";
import { Chat } from "/ui/chat.js";
import { Figures, History } from "/ui/figures.js";
import { AskKey } from "/ui/key.js";
import { events, NoKey } from "/ui/server.js";
import { TreeView } from "/ui/tree.js";

const VIEWS = { tree: "Tree", figures: "Figures", chat: "Chat" };
const RETRY_MS = 2000;
const history = new History();

function useLive() {
  const [live, setLive] = useState({ state: "connecting" });
  useEffect(() => {
    const stop = new AbortController();
    (async () => {
      while (!stop.signal.aborted) {
        try {
          for await (const snapshot of events("/ui/events", undefined, stop.signal)) {
            history.add(snapshot);
            setLive({ state: "live", snapshot });
            if (!performance.getEntriesByName("first snapshot").length) requestAnimationFrame(() => performance.mark("first snapshot"));
          }
          setLive((now) => ({ ...now, state: "lost", reason: "the server ended the connection" }));
        } catch (error) {
          if (stop.signal.aborted) return;
          if (error instanceof NoKey) return setLive({ state: "key" });
          setLive((now) => ({ ...now, state: "lost", reason: error.message }));
        }
        await new Promise((done) => setTimeout(done, RETRY_MS));
      }
    })();
    return () => stop.abort();
  }, []);
  return live;
}

function App() {
  const live = useLive();
  const [view, setView] = useState(VIEWS[location.hash.slice(1)] ? location.hash.slice(1) : "tree");
  const choose = (name) => {
    window.history.replaceState(null, "", `#${name}`);
    setView(name);
  };
  if (live.state === "key") return html`<${AskKey} />`;
  const { snapshot } = live;
  return html`
    <header>
      <h1>Branchwise</h1>
      <span class="quiet">${snapshot ? snapshot.model : ""}</span>
      <nav>${Object.entries(VIEWS).map(
        ([name, title]) =>
          html`<button aria-pressed=${view === name} onClick=${() => choose(name)}>${title}</button>`,
      )}</nav>
      <a href="/docs">Manual</a>
      <span class="state ${live.state}" role="status">${live.state === "lost" ? `${live.reason}; trying again` : live.state}</span>
    </header>
    <main>
      <section hidden=${view !== "tree"}>${snapshot && html`<${TreeView} snapshot=${snapshot} />`}</section>
      <section hidden=${view !== "figures"}>
        ${view === "figures" && snapshot && html`<${Figures} history=${history} snapshot=${snapshot} />`}
      </section>
      <section hidden=${view !== "chat"}><${Chat} model=${snapshot ? snapshot.model : ""} /></section>
    </main>`;
}

document.getElementById("app").replaceChildren();
render(html`<${App} />`, document.getElementById("app"));
