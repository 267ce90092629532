"""Constrained decoding in the engine, with a model of random weights: it has no habits that hide a wrong mask."""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter

import jsonschema
import pytest

from branchwise import Engine, SamplingParams
from branchwise.runtime.errors import InvalidRequest, Overloaded
from branchwise.runtime.grammar import matcher
from branchwise.runtime.scheduler import constraints

PROMPT = "Compute every shared prefix once"
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
REGEXES = [r"[0-9]{3}-[a-c]+x", "(yes|no|maybe)", r"\d{4}-\d{2}-\d{2}", "[a-z]{2,5}( [a-z]{2,5}){0,3}!", "é+ö{2}"]
LARK = 'start: "<" NAME ">" (start | "-") "</>"\nNAME: /[a-z]{1,3}/'
EBNF = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9] [0-9]?'


def valid(schema, text):
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


def mixed(temperature=1.0, **more):
    """Constrained and free requests side by side."""
    common = {"max_tokens": 24, "temperature": temperature, **more}
    constraints = [{}, {"regex": REGEXES[0]}, {"json_schema": CITY}, {}, {"choices": ("yes", "no")}, {"ebnf": EBNF}]
    return [SamplingParams(seed=i, **common, **constraint) for i, constraint in enumerate(constraints)]


def tokens(engine, params):
    return [output.token_ids for output in engine.generate([f"{PROMPT} {i}" for i in range(len(params))], params)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("overlap", [False, True])
def test_every_answer_that_ends_satisfies_its_generated_schema(make_engine, generated, overlap, temperature):
    engine = make_engine(overlap=overlap)
    schemas = generated.schemas(300 if overlap else 60, seed=int(overlap))
    params = [
        SamplingParams(json_schema=schema, temperature=temperature, seed=i, max_tokens=120)
        for i, schema in enumerate(schemas)
    ]
    outputs = engine.generate([PROMPT] * len(params), params)
    ends = Counter(output.finish_reason for output in outputs)
    assert ends["stop"] >= 0.8 * len(schemas) and ends["stop"] + ends["length"] == len(schemas), ends
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            valid(schema, output.text)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_regex_is_matched_whole_and_a_choice_is_one_of_them(make_engine, temperature):
    engine = make_engine()
    for regex in REGEXES:
        params = SamplingParams(regex=regex, temperature=temperature, seed=5, max_tokens=150, n=4)
        for output in engine.generate(PROMPT, params).outputs:
            if output.finish_reason == "stop":
                assert re.fullmatch(regex, output.text)
            else:
                assert regex.count("+")
    choices = ("yes", "no", "nobody", "größer", 'a "b"\n')
    params = SamplingParams(choices=choices, temperature=temperature, seed=1, n=8)
    outputs = engine.generate(PROMPT, params).outputs
    assert {output.finish_reason for output in outputs} == {"stop"}
    assert {output.text for output in outputs} <= set(choices)
    assert len({output.text for output in outputs}) == 1 or temperature > 0


def test_grammars_in_both_notations(make_engine):
    engine = make_engine()
    lark = engine.generate(PROMPT, SamplingParams(ebnf=LARK, seed=2, n=16, max_tokens=120)).outputs
    assert all(re.fullmatch(r"(<[a-z]{1,3}>)+-(</>)+", o.text) for o in lark if o.finish_reason == "stop")
    assert all(o.text.count("</>") * 2 == o.text.count("<") for o in lark if o.finish_reason == "stop")
    ebnf = engine.generate(PROMPT, SamplingParams(ebnf=EBNF, seed=2, n=16, max_tokens=120)).outputs
    assert all(re.fullmatch(r"\[\d\d?(,\d\d?)*\]", o.text) for o in ebnf if o.finish_reason == "stop")
    assert "stop" in {o.finish_reason for o in lark} and "stop" in {o.finish_reason for o in ebnf}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overlap_changes_no_token_and_free_rows_do_not_notice_their_neighbours(make_engine, temperature):
    plain, overlapped = make_engine(overlap=False), make_engine(overlap=True)
    params = mixed(temperature, repetition_penalty=1.1, ignore_eos=False)
    together = tokens(plain, params)
    assert tokens(overlapped, params) == together
    for i, param in enumerate(params):
        alone = plain.generate(f"{PROMPT} {i}", param)
        assert alone.token_ids == together[i]


def test_slow_grammars_run_in_threads_and_draw_the_same_tokens(make_engine, monkeypatch):
    expected = tokens(make_engine(overlap=False), mixed())
    monkeypatch.setattr(matcher, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(matcher, "FAST_SECONDS", 0.0)
    seen = []
    advance = constraints.ConstraintManager.advance
    monkeypatch.setattr(
        constraints.ConstraintManager,
        "advance",
        lambda self, *a, **k: seen.append(r := advance(self, *a, **k)) or r,
    )
    for overlap in (False, True):
        engine = make_engine(overlap=overlap, seed=7)  # an engine that has compiled nothing
        assert tokens(engine, mixed()) == expected
    assert seen.count(False) > 50


def test_a_grammar_that_turns_slow_leaves_the_engines_thread_within_two_steps(make_engine, monkeypatch):
    params = SamplingParams(regex="[a-z]{240}", seed=4, max_tokens=240)
    expected = make_engine(overlap=False).generate(PROMPT, params).token_ids
    calls, followed = [], []
    advance = constraints.ConstraintManager.advance

    def record_cost(self, seconds):
        calls.append(seconds)
        self.slow = len(calls) > 10

    def noted(self, request, token, *, mask_needed):
        followed.append(advance(self, request, token, mask_needed=mask_needed))
        return followed[-1]

    monkeypatch.setattr(matcher.Grammar, "record_cost", record_cost)
    monkeypatch.setattr(constraints.ConstraintManager, "advance", noted)
    assert make_engine(overlap=True).generate(PROMPT, params).token_ids == expected
    assert followed.count(False) > 30
    assert not any(followed[followed.index(False) :])


def test_a_retracted_request_resumes_where_it_stood(checkpoint):
    params = [SamplingParams(regex="[a-z ]{120}", seed=i, max_tokens=130) for i in range(6)]
    for overlap in (False, True):
        with Engine(checkpoint("llama-gqa"), kv_cache_tokens=8192) as roomy:
            expected = tokens(roomy, params)
        with Engine(checkpoint("llama-gqa"), kv_cache_tokens=320, overlap=overlap, check_when_idle=True) as tight:
            tight._core.scheduler.planner.estimator.fraction = 0.1  # too many are admitted
            assert tokens(tight, params) == expected
            assert tight.stats().retractions > 0


def test_samples_are_seeded_and_logprobs_are_of_the_raw_logits(make_engine):
    engine = make_engine()
    params = SamplingParams(regex="[0-9]{6}", seed=11, n=3, logprobs=4, max_tokens=20)
    first, again = engine.generate(PROMPT, params).outputs, engine.generate(PROMPT, params).outputs
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert len({o.text for o in first}) == 3
    free = engine.generate(PROMPT, SamplingParams(temperature=0, max_tokens=1, logprobs=4))
    for output in first:
        # Not to the bit: the sums of one row and of three may have different orders.
        assert dict(output.logprobs[0].top) == pytest.approx(dict(free.logprobs[0].top), abs=1e-4)
        assert all(row.logprob > -100 for row in output.logprobs)


def test_min_tokens_and_ignore_eos_hold_the_output_open_while_the_grammar_allows_it(make_engine):
    engine = make_engine()
    held = engine.generate(PROMPT, SamplingParams(regex="[ab]*", min_tokens=9, max_tokens=40, seed=3, n=8))
    assert all(len(o.token_ids) >= 9 for o in held.outputs)
    endless = engine.generate(PROMPT, SamplingParams(regex="[ab]*", ignore_eos=True, max_tokens=30, seed=3))
    assert endless.finish_reason == "length" and len(endless.token_ids) == 30
    complete = engine.generate(PROMPT, SamplingParams(regex="ab", min_tokens=20, ignore_eos=True, max_tokens=30))
    assert (complete.text, complete.finish_reason) == ("ab", "stop")
    short = engine.generate(PROMPT, SamplingParams(regex="[ab]{50}", max_tokens=3))
    assert short.finish_reason == "length" and len(short.token_ids) == 3
    stopped = engine.generate(PROMPT, SamplingParams(regex="[ab]{50}b", stop=("b",), max_tokens=80, seed=1))
    assert stopped.finish_reason == "stop" and set(stopped.text) <= {"a"}
    bias = engine.generate(PROMPT, SamplingParams(choices=("yes", "no"), logit_bias={30: 100.0}, temperature=0))
    assert bias.text in ("yes", "no")


def test_refusals_name_the_field_and_leave_the_engine_whole(make_engine):
    engine = make_engine()
    with pytest.raises(InvalidRequest, match="json_schema uses not") as caught:
        engine.generate(PROMPT, SamplingParams(json_schema={"not": {}}))
    assert (caught.value.path, caught.value.status) == ("json_schema", 400)
    regex = SamplingParams(regex="((a{1,100}){1,100}){1,100}", max_tokens=200, ignore_eos=True)
    complex = engine.generate(PROMPT, regex)  # found out while generating: what was sent is the beginning of a match
    assert complex.finish_reason == "length" and 0 < len(complex.token_ids) < 200 and set(complex.text) == {"a"}
    assert engine.generate(PROMPT, SamplingParams(choices=("fine",))).text == "fine"
    assert engine.stats().running == 0


def test_requests_wait_for_their_grammar_in_a_state_of_their_own(make_engine, monkeypatch):
    engine = make_engine()
    compiling, go = threading.Event(), threading.Event()
    compiler = engine._core._grammars
    compile_now = compiler.backend().compile

    def slowly(constraint):
        compiling.set()
        assert go.wait(200)
        return compile_now(constraint)

    monkeypatch.setattr(compiler.backend(), "compile", slowly)
    params = SamplingParams(regex="waits[0-9]", max_tokens=20)
    answers = []
    waiting = threading.Thread(target=lambda: answers.append(engine.generate(PROMPT, params)))
    waiting.start()
    assert compiling.wait(100)
    assert engine.generate(PROMPT, SamplingParams(max_tokens=5, ignore_eos=True)).finish_reason == "length"
    assert engine.stats().waiting == 1 and engine.stats().running == 0
    assert not answers
    go.set()
    waiting.join(100)
    assert re.fullmatch("waits[0-9]", answers[0].text)


def test_an_abort_while_compiling_and_a_compilation_that_takes_too_long(make_engine, monkeypatch):
    engine = make_engine()
    compiler = engine._core._grammars
    compile_now, go = compiler.backend().compile, threading.Event()
    monkeypatch.setattr(compiler.backend(), "compile", lambda c: go.wait(200) and compile_now(c))
    seen = []
    [request] = engine._requests([(PROMPT, SamplingParams(regex="aborted[0-9]"))])
    engine._thread.submit([request], seen.append)
    while engine.stats().waiting == 0:
        time.sleep(0.01)
    engine._thread.abort(request.ids)
    while not seen:  # a step later than the request has left
        time.sleep(0.01)
    assert [delta.finish.reason for delta in seen] == ["abort"] and not engine.stats().waiting
    monkeypatch.setattr(constraints, "COMPILE_SECONDS", 0.05)
    with pytest.raises(Overloaded, match="could not be compiled within"):
        engine.generate(PROMPT, SamplingParams(regex="late[0-9]"))
    go.set()


@pytest.mark.parametrize("overlap", [False, True])
def test_samples_that_are_put_off_come_later_and_are_the_same(make_engine, monkeypatch, overlap):
    """As where many outputs of a grammar become slow at once: all masks are computed in threads, no output is lost."""
    engine = make_engine(overlap=overlap, check_when_idle=True)
    params = SamplingParams(regex="[ab]{5}[0-9]{20}(x|y)*", max_tokens=40, n=6, seed=3)
    expected = [output.token_ids for output in engine.generate(PROMPT, params).outputs]
    monkeypatch.setattr("branchwise.runtime.grammar.matcher.SLOW_SECONDS", 0.0)
    monkeypatch.setattr("branchwise.runtime.grammar.matcher.FAST_SECONDS", 0.0)
    monkeypatch.setattr("branchwise.runtime.scheduler.constraints.STEP_SECONDS", -1.0)
    before = engine.stats().retractions
    again = engine.generate(PROMPT, SamplingParams(regex="[ab]{5}[0-9]{20}(x|y)*", max_tokens=40, n=6, seed=3))
    assert [output.token_ids for output in again.outputs] == expected
    assert {output.finish_reason for output in again.outputs} <= {"stop", "length"}
    assert engine.stats().retractions > before
