// The reference of the routes, drawn from this server's own OpenAPI document.
import { html, render } from "/ui/vendor/htm-preact.js";
import { AskKey } from "/ui/key.js";
import { json, NoKey } from "/ui/server.js";

const METHODS = ["get", "post", "delete", "head"];

function Reference({ api }) {
  const tags = api.tags.map((tag) => ({ ...tag, operations: operations(api, tag.name) }));
  return html`<h1>Reference</h1>
    <p class="quiet">Branchwise ${api.info.version}. Click a route for its fields. The document itself: <a href="/openapi.json">/openapi.json</a></p>
    ${tags.map((tag) => html`<section key=${tag.name}>
      <h2 id=${`tag-${tag.name}`}>${tag.name}</h2><p>${tag.description}</p>
      ${tag.operations.map((each) => html`<${Operation} key=${each.path + each.method} api=${api} ...${each} />`)}
    </section>`)}`;
}

function operations(api, tag) {
  return Object.entries(api.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method] && item[method].tags[0] === tag).map((method) => ({ path, method, operation: item[method] })));
}

function Operation({ api, path, method, operation }) {
  const body = schemaOf(api, operation.requestBody);
  return html`<details class="operation">
    <summary><code class="method">${method.toUpperCase()}</code> <code>${path}</code> ${operation.summary}</summary>
    ${operation.description && html`<p>${operation.description}</p>`}
    <pre>${curl(path, method, body)}</pre>
    ${operation.parameters && html`<${Fields} title="Parameters" rows=${operation.parameters.map((each) => ({ ...each.schema, ...each }))} />`}
    ${body && html`<${Fields} title="Body" rows=${rows(body)} />`}
    <p class="quiet">Answers: ${Object.entries(operation.responses).map(([status, answer]) => `${status} ${resolve(api, answer).description.split(". ")[0]}`).join(" · ")}</p>
  </details>`;
}

function Fields({ title, rows }) {
  return html`<table><caption>${title}</caption>
    <thead><tr><th>name</th><th>type</th><th>default</th><th>meaning</th></tr></thead>
    <tbody>${rows.map((each) => html`<tr key=${each.name}>
      <td><code>${each.name}</code>${each.required ? " *" : ""}</td><td>${typeOf(each)}</td>
      <td>${each.default === undefined || each.default === null ? "" : html`<code>${JSON.stringify(each.default)}</code>`}</td>
      <td>${each.description || ""}</td></tr>`)}</tbody></table>`;
}

function rows(schema) {
  const required = new Set(schema.required || []);
  return Object.entries(schema.properties || {}).map(([name, each]) => ({ ...each, name, required: required.has(name) }));
}

function schemaOf(api, body) {
  return body && resolve(api, body.content["application/json"].schema);
}

function resolve(api, value) {
  if (!value.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((at, name) => at[name], api);
}

function typeOf(schema) {
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.enum) return schema.enum.map((each) => JSON.stringify(each)).join(" | ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return schema.anyOf.filter((each) => each.type !== "null").map(typeOf).join(" | ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items) : "values"}`;
  return schema.type || "any";
}

// Required fields only; the pages of the manual have whole examples.
function curl(path, method, body) {
  const words = ["curl"];
  if (method !== "get") words.push("-X", method.toUpperCase());
  words.push(location.origin + path);
  if (body) {
    const example = Object.fromEntries((body.required || []).map((name) => [name, `<${typeOf(body.properties[name])}>`]));
    words.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(example)}'`);
  }
  return words.join(" ");
}

const place = document.getElementById("reference");
json("/openapi.json").then(
  (api) => render(html`<${Reference} api=${api} />`, place),
  (error) => render(error instanceof NoKey ? html`<${AskKey} />` : html`<p class="error">${error.message}</p>`, place),
);
