"""The same programs on real servers: stateless, and with branches."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import branchwise as bw
from branchwise.frontend.client import AsyncClient, Client
from branchwise.frontend.errors import BackendError
from branchwise.frontend.lang import branches
from branchwise.frontend.lang.branches import BranchBackend
from branchwise.frontend.lang.codec import Run
from branchwise.frontend.lang.server import ServerBackend

KEY = "the-key"


@bw.function
def everything(s):
    s += bw.system("You are a helpful assistant.")
    s += bw.user("Who is Mira?")
    s += bw.assistant(bw.gen("who", max_tokens=30))
    forks = s.fork(3)
    forks += lambda i: bw.user(["Where does Mira live?", "Who is Tobin?", "Who is Sol?"][i])
    forks += bw.assistant(bw.gen("more", max_tokens=30, stop="."))
    forks += bw.user("Thank you!")
    forks += bw.assistant(bw.gen("bye", max_tokens=12, n=2))
    forks.join()
    s += bw.user("Numbers: 2 3. Target: 6. Can the target still be reached?")
    s += bw.assistant(bw.select("choice", ["yes", "no"]))
    best = s.fork(1)
    best += bw.user("Who is Juniper?")
    with best[0].assistant():
        best += bw.gen("friend", max_tokens=30)
    best.join("concate_and_append")


def outcome(state: bw.State) -> Any:
    return [state["who"], state["more"], state["bye"], state["choice"], state.text(), state.messages()]


NAMES = ["Mira", "Tobin", "Sol", "Wren", "Rook", "Hesper"]
OPTIONS = {"temperature": 0.7, "seed": 3}


@pytest.fixture(params=[False, True], ids=["stateless", "branches"])
def backend(request: pytest.FixtureRequest, server: Any) -> Iterator[ServerBackend]:
    made = bw.connect(server.url, KEY, branches=request.param)
    assert isinstance(made, BranchBackend) == request.param
    bw.flush_cache(made)
    yield made
    if request.param:
        assert _counts(made)["branches"] == 0, "a run leaves no branch behind"


def _counts(made: ServerBackend) -> dict[str, Any]:
    from branchwise.frontend.loop import background_loop

    return asyncio.run_coroutine_threadsafe(made.http.get("/branches"), background_loop()).result()


def test_the_meaning_is_the_same_everywhere(backend: ServerBackend, engine: Any) -> None:
    here = everything.run(**OPTIONS)
    there = everything.run(backend=backend, **OPTIONS)
    assert outcome(here) == outcome(there)
    assert [meta["prompt_tokens"] for meta in here.meta("bye")[0]] == [
        meta["prompt_tokens"] for meta in there.meta("bye")[0]
    ]


def test_streams(backend: ServerBackend) -> None:
    state = everything.run(backend=backend, stream=True, **OPTIONS)
    assert "".join(state.text_iter("who")) == state["who"]
    assert "".join(state.text_iter()) == state.text()
    assert outcome(state) == outcome(everything.run(backend=backend, **OPTIONS))


@pytest.mark.parametrize("how", ["expired", "the server was started anew"])
def test_a_branch_that_is_gone_is_made_again(server: Any, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    backend = bw.connect(server.url, KEY, branches=True)
    expected = outcome(everything.run(backend=backend, **OPTIONS))
    asked = BranchBackend._request
    killed = []

    async def unlucky(self: BranchBackend, handle: Any, what: str, *more: Any) -> Any:
        if handle.id is not None and (what, handle.id) not in killed:
            killed.append((what, handle.id))
            await self.http.post("/branches/batch", {"ops": [{"op": "delete", "id": handle.id}]})
            if how != "expired":
                handle.id = "b" + "A" * 32  # one that this server has never made
        return await asked(self, handle, what, *more)

    monkeypatch.setattr(BranchBackend, "_request", unlucky)
    assert outcome(everything.run(backend=backend, **OPTIONS)) == expected
    assert {what for what, _ in killed} >= {"generate", "fork", "score"}


def test_a_branch_that_is_gone_and_finds_no_room_any_more(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bw.connect(server.url, KEY, branches=True)
    expected = outcome(everything.run(backend=backend, **OPTIONS))
    post, made = AsyncClient.post, []

    async def full_later(self: Any, path: str, body: Any, **more: Any) -> Any:
        if path == "/branches" and made:
            raise bw.BackendError("too many branches", status=429)
        if path.endswith(("/generate", "/fork", "/score", "/extend")) and len(made) == 1:
            await post(self, "/branches/batch", {"ops": [{"op": "delete", "id": made[0]}]})
            made.append(path)
        reply = await post(self, path, body, **more)
        if path == "/branches":
            made.append(reply["id"])
        return reply

    monkeypatch.setattr(AsyncClient, "post", full_later)
    assert outcome(everything.run(backend=backend, **OPTIONS)) == expected
    assert len(made) == 2


@pytest.mark.parametrize("patience", [branches.CANCEL_SECONDS, 0.01])
@pytest.mark.parametrize("wanted", ["/branches", "/fork"])
def test_who_is_cancelled_while_branches_are_made_gives_them_back(
    server: Any, monkeypatch: pytest.MonkeyPatch, wanted: str, patience: float
) -> None:
    """At once, or later where the server takes longer than the caller waits."""
    monkeypatch.setattr(branches, "CANCEL_SECONDS", patience)
    backend = bw.connect(server.url, KEY, branches=True)
    post = AsyncClient.post
    asked, counted = 0, asyncio.Event()

    async def slow(self: Any, path: str, body: Any, **more: Any) -> Any:
        nonlocal asked
        reply = await post(self, path, body, **more)
        if path.endswith(wanted):
            asked += 1
            asyncio.get_running_loop().call_soon(task.cancel)
            # The server has made it, and the answer is on its way: for longer than the impatient wait.
            await (asyncio.sleep(0.05) if patience > 1 else counted.wait())
        return reply

    monkeypatch.setattr(AsyncClient, "post", slow)

    @bw.function
    async def program(s):
        s += "The mill by the river\n"
        forks = s.fork(3)
        forks += bw.gen("a", max_tokens=1)
        await forks["a"]

    async def main() -> None:
        nonlocal task
        await backend.codec()
        task = asyncio.create_task(program.arun(backend=backend))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert patience > 1 or _counts(backend)["branches"]
        counted.set()
        await asyncio.wait({*backend._deleting, asyncio.create_task(asyncio.sleep(0))}, timeout=60)

    task: asyncio.Task[Any]
    asyncio.run(main())
    assert asked == 1 and _counts(backend)["branches"] == 0


@pytest.mark.parametrize("how", ["cancelled", "failed"])
def test_a_large_fork_that_ends_half_way_gives_back_its_first_batches(
    server: Any, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(branches, "MAX_FORK", 2)
    backend = bw.connect(server.url, KEY, branches=True)
    post = AsyncClient.post
    made: list[int] = []

    async def third_fails(self: Any, path: str, body: Any, **more: Any) -> Any:
        if path.endswith("/fork") and len(made) == 2:
            if how == "failed":
                raise BackendError("the server is ill", status=500)
            task.cancel()
        reply = await post(self, path, body, **more)
        if path.endswith("/fork"):
            made.append(len(reply["ids"]))
        return reply

    monkeypatch.setattr(AsyncClient, "post", third_fails)

    async def main() -> None:
        nonlocal task
        handle = await backend.create()
        await backend.extend(handle, (await backend.codec()).encode([Run("The mill by the river")]))
        task = asyncio.create_task(backend.fork(handle, 7))
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else BackendError):
            await task
        await backend.close(handle)

    task: asyncio.Task[Any]
    asyncio.run(main())
    assert made == ([2, 2] if how == "failed" else [2, 2, 2]) and _counts(backend)["branches"] == 0


def test_a_process_that_ends_before_its_run_leaves_no_branch(server: Any) -> None:
    code = (
        "import sys, branchwise as bw\n"
        "@bw.function\n"
        "def program(s):\n"
        "    s += 'The mill by the river\\n' + bw.gen('a', max_tokens=2000, ignore_eos=True)\n"
        "state = program.run(backend=bw.connect(sys.argv[1], 'the-key'), stream=True)\n"
        "next(state.text_iter('a'))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert _counts(bw.connect(server.url, KEY))["branches"] == 0


def test_a_server_with_little_room_and_patience_that_is_then_killed(tight_server: Any) -> None:
    @bw.function
    def program(s):
        s += bw.system("You are a helpful assistant.")
        s += bw.user("Who is Mira?") + bw.assistant(bw.gen("who", max_tokens=30))
        s.sync()
        time.sleep(1.5)  # the branch expires
        forks = s.fork(6)  # twice as many as there is room for
        forks += lambda i: bw.user(f"Who is {NAMES[i]}?") + bw.assistant(bw.gen("who", max_tokens=4))
        forks.join()
        return s["who"], s.meta("who")[0]["cached_tokens"]

    whole = bw.connect(tight_server.url, branches=False)
    backend = bw.connect(tight_server.url)
    assert isinstance(backend, BranchBackend)
    expected, _ = program.run(backend=whole, temperature=0).ret_value
    found, cached = program.run(backend=backend, temperature=0).ret_value
    assert found == expected and cached > 20
    assert [one["who"] for one in program.run_batch([{}] * 3, backend=backend, temperature=0)] == [expected] * 3

    def kill_once_it_generates() -> None:
        with httpx.Client(base_url=tight_server.url, timeout=240) as http:
            while http.get("/server_info").json()["stats"]["running"] < 3:
                time.sleep(0.02)
        tight_server.process.kill()

    @bw.function
    def interrupted(s):
        s += "Once upon a time"
        forks = s.fork(3)
        forks += bw.gen("a", max_tokens=2000, ignore_eos=True)  # is cut off; the KV cache has room for all three
        threading.Thread(target=kill_once_it_generates).start()
        return forks["a"]

    with pytest.raises(bw.ProgramError, match=f"'a' failed.*the connection to {tight_server.url} failed") as caught:
        interrupted.run(backend=backend)
    file, _, number = caught.value.site.rpartition(":")
    assert file == __file__ and "is cut off" in Path(file).read_text().splitlines()[int(number) - 1]


@bw.function
def asked(s, sampling):
    s += bw.user("Who is Mira?") + bw.assistant(bw.gen("a", max_tokens=30, **sampling))


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"stop": "ker of"},
        {"stop": ["zzz", " of", "baker"]},
        {"stop_token_ids": [223]},
        {"ignore_eos": True},
        {"logprobs": 2, "return_text_in_logprobs": True},
        {"regex": "[a-z]+"},
    ],
    ids=str,
)
def test_what_there_is_to_know_is_the_same_whole_or_streamed_here_or_there(
    server: Any, engine: Any, sampling: dict[str, Any]
) -> None:
    said, known = [], []
    for where in (engine, bw.connect(server.url, KEY, branches=False), bw.connect(server.url, KEY)):
        for stream in (False, True):
            state = asked.run(sampling, backend=where, temperature=0, stream=stream)
            said.append((state["a"], state.text() if not stream else "".join(state.text_iter())))
            meta = state.meta("a")
            known.append({name: meta[name] for name in ("finish_reason", "prompt_tokens", "completion_tokens")})
            for name in ("output_token_logprobs", "output_top_logprobs"):
                rows = [row if name.startswith("output_token") else row[0] for row in meta.get(name, ())]
                known[-1][name] = [(id, text) for _, id, text in rows]
    assert all(one == said[0] for one in said)
    assert all(one == known[0] for one in known)
    assert bool(known[0]["output_top_logprobs"]) == ("logprobs" in sampling)


def test_a_select_after_a_stop_string_that_cut_a_token(backend: ServerBackend, engine: Any) -> None:
    """The branch ends in text without tokens: the choices' own tokens are scored, and nothing before them."""

    @bw.function
    def program(s):
        s += bw.user("Who is Mira?")
        s += bw.assistant(bw.gen("cut", max_tokens=30, stop="ker of") + bw.select("best", ["ker", "r", "ker of it"]))

    here, there = program.run(temperature=0), program.run(backend=backend, temperature=0)
    assert here["cut"] == there["cut"] == "Mira is the ba" and here["best"] == there["best"]
    rows = [state.meta("best")["input_token_logprobs"] for state in (here, there)]
    assert [[id for _, id, _ in row] for row in rows[0]] == [[id for _, id, _ in row] for row in rows[1]]


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@bw.function
def constrained(s):
    s += bw.user("How old is Hanno?")
    s += bw.assistant(bw.gen("regex", max_tokens=20, regex="[a-f]{3} [0-9]{2}") + bw.gen("json", json_schema=SCHEMA))
    s += bw.user("And?") + bw.assistant(bw.gen("int", max_tokens=3, dtype=int) + bw.gen("bool", dtype=bool))
    s += bw.gen("float", max_tokens=4, dtype=float) + bw.gen("choice", choices=[" yes", " no"])


def test_what_constrains_decoding_does_so_everywhere(backend: ServerBackend, engine: Any) -> None:
    here, there = constrained.run(temperature=0), constrained.run(backend=backend, temperature=0)
    for state in (here, there):
        assert re.fullmatch("[a-f]{3} [0-9]{2}", state["regex"])
        assert isinstance(json.loads(state["json"])["age"], int)
        assert [type(state[name]) for name in ("int", "bool", "float")] == [int, bool, float]
        assert state["choice"] in (" yes", " no")
    names = ("regex", "json", "int", "bool", "float", "choice")
    assert [here[name] for name in names] == [there[name] for name in names]


@pytest.mark.parametrize("where", ["engine", "stateless", "branches"])
@pytest.mark.parametrize(
    "constraint",
    [{"json_schema": {"type": "nonsense"}}, {"json_schema": {"$ref": "#/nowhere"}}, {"regex": "(unclosed"}],
    ids=str,
)
def test_what_cannot_be_compiled_is_an_error_at_the_line(
    server: Any, engine: Any, where: str, constraint: dict[str, Any]
) -> None:
    backend = engine if where == "engine" else bw.connect(server.url, KEY, branches=where == "branches")

    @bw.function
    def program(s):
        s += "x"
        s += bw.gen("a", max_tokens=5, **constraint)  # is not to be compiled

    with pytest.raises(bw.ProgramError, match=r"'a' failed on .*cannot be enforced") as caught:
        program.run(backend=backend)
    file, _, number = caught.value.site.rpartition(":")
    assert "is not to be compiled" in Path(file).read_text().splitlines()[int(number) - 1]


def test_more_branches_than_one_request_may_make(server: Any) -> None:
    @bw.function
    def program(s):
        s += bw.system("You are a helpful assistant.")
        forks = s.fork(1500)
        for i, name in ((0, "Mira"), (1100, "Tobin"), (1499, "Sol")):
            forks[i] += bw.user(f"Who is {name}?") + bw.assistant(bw.gen("who", max_tokens=4))
        return [forks[i]["who"].split()[0] for i in (0, 1100, 1499)]

    backend = bw.connect(server.url, KEY, branches=True)
    assert program.run(backend=backend, temperature=0).ret_value == ["Mira", "Tobin", "Sol"]
    assert _counts(backend)["branches"] == 0


def test_connections_of_a_backend_nobody_has_are_closed(server: Any, caplog: pytest.LogCaptureFixture) -> None:
    @bw.function
    def program(s):
        s += "x" + bw.gen("a", max_tokens=1)

    gc.collect()  # what earlier tests have left may say something
    caplog.clear()
    for _ in range(3):
        program.run(backend=bw.connect(server.url, KEY))
    gc.collect()
    time.sleep(0.1)
    gc.collect()
    assert not caplog.records


def test_without_room_for_branches_prompts_are_sent_whole(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = bw.connect(server.url, KEY, branches=True)
    expected = outcome(everything.run(backend=backend, **OPTIONS))
    post = type(backend.http).post

    async def full(self: Any, path: str, body: Any, **more: Any) -> Any:
        if path == "/branches" or path.endswith("/fork"):
            raise BackendError("too many branches", status=429)
        return await post(self, path, body, **more)

    monkeypatch.setattr(type(backend.http), "post", full)
    assert outcome(everything.run(backend=backend, **OPTIONS)) == expected


def test_errors_are_in_the_servers_words(backend: ServerBackend) -> None:
    @bw.function
    def program(s):
        s += "x" + bw.gen("a", max_tokens=100_000)

    with pytest.raises(bw.ProgramError, match=r"'a' failed on http://127.*max_new_tokens 100000") as caught:
        program.run(backend=backend)
    assert caught.value.__cause__.status == 400


def test_what_a_server_does_not_know_is_an_error_not_dropped(backend: ServerBackend) -> None:
    @bw.function
    def program(s):
        s += "x" + bw.gen("a", stop_regex="[0-9]")

    with pytest.raises(bw.ProgramError, match=r"http://127.*stop_regex"):
        program.run(backend=backend)


def test_nobody_there_and_a_wrong_key(unused_port: int, server: Any) -> None:
    with pytest.raises(bw.BackendError, match="no server answers"):
        bw.connect(f"http://127.0.0.1:{unused_port}")
    with pytest.raises(bw.BackendError, match=r"refused this key: give another with api_key= or BRANCHWISE_API_KEY"):
        bw.connect(server.url, "wrong")


def test_the_tokenizer_is_the_servers_fetched_once(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client on another machine has nothing of the model's: everything comes over HTTP, also for many at once."""
    asked = []
    get = AsyncClient.get

    async def counted(self: Any, path: str) -> Any:
        asked.append(path)
        return await get(self, path)

    monkeypatch.setattr(AsyncClient, "get", counted)
    monkeypatch.setattr("branchwise.runtime.tokenizer.tokenizer.Tokenizer.load", None)
    backend = bw.RuntimeEndpoint(f"{server.url}/", KEY)
    assert everything.run(backend=backend, **OPTIONS)["choice"] in ("yes", "no")
    assert len(everything.run_batch([{}] * 4, backend=backend, **OPTIONS)) == 4
    assert asked == ["/tokenizer"]
    with pytest.raises(ValueError, match="leave them out"):
        bw.RuntimeEndpoint(server.url, KEY, chat_template_name="llama-2")


def test_the_tokenizer_requires_the_key(server: Any) -> None:
    with pytest.raises(BackendError, match="requires an API key"):
        Client(server.url).get("/tokenizer")


def test_server_info(server: Any) -> None:
    assert bw.get_server_info(bw.connect(server.url, KEY))["model"] == "branchwise"
