"""An interrupt at every place where CPython may raise it leaves no request running and no thread waiting."""

from __future__ import annotations

import contextlib
import dis
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.loading import load_null_engine

SHORT = SamplingParams(max_tokens=3, ignore_eos=True)
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)
CHECKED = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD")}  # look for signals


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    loaded = load_null_engine(EngineConfig(kv_cache_tokens=8192, max_model_len=2048), 0.0005)
    with Engine.from_core(loaded.core, loaded.tokenizer()) as engine:
        yield engine


def interrupt(call: Callable[[], Any], place: int) -> bool:
    """Calls, with a `KeyboardInterrupt` at the given place, counted from 0. Returns whether there were so many."""
    seen = -1

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        code, before = frame.f_code.co_code, -1

        def local(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal seen, before
            if event == "opcode":
                if before in CHECKED:
                    seen += 1
                    if seen == place:
                        sys.settrace(None)
                        raise KeyboardInterrupt
                before = code[frame.f_lasti]
            return local

        return local

    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            call()
    finally:
        sys.settrace(tracing)
    return seen >= place


def left(engine: Engine) -> dict[str, int]:
    """What still runs or waits, after a moment."""
    end = time.monotonic() + 60
    while True:
        stats, thread = engine.stats(), engine._thread
        found = {"running": stats.running, "waiting": stats.waiting, "sinks": len(thread._sinks)}
        if not any(found.values()) or time.monotonic() > end:
            return found
        time.sleep(0.001)


def begin_a_stream(engine: Engine) -> None:
    for _ in engine.stream("hello", LONG):
        break


CALLS: dict[str, Callable[[Engine], Any]] = {
    "generate": lambda engine: engine.generate("hello", SHORT),
    "several": lambda engine: engine.generate(["a", "b"], SHORT),
    "stream": lambda engine: list(engine.stream("hello", SHORT)),
    "a stream that is left": begin_a_stream,
    "score": lambda engine: engine.score("hello", ["a", "b"]),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # interrupts in a generator's `close`
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_anywhere_leaves_nothing_running(engine: Engine, call: str) -> None:
    place = 0
    while interrupt(lambda: CALLS[call](engine), place):
        assert not any((found := left(engine)).values()), (place, found)
        place += 1
    assert place > 100
    engine.flush_cache()  # ends branches whose deletion was interrupted; otherwise they expire
    engine.check()


def test_an_interrupt_while_the_engine_computes(engine: Engine) -> None:
    """Most of the time a caller waits in a queue's `get`: that is a call into C, which a signal ends."""
    for place in (400, 1000, 3000):
        assert interrupt(lambda: engine.generate("hello", LONG), place)
        assert not any(left(engine).values())
