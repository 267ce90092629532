"""Answers that nobody reads along: told in large pieces, and the same in sum."""

from __future__ import annotations

import random

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from branchwise.runtime.messages import CacheReport, Delta, Finished, LogprobRows, RequestStarted, StepOutput
from branchwise.runtime.outputs import Output
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.tokenizer.detokenizer import BATCH_TOKENS, DetokenizerCore
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


def tokenizer() -> Tokenizer:
    backend = Backend(models.BPE({letter: i for i, letter in enumerate("abcdÃ¤")}, []))
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


TOKENIZER = tokenizer()


def row(logprob: float) -> LogprobRows:
    return LogprobRows(0, np.array([logprob], np.float32).tobytes(), b"\1\0\0\0", b"", b"")


def step(tokens: dict[int, int], **more: object) -> StepOutput:
    ids, values = np.array(list(tokens), np.int64), np.array(list(tokens.values()), np.int32)
    return StepOutput(ids=ids.tobytes(), tokens=values.tobytes(), **more)  # type: ignore[arg-type]


def open_(id: int, *, stream: bool = False, **params: object) -> RequestStarted:
    return RequestStarted(id, 3, b"", SamplingParams(**params), stream=stream)  # type: ignore[arg-type]


def test_the_first_token_at_once_then_nothing_until_the_end() -> None:
    core = DetokenizerCore(TOKENIZER)
    report = CacheReport(2, "hit")
    first, _ = core.feed(step({1: 0}, started=[open_(1)], cache={1: report}))
    assert [(delta.text, delta.cache) for delta in first] == [("a", report)]
    for token in (1, 2):
        assert core.feed(step({1: token})) == ([], [])
    finished = Finished(1, "length", 3, 4)
    ((last,), _) = core.feed(step({1: 3}, finished=[finished]))
    assert (last.text, last.tokens, last.finish) == ("bcd", np.array([1, 2, 3], "<i4").tobytes(), finished)
    assert len(core) == 0


def test_what_is_held_is_bounded() -> None:
    core = DetokenizerCore(TOKENIZER)
    core.feed(step({1: 0}, started=[open_(1)]))
    pieces = [delta for _ in range(5 * BATCH_TOKENS) for delta in core.feed(step({1: 1}))[0]]
    assert [len(delta.tokens) // 4 for delta in pieces] == [BATCH_TOKENS] * 5


def test_an_aborted_answer_loses_nothing() -> None:
    core = DetokenizerCore(TOKENIZER)
    for token, opening in ((0, [open_(1)]), (1, []), (2, [])):
        core.feed(step({1: token}, started=opening))
    ((last,), _) = core.feed(StepOutput(finished=[Finished(1, "abort", 3, 3)]))
    assert (last.text, last.finish and last.finish.reason) == ("bc", "abort")


def test_a_stop_string_ends_it_at_once() -> None:
    core = DetokenizerCore(TOKENIZER)
    core.feed(step({1: 0}, started=[open_(1, stop=("cd",))]))
    core.feed(step({1: 1}))
    assert core.feed(step({1: 2})) == ([], [])
    (last,), stopped = core.feed(step({1: 3}))
    assert (last.text, last.matched_stop, stopped) == ("b", "cd", [1])
    assert last.finish is not None and last.finish.completion_tokens == 4
    assert core.feed(StepOutput(finished=[Finished(1, "abort", 3, 4)])) == ([], [])
    assert len(core) == 0


def test_whole_and_streamed_answers_are_equal() -> None:
    """Random requests with stop strings, logprobs and halves of characters, each once streamed and once whole."""
    for seed in range(300):
        rng = random.Random(seed)
        scripts = [[rng.randrange(6) for _ in range(rng.randrange(1, 300 if seed < 5 else 12))] for _ in range(4)]
        stops = [tuple(rng.choices(["ab", "ä", "dd", "cab"], k=rng.randrange(3))) for _ in scripts]
        reasons = [rng.choice(["length", "abort", "stop"]) for _ in scripts]
        answers = [fold(scripts, stops, reasons, stream=stream) for stream in (True, False)]
        for (streamed, many), (at_once, few) in zip(*answers, strict=True):
            assert streamed == at_once
            assert few <= min(many, 2 + len(streamed.token_ids) // BATCH_TOKENS)


def fold(
    scripts: list[list[int]], stops: list[tuple[str, ...]], reasons: list[str], *, stream: bool
) -> list[tuple[Output, int]]:
    """What has come of each request, and in how many deltas."""
    core = DetokenizerCore(TOKENIZER)
    deltas: list[Delta] = []
    for now in range(max(map(len, scripts)) + 1):
        tokens = {id: script[now] for id, script in enumerate(scripts) if now < len(script)}
        rows = {id: row(-now) for id in tokens if id % 2}
        opening = [open_(id, stream=stream, stop=stops[id], logprobs=0) for id in tokens] if now == 0 else []
        ended = [id for id, script in enumerate(scripts) if now == len(script) - (reasons[id] != "abort")]
        finished = [
            Finished(id, reasons[id], 3, len(scripts[id]), matched=scripts[id][-1] if reasons[id] == "stop" else None)  # type: ignore[arg-type]
            for id in ended
        ]
        deltas += core.feed(step(tokens, started=opening, logprobs=rows, finished=finished))[0]
    assert len(core) == 0
    outputs = [Output() for _ in scripts]
    for delta in deltas:
        outputs[delta.id].feed(delta)
    return [(output, sum(delta.id == id for delta in deltas)) for id, output in enumerate(outputs)]
