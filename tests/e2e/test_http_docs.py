"""The pages about the HTTP API: every bash block runs, what follows it is what came back, and no route is left out.

A page's blocks run in order, in one session of bash, against one server with the shipped model whose cache is empty at
first. The first fence after a block shows what its last command printed: ``json``, where ``…`` stands for anything left
out, or ``text``, of which every line must come, in order. An error shown is an error expected.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli.main import app as cli
from branchwise.runtime.config import EngineConfig, ServerConfig

ROOT = Path(__file__).resolve().parents[2]
HTTP = ROOT / "docs" / "http"
README = HTTP / "README.md"
PAGES = [README, *sorted(page for page in HTTP.glob("*.md") if page != README)]
URL = "http://127.0.0.1:8000"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# A failing curl prints what came and says that it failed; the block goes on.
PRELUDE = """
curl() { command curl --silent --show-error --max-time 60 --fail-with-body "$@" || echo "curl: $?" >> "$BLOCK.failed"; }
set -o pipefail
"""


class Block(NamedTuple):
    code: str
    language: str  # of what is shown after it, "" for nothing
    shown: str


class Ran(NamedTuple):
    status: int
    out: str
    err: str
    failed: bool  # a curl in it got an error


def blocks(page: Path) -> list[Block]:
    fences = [*FENCE.findall(page.read_text()), ("", "")]
    return [
        Block(code, *(after if after[0] in ("json", "text") else ("", "")))
        for (language, code), after in pairwise(fences)
        if language == "bash"
    ]


def run(page: Path, url: str, folder: Path) -> list[Ran]:
    found = blocks(page)
    script = [PRELUDE]
    for i, block in enumerate(found):
        here = shlex.quote(str(folder / str(i)))
        script.append(f'BLOCK={here}\n{{\n{block.code.replace(URL, url)}\n}} >"$BLOCK.out" 2>"$BLOCK.err"')
        script.append('echo $? >"$BLOCK.status"')
    path = folder / "script.sh"
    path.write_text("\n".join(script))
    done = subprocess.run(["bash", str(path)], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return [
        Ran(
            int((folder / f"{i}.status").read_text()),
            (folder / f"{i}.out").read_text(),
            (folder / f"{i}.err").read_text(),
            (folder / f"{i}.failed").exists(),
        )
        for i in range(len(found))
    ]


@pytest.fixture(scope="module")
def shipped(run_server_process: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    if shutil.which("bash") is None or shutil.which("curl") is None:
        pytest.skip("the pages' examples need bash and curl")
    traces = tmp_path_factory.mktemp("traces")
    disk = tmp_path_factory.mktemp("disk")
    # float32 has the answers that the pages show; `auto` is bfloat16 on some processors, and rounds to others
    settings = {"dtype": "float32", "kv_cache_tokens": 40_000, "check_when_idle": True}
    engine = EngineConfig(**settings, profile=str(traces), disk_cache=str(disk))
    config = ServerConfig(engine=engine, port=0, kv_events="tcp://127.0.0.1:*")
    with run_server_process(config, tmp_path_factory.mktemp("shipped")) as server:
        yield server
        server.empty_cache()  # what the pages' branches hold


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_what_a_page_shows_is_what_comes(shipped: Any, page: Path, tmp_path: Path) -> None:
    shipped.empty_cache()
    for block, ran in zip(blocks(page), run(page, shipped.url, tmp_path), strict=True):
        where = f"{page.name}:\n{block.code}\nprinted:\n{ran.out[:3000]}\n{ran.err}"
        assert ran.status == 0, where
        assert ran.failed == expects_error(block), where
        try:
            if block.language == "json":
                agree(elided(block.shown), last_json(ran.out))
            elif block.language == "text":
                lines_agree(block.shown.splitlines(), ran.out.splitlines())
        except AssertionError as error:
            raise AssertionError(f"{error}\n{where}") from error


# -- what is shown against what came -----------------------------------------------------------------------------------


def expects_error(block: Block) -> bool:
    if block.language == "json":
        shown = elided(block.shown)
        return isinstance(shown, dict) and "error" in shown
    return re.match(r"HTTP/1.1 [45]", block.shown) is not None


def elided(text: str) -> Any:
    """JSON with ``…`` in it: in an object it becomes a key, in a list an element, else a value."""
    result, within = "", ""
    for string, other in re.findall(r'("(?:[^"\\]|\\.)*")|(.)', text, re.DOTALL):
        if other in "{[" and other:
            within += other
        elif other in "}]" and other:
            within = within[:-1]
        key = other == "…" and within.endswith("{") and not result.rstrip().endswith(":")
        result += '"…": null' if key else '"…"' if other == "…" else string or other
    return json.loads(result)


def last_json(text: str) -> Any:
    """Of several answers, one after the other with nothing between them, the last."""
    decoder, value, end = json.JSONDecoder(), None, 0
    while end < len(text.rstrip()):
        value, end = decoder.raw_decode(text, end + len(text[end:]) - len(text[end:].lstrip()))
    return value


def agree(shown: Any, got: Any, where: str = "it") -> None:
    """Keys, lengths, strings and whole numbers; of other numbers only that there is one."""
    match shown:
        case "…":
            pass
        case dict():
            assert isinstance(got, dict), f"{where} is {got!r}"
            names = shown.keys() - {"…"}
            assert names <= got.keys(), f"{where} has no {sorted(names - got.keys())}"
            assert "…" in shown or names == got.keys(), f"{where} has {sorted(got.keys() - names)}, which is not shown"
            for name in names:
                agree(shown[name], got[name], f"{where}.{name}")
        case list():
            assert isinstance(got, list), f"{where} is {got!r}"
            first = shown.index("…") if "…" in shown else len(shown)
            assert first <= len(got) if "…" in shown else first == len(got), f"{where} has {len(got)} elements"
            for i in range(first):
                agree(shown[i], got[i], f"{where}[{i}]")
        case str():
            pattern = ".*".join(map(re.escape, shown.split("…")))
            assert isinstance(got, str) and re.fullmatch(pattern, got, re.DOTALL), f"{where} is {got!r}, not {shown!r}"
        case float():
            assert isinstance(got, (int, float)) and not isinstance(got, bool), f"{where} is {got!r}"
        case _:
            assert got == shown and type(got) is type(shown), f"{where} is {got!r}, not {shown!r}"


def lines_agree(shown: list[str], got: list[str]) -> None:
    """Every line shown comes, in this order. Numbers are any numbers; after ``data: `` there is JSON."""
    rest = iter(got)
    for line in shown:
        if line.strip(" …"):
            assert any(line_agrees(line, other) for other in rest), f"there is no line {line!r}, or not in this order"


def line_agrees(shown: str, got: str) -> bool:
    if shown.startswith("data: {"):
        try:
            agree(elided(shown.removeprefix("data: ")), json.loads(got.removeprefix("data: ")))
        except (AssertionError, ValueError):
            return False
        return True
    pattern = re.sub(r"[0-9]+(\\\.[0-9]+)?", r"[0-9.,]+", re.escape(shown)).replace("…", ".*")
    return re.fullmatch(pattern, got) is not None


def test_the_comparison_sees_differences() -> None:
    got = {"a": 1, "b": ["x1", {"c": None}], "d": 0.5, "e": True}
    for shown in (
        '{"a": 1, "b": ["x…", {"c": null}], "d": 1.5, "e": true}',
        '{"a": 1, …}',
        '{"b": […], …}',
        '{…, "b": ["x1", …]}',
        '{"a": …, "b": …, "d": …, "e": …}',
    ):
        agree(elided(shown), got)
    for shown in ('{"a": 1}', '{"z": 1, …}', '{"a": 2, …}', '{"b": ["x1"], …}', '{"b": ["y…", …], …}', '{"e": 1, …}'):
        with pytest.raises(AssertionError):
            agree(elided(shown), got)
    assert last_json('{"a": 1}{"b": 2}\n') == {"b": 2}
    lines_agree(['data: {"a": 1, …}', "…", "x 12 y…"], ['data: {"a": 1, "b": 2}', "x 7 yes"])
    for lines in (["x 7 no"], ["x 12 y…", 'data: {"a": 1, …}'], ['data: {"a": 1}']):
        with pytest.raises(AssertionError):
            lines_agree(lines, ['data: {"a": 1, "b": 2}', "x 7 yes"])


# -- routes ------------------------------------------------------------------------------------------------------------

LANDING: tuple[str, ...] = ()  # routes that may be described before they are there, and the other way
ROUTE = re.compile(r"\b(GET|HEAD|POST|DELETE) (/[\w/{}.]*)")
Route = tuple[str, str]


def settled(routes: set[Route]) -> set[Route]:
    return {route for route in routes if not route[1].startswith(LANDING)}


@pytest.fixture(scope="module")
def served(shipped: Any) -> dict[Route, str]:
    """Every route of the application, and its tag."""
    found = {
        (method.upper(), path): operation["tags"][0]
        for path, methods in shipped.http.get("/openapi.json").json()["paths"].items()
        for method, operation in methods.items()
    }
    return found | {("GET", "/openapi.json"): "models"}


def index() -> dict[Route, str]:
    """The README's table: routes and the names of their pages."""
    found: dict[Route, str] = {}
    for line in README.read_text().splitlines():
        if line.startswith("| `") and "](" in line:
            routes, _, page = line.strip("| ").split(" | ")
            found |= dict.fromkeys(ROUTE.findall(routes), page.partition("](")[2].removesuffix(".md)"))
    return found


def headings(page: Path) -> set[Route]:
    return {route for line in prose(page).splitlines() if line.startswith("#") for route in ROUTE.findall(line)}


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def calls(page: Path) -> Iterator[Route]:
    """(method, path) of every curl in the page's blocks."""
    for block in blocks(page):
        lexer = shlex.shlex(block.code, posix=True, punctuation_chars="();|&<>")
        lexer.whitespace_split = True
        words = [*lexer, ";"]
        for start, word in enumerate(words):
            if word != "curl":
                continue
            end = next(i for i, one in enumerate(words) if i > start and (one == "curl" or set(one) <= set("();|&<>")))
            told = words[start + 1 : end]
            method = "HEAD" if "--head" in told else "POST" if "-d" in told else "GET"
            if "-X" in told:
                method = told[told.index("-X") + 1]
            url = next(one for one in told if one.startswith(URL))
            yield method, url.removeprefix(URL).partition("?")[0]


def template(route: Route, served: dict[Route, str]) -> Route | None:
    """The application's route that a call reaches: one without parameters before one with."""
    for method, path in sorted(served, key=lambda one: "{" in one[1]):
        pattern = re.sub(r"{\w+}", ".+" if path.startswith("/v1/models") else "[^/]+", re.sub(r"\.", r"\.", path))
        if method == route[0] and re.fullmatch(pattern, route[1]):
            return method, path
    return None


def test_every_route_is_in_the_index_and_every_route_of_the_index_is_there(served: dict[Route, str]) -> None:
    assert settled(set(index())) == settled(set(served))
    assert {"GET", "POST", "DELETE", "HEAD"} == {method for method, _ in index()}
    for route, page in index().items():
        assert page == served.get(route, page), f"{route} is on the page of its tag"


def test_every_route_has_a_heading_and_a_curl_line_on_its_page(served: dict[Route, str]) -> None:
    pages = {page.stem: page for page in PAGES}
    for page in PAGES:
        assert settled(headings(page)) <= set(served), page.name
        for call in calls(page):
            assert template(call, served) is not None, f"{page.name} calls {call}"
    for route, name in served.items():
        if settled({route}):
            assert route in headings(pages[name]), f"{name}.md has no heading for {route}"
            called = {template(call, served) for call in calls(pages[name])}
            assert route in called, f"{name}.md has no curl line for {route}"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", prose(page)):
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            if not other.exists():
                assert f"/v1/{other.stem}" in LANDING, f"{page.name} links to {target}"
                continue
            if other.suffix == ".png":
                continue
            titles = [line.lstrip("# ") for line in prose(other).splitlines() if line.startswith("#")]
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not anchor or anchor in slugs, f"{page.name} links to {target}"


def test_flags_exist() -> None:
    known = CliRunner().invoke(cli, ["serve", "--help"], env={"COLUMNS": "300"}).output
    for page in PAGES:
        for flag in set(re.findall(r"(--[a-z][a-z-]+)", prose(page))):
            assert re.search(rf"{flag}\b", known), f"{page.name}: {flag}"


# -- limits ------------------------------------------------------------------------------------------------------------


class Limit(NamedTuple):
    what: str
    default: str
    flag: str
    says: str


def limits() -> list[Limit]:
    text = README.read_text()
    rows = text[text.index("| what | default | flag |") :].partition("\n\n")[0].splitlines()[2:]
    return [Limit(*(cell.strip() for cell in row.strip("|").split("|"))) for row in rows]


def test_limits_have_the_defaults_of_the_configuration() -> None:
    engine = EngineConfig()
    config = ServerConfig(engine=engine)
    flags = {limit.flag.strip("`"): limit.default for limit in limits() if limit.flag}
    for flag, default in flags.items():
        field = flag.removeprefix("--").replace("-", "_")
        value = getattr(config if hasattr(config, field) else engine, field)
        if value is None:
            assert not default[0].isdigit(), flag
        else:
            assert float(default.replace(",", "")) == value, flag
    caps = {name for name in ServerConfig.__struct_fields__ if name.startswith("max_")}
    caps |= {
        "max_branches",
        "max_branches_per_key",
        "branch_ttl",
        "max_pin_ttl",
        "max_pinned_share",
        "pinned_share_per_key",
        "max_model_len",
    }
    assert {f"--{name.replace('_', '-')}" for name in caps} <= flags.keys()


def tool(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels // 2):
        schema = {"properties": {"a": schema}}
    return schema


USER = {"role": "user", "content": "Hello"}
CHAT = "/v1/chat/completions"
TEXT = {"prompt": "Hello"}
# The row's first words, and what goes beyond the limit. Of those that are not here, the tests in ELSEWHERE.
BEYOND: dict[str, tuple[str, dict[str, Any]]] = {
    "tokens of prompt and completion": ("/v1/completions", {"prompt": [5], "max_tokens": 5000}),
    "bytes of a body": ("/generate", {"text": "x" * 16_777_216}),
    "names and values of a body, lists and objects twice, but for token ids": (
        CHAT,
        {"messages": [USER], "metadata": [0] * 299_989},
    ),
    "the same with token ids": ("/v1/completions", {"prompt": [7] * 4_194_301}),
    "backslashes in the strings of a body": ("/v1/completions", {"prompt": "\n" * 1_048_577}),
    "levels of objects and lists": (CHAT, {"messages": [USER], "metadata": json.loads("[" * 65 + "]" * 65)}),
    "fields of a body": ("/generate", {f"x{i}": 1 for i in range(257)}),
    "entries of a field, but for token ids": ("/v1/completions", {**TEXT, "stop": ["x"] * 16_385}),
    "prompts": ("/v1/completions", {"prompt": ["Hello"] * 1025}),
    "prompts × `n`": ("/v1/completions", {"prompt": ["Hello"] * 9, "n": 128}),
    "`n`": ("/v1/completions", {**TEXT, "n": 129}),
    "stop strings": ("/v1/completions", {**TEXT, "stop": ["x"] * 65}),
    "characters of a stop string": ("/v1/completions", {**TEXT, "stop": "x" * 1025}),
    "`stop_token_ids`": ("/v1/completions", {**TEXT, "stop_token_ids": [5] * 257}),
    "`logit_bias` entries": ("/v1/completions", {**TEXT, "logit_bias": {str(i): 1 for i in range(1025)}}),
    "`top_logprobs` and its like": (CHAT, {"messages": [USER], "logprobs": True, "top_logprobs": 21}),
    "messages": (CHAT, {"messages": [USER] * 16_385}),
    "parts of a message": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4097}]},
    ),
    "parts and calls of a conversation": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}] * 4096}] * 5},
    ),
    "tools": (CHAT, {"messages": [USER], "tools": [tool(f"f{i}") for i in range(1025)]}),
    "characters of a tool's name": (CHAT, {"messages": [USER], "tools": [tool("f" * 129)]}),
    "bytes of a tool's schema": (
        CHAT,
        {"messages": [USER], "tools": [tool(parameters={"type": "object", "description": "x" * 65_503})]},
    ),
    "bytes of all tools' schemas": (
        CHAT,
        {"messages": [USER], "tools": [tool(f"f{i}", parameters={"description": "x" * 60_000}) for i in range(9)]},
    ),
    "bytes of a schema, regex or grammar": (CHAT, {"messages": [USER], "regex": "x" * 131_073}),
    "the same × `n`": (CHAT, {"messages": [USER], "regex": "x" * 100_000, "n": 100}),
    "levels of a schema": (CHAT, {"messages": [USER], "json_schema": json.dumps(nested(70))}),
    "values in a schema": (CHAT, {"messages": [USER], "json_schema": json.dumps({"enum": [*range(20_000)]})}),
    "choices": (CHAT, {"messages": [USER], "structured_outputs": {"choice": [f"x{i}" for i in range(1025)]}}),
    "`chat_template_kwargs` entries": (
        CHAT,
        {"messages": [USER], "chat_template_kwargs": {f"x{i}": 1 for i in range(65)}},
    ),
    "characters of `cache_salt`, `rid`, names and ids": ("/v1/completions", {**TEXT, "cache_salt": "x" * 513}),
    "breakpoints": ("/v1/completions", {**TEXT, "prompt_cache_breakpoint": [True] * 5}),
    "seconds of a pin or breakpoint": ("/v1/completions", {**TEXT, "prompt_cache_options": {"ttl": "2d"}}),
    "branches": ("/branches", {}),
    "seconds of an unused branch": ("/branches", {"ttl": "1h"}),
    "forks in one call": ("/branches/ID/fork", {"n": 1025}),
    "operations in a batch": ("/branches/batch", {"ops": [{"op": "create"}] * 1025}),
    "tokens to `/detokenize`": ("/detokenize", {"tokens": [5] * 1_000_001}),
    "nodes of `/cache/tree`": ("/cache/tree?max_nodes=100001", {}),
}
ELSEWHERE = {
    "work to compile and follow a grammar": "tests/runtime/grammar/test_engine_grammar.py",
    "names and values in calls' arguments, where a template reads them": "tests/runtime/chat/test_messages.py",
    "the same, where the cache is smaller": "tests/runtime/test_fit.py",
    "seconds of a request": "tests/e2e/test_server_timeouts.py",
    "requests of a key that have not finished": "tests/runtime/server/http/test_client.py",
    "requests that have not finished": "tests/e2e/test_openapi_errors.py",
    "bytes of all unfinished bodies, beyond 65,536 of each": "tests/runtime/server/http/test_body_limit.py",
    "connections": "tests/runtime/server/http/test_protocol.py",
    "bytes of request line and headers": "tests/e2e/test_server_bad_input.py",
    "share of the cache that is pinned": "tests/e2e/test_openapi_errors.py",
    "of that, for one key": "tests/e2e/test_cache_routes.py",
    "branches of a key": "tests/runtime/scheduler/branches/test_registry.py",
    "pins of a key": "tests/runtime/scheduler/test_cache_control.py",
}


def test_every_limit_says_what_the_table_says(shipped: Any) -> None:
    assert {limit.what for limit in limits()} == BEYOND.keys() | ELSEWHERE.keys()
    assert all((ROOT / path).is_file() for path in ELSEWHERE.values())
    branch = shipped.http.post("/branches", json={}).json()["id"]
    for limit in limits():
        if limit.what in ELSEWHERE:
            continue
        path, body = BEYOND[limit.what]
        made = fill_branches(shipped, branch) if limit.what == "branches" else []
        method = "GET" if "?" in path else "POST"
        answer = shipped.http.request(method, path.replace("ID", branch), json=body if method == "POST" else None)
        for start in range(0, len(made), 1024):
            ops = [{"op": "delete", "id": id} for id in made[start : start + 1024]]
            shipped.http.post("/branches/batch", json={"ops": ops}).raise_for_status()
        status, says = re.fullmatch(r"(?:(\d+): )?`(.+)`", limit.says).groups()  # type: ignore[union-attr]
        assert answer.status_code == int(status or 400), (limit.what, answer.text[:500])
        pattern = ".*".join(map(re.escape, says.split("…")))
        message = answer.json()["error"]["message"]
        assert re.fullmatch(pattern, message), f"{limit.what}: {message[:500]}"


def fill_branches(shipped: Any, branch: str) -> list[str]:
    """As many as may live, and their ids."""
    facts = shipped.http.get("/branches").json()
    made: list[str] = []
    while room := facts["max_branches"] - facts["branches"] - len(made):
        made += shipped.http.post(f"/branches/{branch}/fork", json={"n": min(room, 1024)}).json()["ids"]
    return made
