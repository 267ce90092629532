"""Tokens a grammar leaves no choice about: the same tokens as drawn one by one, in fewer forward passes."""

from __future__ import annotations

import json

import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.constraint import Constraint
from branchwise.runtime.grammar import matcher
from branchwise.runtime.grammar.llg import GrammarBackend

PROMPT = "Compute every shared prefix once"
REPORT = {
    "type": "object",
    "properties": {
        "description_of_the_problem": {"type": "string", "maxLength": 4},
        "number_of_occurrences": {"type": "integer", "minimum": 1, "maximum": 99},
        "severity_of_the_problem": {"enum": ["negligible_severity", "intolerable_severity"]},
    },
    "required": ["description_of_the_problem", "number_of_occurrences", "severity_of_the_problem"],
    "additionalProperties": False,
}
LONG = "the only thing that may be said, however long it takes to say it"
CONSTRAINTS = [
    {"json_schema": REPORT},
    {"regex": r"number [0-9]{2}, then a long stretch without any choice, then [a-c]{3} and the end"},
    {"choices": (LONG,)},
    {"ebnf": 'start: "alpha beta gamma delta " ("one two three" | "four five six") " epsilon zeta eta"'},
    {},
]


def asked(**more):
    common = {"max_tokens": 150, "temperature": 1.0, **more}
    return [SamplingParams(**{"seed": i, **common, **constraint}) for i, constraint in enumerate(CONSTRAINTS)]


def answers(engine, params):
    return engine.generate([f"{PROMPT} {i}" for i in range(len(params))], params)


def tokens(outputs):
    return [output.token_ids for output in outputs]


def saved(outputs):
    return [output.outputs[0].finish.jumped_tokens for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("overlap", [False, True])
def test_the_same_tokens_in_fewer_passes(make_engine, overlap, page_size, temperature):
    plain = answers(make_engine(jump_forward=False), asked(temperature=temperature))
    engine = make_engine(overlap=overlap, page_size=page_size)
    jumped = answers(engine, asked(temperature=temperature))
    assert tokens(jumped) == tokens(plain)
    assert saved(plain) == [0] * len(CONSTRAINTS)
    assert all(count >= 5 for count in saved(jumped)[:-1]) and saved(jumped)[-1] == 0
    engine.check()
    json.loads(jumped[0].text)
    assert jumped[2].text == LONG


def test_every_token_saved_is_a_step_less(make_engine):
    engine = make_engine()
    for params in asked()[:-1]:
        before = engine.stats().steps
        output = engine.generate(PROMPT, params)
        [count] = saved([output])
        assert engine.stats().steps - before == len(output.token_ids) - count
    assert engine.stats().jumped_tokens >= 5


def test_a_limit_cuts_a_stretch_where_it_falls(make_engine):
    plain, engine = make_engine(jump_forward=False), make_engine()
    for limit in range(1, 30):
        params = SamplingParams(choices=(LONG,), max_tokens=limit, seed=1)
        found, expected = engine.generate(PROMPT, params), plain.generate(PROMPT, params)
        assert found.token_ids == expected.token_ids
        assert found.finish_reason == expected.finish_reason
        assert found.text == expected.text


def test_stops_within_a_stretch(make_engine):
    plain, engine = make_engine(jump_forward=False), make_engine()
    whole = plain.generate(PROMPT, SamplingParams(choices=(LONG,), max_tokens=60))
    for token in set(whole.token_ids[3:12]):
        params = SamplingParams(choices=(LONG,), max_tokens=60, stop_token_ids=(token,))
        found, expected = engine.generate(PROMPT, params), plain.generate(PROMPT, params)
        assert found.token_ids == expected.token_ids and found.finish_reason == "stop"
        assert found.outputs[0].matched == token
    for stop in ("may be", "er long", "e"):
        params = SamplingParams(choices=(LONG,), max_tokens=60, stop=(stop,))
        found, expected = engine.generate(PROMPT, params), plain.generate(PROMPT, params)
        assert found.text == expected.text == LONG[: LONG.index(stop)]
        assert found.token_ids == expected.token_ids and found.outputs[0].matched == stop


def test_who_wants_something_of_every_token_gets_every_pass(make_engine):
    plain, engine = make_engine(jump_forward=False), make_engine()
    for more in ({"logprobs": 2}, {"repetition_penalty": 1.3}, {"frequency_penalty": 0.5}):
        found, expected = answers(engine, asked(**more)), answers(plain, asked(**more))
        assert tokens(found) == tokens(expected)
        assert saved(found) == [0] * len(CONSTRAINTS)
        for output in found:
            assert "logprobs" not in more or len(output.logprobs) == len(output.token_ids)


def test_minimum_lengths_and_ignored_ends_hold(make_engine):
    plain, engine = make_engine(jump_forward=False), make_engine()
    for more in ({"min_tokens": 40}, {"ignore_eos": True}, {"min_tokens": 10, "ignore_eos": True}):
        assert tokens(answers(engine, asked(**more))) == tokens(answers(plain, asked(**more)))


def test_a_stream_has_the_same_text(make_engine):
    engine = make_engine()
    for params in asked():
        whole = engine.generate(PROMPT, params)
        assert "".join(chunk.text for chunk in engine.stream(PROMPT, params)) == whole.text


@pytest.mark.parametrize("overlap", [False, True])
def test_slow_grammars_jump_too(make_engine, monkeypatch, overlap):
    expected = tokens(answers(make_engine(jump_forward=False), asked()))
    monkeypatch.setattr(matcher, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(matcher, "FAST_SECONDS", 0.0)
    engine = make_engine(overlap=overlap, seed=11)  # an engine that has compiled nothing
    outputs = answers(engine, asked())
    assert tokens(outputs) == expected
    assert all(count >= 5 for count in saved(outputs)[:-1])
    engine.check()


@pytest.mark.parametrize("overlap", [False, True])
def test_jumps_survive_retraction(checkpoint, make_engine, overlap):
    params = [SamplingParams(json_schema=REPORT, max_tokens=150, seed=i) for i in range(12)]
    expected = tokens(answers(make_engine(jump_forward=False), params))
    with Engine(checkpoint("llama-gqa"), max_num_seqs=12, kv_cache_tokens=320, page_size=4, overlap=overlap) as engine:
        engine._core.scheduler.planner.estimator.fraction = 0.1  # too many are admitted
        outputs = answers(engine, params)
        assert tokens(outputs) == expected
        assert sum(output.outputs[0].finish.retractions for output in outputs) > 0, "the pool was meant to be too small"
        assert all(count >= 5 for count in saved(outputs))
        engine.check()


def test_what_was_jumped_over_is_cached_like_the_rest(make_engine):
    engine = make_engine()
    params = SamplingParams(json_schema=REPORT, max_tokens=150, seed=3)
    output = engine.generate(PROMPT, params)
    assert saved([output])[0] >= 5
    prompt = [*engine.tokenizer.encode(PROMPT).tolist(), *output.token_ids, 5]
    again = engine.generate(prompt, SamplingParams(max_tokens=1))
    assert again.cached_tokens >= len(prompt) - 4  # but for what ended it


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_draw_what_each_draws_alone(make_engine, overlap):
    """So many that their masks are filled together."""
    params = [params for seed in range(4) for params in asked(seed=seed)]
    outputs = answers(make_engine(overlap=overlap), params)
    plain = make_engine(jump_forward=False)
    for i, (param, output) in enumerate(zip(params, outputs, strict=True)):
        assert output.token_ids == plain.generate(f"{PROMPT} {i}", param).token_ids


def test_a_long_stretch_is_taken_in_piece_by_piece(make_engine, monkeypatch):
    """The engine's thread takes tokens in, and everybody's next step waits for it."""
    pieces = []
    jump = matcher.Matcher.jump

    def counted(self, most, but):
        taken = jump(self, most, but)
        pieces.append(len(taken))
        return taken

    monkeypatch.setattr(matcher.Matcher, "jump", counted)
    text = "abcdefghij" * 40
    engine = make_engine()
    output = engine.generate(PROMPT, SamplingParams(choices=(text,), max_tokens=450))
    assert output.text == text
    assert max(pieces) <= matcher.MAX_JUMP < len(output.token_ids)
    assert saved([output])[0] >= len(output.token_ids) - len(pieces) - 1
    engine.check()


def test_a_long_stretch_does_not_make_its_grammar_slow(make_engine):
    """What it costs is counted for each token, not for all that came at once."""
    engine = make_engine()
    compiler = engine._core._grammars
    constraint = Constraint("json_schema", json.dumps({"const": "lorem ipsum dolor " * 40}))
    walk = compiler.compile(constraint).result().matcher()
    walk.compute_mask()
    monotone = iter(range(10_000))
    walk.grammar._cost = walk._unrecorded_seconds = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matcher.time, "thread_time", lambda: next(monotone) * matcher.SLOW_SECONDS / 4)
        assert len(walk.jump(100, frozenset())) == 100
        walk.forced = []
        walk.compute_mask()
    assert not walk.grammar.slow


def test_where_there_is_no_choice_nobody_asks_for_a_mask(make_engine, monkeypatch):
    fills = []
    fill = GrammarBackend.fill_mask
    monkeypatch.setattr(GrammarBackend, "fill_mask", lambda self, *given: (fills.append(1), fill(self, *given)))
    engine = make_engine(jump_forward=False)
    text = "the one thing " * 20
    output = engine.generate(PROMPT, SamplingParams(choices=(text,), max_tokens=300))
    assert output.text == text
    assert len(fills) < len(output.token_ids) / 4


def test_a_slow_grammar_is_not_asked_on_the_engines_thread(make_engine):
    engine = make_engine()
    constraint = Constraint("regex", r"one stretch [ab] another stretch [ab] the end")
    walk = engine._core._grammars.compile(constraint).result().matcher()
    walk.compute_mask()
    walk.grammar.slow = True
    taken = walk.jump(100, frozenset())
    assert taken and walk.needs_mask, "what may follow the stretch is for a thread to find out"
