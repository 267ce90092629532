"""Compilations are shared, dropped when nobody waits for them, fair between owners, and behind running matchers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.constraint import Constraint, ConstraintError
from branchwise.runtime.errors import Overloaded
from branchwise.runtime.grammar.compiler import GrammarCompiler
from branchwise.runtime.grammar.matcher import Matcher
from branchwise.runtime.scheduler import constraints
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


def large(i: int) -> Constraint:
    """A schema of 62 kB that takes about 0.2 s to compile; another one for each ``i``."""
    properties = {f"key_{i}_{j}": {"type": "string", "pattern": f"^(a|b|c{j:04d}){{1,4}}$"} for j in range(930)}
    text = json.dumps({"type": "object", "properties": properties})
    assert 60_000 < len(text) < 66_000
    return Constraint("json_schema", text)


@pytest.fixture
def compiler(checkpoint: Callable[[str], Path]) -> Iterator[GrammarCompiler]:
    tokenizer = Tokenizer.load(checkpoint("llama-gqa"))
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size, (1,))
    yield compiler
    compiler.close()


@pytest.fixture
def gate(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No compilation ends before this is set."""
    gate, compile_now = threading.Event(), compiler.backend().compile
    monkeypatch.setattr(compiler.backend(), "compile", lambda constraint: gate.wait(200) and compile_now(constraint))
    return gate


def busy(compiler: GrammarCompiler) -> list[Future[Any]]:
    """Every thread compiles something."""
    futures = [compiler.compile(Constraint("regex", f"busy{i}")) for i in range(compiler._pool._max_workers)]
    while not all(future.running() for future in futures):
        time.sleep(0.001)
    return futures


@pytest.mark.parametrize("abandoned", [True, False])
def test_two_hundred_large_schemas_do_not_delay_another_owner(
    compiler: GrammarCompiler, gate: threading.Event, abandoned: bool
) -> None:
    schemas, threads = [large(i) for i in range(200)], compiler._pool._max_workers
    futures = [compiler.compile(schema, owner="crowd") for schema in schemas]
    while not all(future.running() for future in futures[:threads]):
        time.sleep(0.001)
    if abandoned:
        for schema in schemas:
            compiler.release(schema)
    dropped = sum(future.cancelled() for future in futures)
    assert dropped == (200 - threads if abandoned else 0)
    other = compiler.compile(Constraint("regex", "[0-9]{4}"), owner="other")
    compiled: SimpleQueue[int] = SimpleQueue()  # by then; callbacks come a moment after the result
    other.add_done_callback(lambda _: compiled.put(compiler.compiled))
    gate.set()
    assert compiled.get(timeout=200) <= 2 * threads + 2 and other.result()
    if abandoned:
        assert len(compiler._compiling) <= threads and not compiler._queue._owners


def test_the_tokenizer_is_prepared_once_whoever_comes_first(compiler: GrammarCompiler) -> None:
    assert [compiler.prepare() for _ in range(4)] == [True, True, False, False]  # loaded, then prepared
    other = GrammarCompiler(compiler._load_tokenizer, compiler._vocab_size, (1,))
    other.compile(Constraint("regex", "a")).result(600)
    assert not other.prepare()
    assert other.backend().mask_words == other.mask_words
    other.close()


def test_owners_take_turns(compiler: GrammarCompiler, gate: threading.Event) -> None:
    busy(compiler)
    ends: SimpleQueue[str] = SimpleQueue()
    for owner, count in (("a", 6), ("b", 2), ("c", 1)):
        for i in range(count):
            future = compiler.compile(Constraint("regex", f"{owner}{i}"), owner=owner)
            future.add_done_callback(lambda _, name=f"{owner}{i}": ends.put(name))
    compiler.compile(Constraint("regex", "a5"), owner="c")  # waits in either's queue, and is compiled once
    gate.set()
    order = [ends.get(timeout=200) for _ in range(9)]
    if compiler._pool._max_workers == 1:
        assert order == ["a0", "b0", "c0", "a1", "b1", "a5", "a2", "a3", "a4"]
    assert sorted(order) == sorted(["a0", "a1", "a2", "a3", "a4", "a5", "b0", "b1", "c0"])


def test_a_compilation_is_dropped_when_its_last_waiter_leaves(compiler: GrammarCompiler, gate: threading.Event) -> None:
    running = busy(compiler)
    wanted = Constraint("regex", "wanted")
    future = compiler.compile(wanted, owner="a")
    assert compiler.compile(wanted, owner="b") is future
    compiler.release(wanted)
    assert not future.cancelled()
    compiler.release(wanted)
    assert future.cancelled()
    compiler.release(wanted)  # of one that is gone: nothing happens
    again = compiler.compile(wanted, owner="a")
    assert again is not future
    compiler.release(Constraint("regex", "busy0"))  # one that runs is finished, and cached
    gate.set()
    assert again.result(100) and running[0].result(100)
    assert compiler.compile(wanted) is again and compiler.compile(Constraint("regex", "busy0")) is running[0]
    assert not compiler._compiling and not compiler._queue._owners


def test_matchers_go_before_compilations(compiler: GrammarCompiler, gate: threading.Event) -> None:
    gate.set()
    matcher: Matcher = compiler.compile(Constraint("regex", "[ab]{9}")).result(100).matcher()
    gate.clear()
    running = busy(compiler)
    waiting = [compiler.compile(Constraint("regex", f"x{i}")) for i in range(50)]
    ends: SimpleQueue[int] = SimpleQueue()
    job = compiler.follow(
        partial(matcher.advance_and_compute_mask, int(compiler.backend()._tokenizer.tokenize_str("a")[0]))
    )
    job.add_done_callback(lambda _: ends.put(sum(future.done() for future in waiting)))
    gate.set()
    assert ends.get(timeout=200) <= len(running)
    assert matcher.error is None and not matcher.needs_mask


def test_a_refusal_is_cached_and_a_failure_ends_its_waiters(compiler: GrammarCompiler) -> None:
    bad = Constraint("regex", "[")
    refused = compiler.compile(bad)
    assert isinstance(refused.exception(100), ConstraintError)
    assert compiler.compile(bad) is refused


def test_requests_that_leave_drop_their_grammars(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(seed=21)
    compiler = engine._core._grammars
    gate, compile_now = threading.Event(), compiler.backend().compile
    monkeypatch.setattr(compiler.backend(), "compile", lambda constraint: gate.wait(200) and compile_now(constraint))
    running = busy(compiler)
    before = compiler.compiled
    seen: list[Any] = []
    requests = engine._requests([("x", SamplingParams(regex=f"leaves{i}[0-9]")) for i in range(20)])
    engine._thread.submit(requests, seen.append)
    while engine.stats().waiting < 20:
        time.sleep(0.01)
    assert len(compiler._compiling) == 20 + len(running)
    engine._thread.abort([id for request in requests for id in request.ids])
    while engine.stats().waiting:
        time.sleep(0.01)
    assert len(compiler._compiling) == len(running)
    monkeypatch.setattr(constraints, "COMPILE_SECONDS", 0.05)
    with pytest.raises(Overloaded, match=r"could not be compiled within .* try again later"):
        engine.generate("x", SamplingParams(regex="late[0-9]"))
    assert len(compiler._compiling) == len(running), "and it is not compiled for nobody"
    gate.set()
    for future in running:
        future.result(100)
    assert compiler.compiled == before + len(running)
