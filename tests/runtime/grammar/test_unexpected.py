"""What llguidance was never meant to do ends the request that made it do so, and no other."""

from __future__ import annotations

import queue
import threading

import pytest

from branchwise import SamplingParams
from branchwise.runtime.grammar import matcher

PROMPT = "Once upon a time"


class Panic(BaseException):
    """What pyo3 makes of a panic of Rust's: not an `Exception`."""


def end_beside_another(engine, params):
    """How a request ends, while another runs that must not notice."""
    answers, ends = [], queue.SimpleQueue()
    free = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0)
    other = threading.Thread(target=lambda: answers.append(engine.generate(PROMPT, free)))
    other.start()
    engine._thread.submit(engine._requests([(PROMPT, params)]), ends.put)
    while (finish := ends.get(timeout=100).finish) is None:
        pass
    other.join(100)
    assert [len(answer.outputs[0].token_ids) for answer in answers] == [150]
    assert engine.stats().running == engine.stats().waiting == 0
    return finish


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_a_compiler_that_breaks_refuses_one_request(make_engine, monkeypatch, error):
    engine = make_engine()

    def breaks(constraint):
        raise error("unreachable code was reached")

    monkeypatch.setattr(engine._core._grammars.backend(), "compile", breaks)
    finish = end_beside_another(engine, SamplingParams(regex=f"breaks with {error.__name__}"))
    assert (finish.reason, finish.error.status, finish.error.path) == ("error", 500, "regex")
    assert finish.error.problem == "could not be compiled: the compiler failed"


@pytest.mark.parametrize("error", [RuntimeError, Panic])
def test_a_matcher_that_breaks_in_its_thread_ends_one_request(make_engine, monkeypatch, error):
    engine = make_engine()
    monkeypatch.setattr(matcher, "SLOW_SECONDS", -1.0)  # every grammar is followed in a thread
    monkeypatch.setattr(matcher, "FAST_SECONDS", -2.0)

    def breaks(self, token):
        raise error("unreachable code was reached")

    monkeypatch.setattr(matcher.Matcher, "advance_and_compute_mask", breaks)
    finish = end_beside_another(engine, SamplingParams(regex=f"[a-z]{{20}} {error.__name__}", max_tokens=60))
    assert (finish.reason, finish.error.status, finish.error.path) == ("error", 500, "regex")
    assert finish.error.problem == "could not be enforced: the matcher failed"
