"""Branches of an in-process engine with a tiny model: the same tokens as stateless requests, and their cost."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from branchwise import AsyncEngine, Engine, SamplingParams
from branchwise.runtime.errors import EngineDead, InvalidRequest, LoadError

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEXT = "A tree of tokens grows a branch for every question that is asked of one document."


@pytest.fixture(scope="module", params=[1, 16], ids=["pages-of-1", "pages-of-16"])
def engine(request, checkpoint):
    with Engine(checkpoint("llama-gqa"), max_num_seqs=16, kv_cache_tokens=4096, page_size=request.param) as engine:
        yield engine
        assert engine.stats().branches == 0
        engine.check()


@pytest.fixture
def clean(engine):
    engine.flush_cache()
    return engine


def refused(call, status):
    with pytest.raises(InvalidRequest) as caught:
        call()
    assert caught.value.status == status
    return str(caught.value)


def test_forks_extensions_and_answers_are_those_of_stateless_requests(clean):
    with clean.branch(TEXT) as trunk:
        assert trunk.tokens == clean.tokenizer.encode(TEXT).tolist()
        first = trunk.generate(GREEDY)
        assert first.cached_tokens == 0
        assert trunk.tokens == clean.tokenizer.encode(TEXT).tolist() + first.token_ids
        known = len(trunk.tokens) - 1  # the last token drawn was never fed
        answers = []
        for i, child in enumerate(trunk.fork(3)):
            with child:
                child.extend(f"{i}: and then")
                prompt = child.tokens
                answer = child.generate(GREEDY, extend=[5 + i])
                assert answer.cached_tokens >= known if answers else answer.cached_tokens == known
                assert child.tokens == [*prompt, 5 + i, *answer.token_ids]
                assert child.info()["held_tokens"] == len(child.tokens) - 1
                answers.append(([*prompt, 5 + i], answer))
    for prompt, answer in answers:
        assert clean.generate(prompt, GREEDY).token_ids == answer.token_ids  # warm
    clean.flush_cache()
    for prompt, answer in answers:
        cold = clean.generate(prompt, GREEDY)
        assert cold.token_ids == answer.token_ids and cold.text == answer.text


def test_what_is_generated_stays_and_what_ends_it_does_not(clean):
    with clean.branch(TEXT) as trunk:
        whole = clean.generate(TEXT, GREEDY)
        (child,) = trunk.fork()
        cut = child.generate(GREEDY, extend=np.array([], np.int32))
        assert cut.token_ids == whole.token_ids and child.text.endswith(whole.text)
        child.close()
        stop = whole.text[5:8]
        with trunk.fork()[0] as child:
            cut = child.generate(SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,)))
            settled = cut.outputs[0].settled
            assert child.tokens == trunk.tokens + whole.token_ids[: settled.kept]
            assert child.info()["pending_text"] == settled.rest
            assert clean.tokenizer.decode(whole.token_ids[: settled.kept]) + settled.rest == cut.text
            before = child.tokens
            child.extend(" more")
            assert child.tokens == before + clean.tokenizer.encode_more(settled.rest + " more").tolist()


def test_a_stream_is_the_whole_and_leaving_it_frees_the_branch(clean):
    with clean.branch(TEXT) as trunk:
        one, other = trunk.fork(2)
        whole = one.generate(GREEDY)
        chunks = list(other.generate(GREEDY, stream=True))
        assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids
        assert one.tokens == other.tokens
        for _ in one.stream(SamplingParams(max_tokens=300, ignore_eos=True)):
            assert one.info()["generating"]
            assert one.id in refused(lambda: one.extend("x"), 409)
            break
        deadline = time.monotonic() + 60
        while one.info()["generating"]:
            assert time.monotonic() < deadline
        assert len(one.tokens) < len(trunk.tokens) + 12 + 300
        one.close()
        other.close()


def test_scores_equal_prompt_logprobs(clean):
    with clean.branch(TEXT) as trunk:
        before = trunk.tokens
        continuations = [" yes", " certainly not", [9, 8, 7]]
        scores = trunk.score(continuations, unconditional=True)
        assert trunk.tokens == before
        opening = clean.tokenizer.opening.tolist()
        for score in scores:
            for prefix, found in ((before, score), (opening, score.unconditional)):
                params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=len(prefix))
                plain = clean.generate(prefix + score.token_ids, params)
                assert list(plain.prompt_logprobs) == list(range(len(prefix), len(prefix) + len(score.token_ids)))
                expected = [row.logprob for row in plain.prompt_logprobs.values()]
                assert found.logprobs == pytest.approx(expected, abs=2e-4)
                assert found.mean == pytest.approx(sum(expected) / len(expected), abs=2e-4)
        refused(lambda: trunk.score([]), 400)
        refused(lambda: trunk.score([""]), 400)


def test_what_a_stop_string_left_of_a_token_is_not_scored_with_token_ids(clean):
    """The text belongs to the branch before it has tokens."""
    whole = clean.generate(TEXT, GREEDY)
    texts = [clean.tokenizer.token_text(id) for id in whole.token_ids]
    cut = next(i for i, text in enumerate(texts) if len(text) > 1 and text.isascii())
    stop = whole.text[len("".join(texts[:cut])) + 1 :][:6]
    with clean.branch(TEXT) as branch:
        branch.generate(SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=(stop,)))
        rest = branch.info()["pending_text"]
        assert rest
        prefix = [*branch.tokens, *clean.tokenizer.encode_more(rest).tolist()]
        (score,) = branch.score([[9, 8]], unconditional=True)
        for before, found in ((prefix, score), (clean.tokenizer.opening.tolist(), score.unconditional)):
            params = SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprob_start=len(before))
            plain = clean.generate([*before, 9, 8], params)
            assert found.token_ids == [9, 8]
            expected = [row.logprob for row in plain.prompt_logprobs.values()]
            assert found.logprobs == pytest.approx(expected, abs=2e-4)
        refused(lambda: branch.score([[]]), 400)


def test_a_lost_lease_costs_time_and_is_said(clean):
    with clean.branch(TEXT) as trunk:
        trunk.generate(GREEDY)
        assert trunk.info()["resident_tokens"] >= len(trunk.tokens) - 1
        clean.flush_cache()  # takes idle branches' pages too
        assert trunk.info()["resident_tokens"] == trunk.info()["held_tokens"] == 0
        prompt = trunk.tokens
        again = trunk.generate(GREEDY)
        assert again.cache.refilled == len(prompt) - 1 and again.cached_tokens == 0
        assert trunk.generate(GREEDY).cache.refilled == 0
        clean.flush_cache()
        assert clean.generate(prompt, GREEDY).token_ids == again.token_ids


def test_of_several_samples_the_first_stays(clean):
    with clean.branch(TEXT) as trunk:
        before = trunk.tokens
        params = SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True)
        answer = trunk.generate(params)
        assert [one.token_ids for one in answer.outputs] == [
            one.token_ids for one in clean.generate(before, params).outputs
        ]
        assert trunk.tokens == before + answer.token_ids


def test_closing_ends_what_runs_and_more_uses_say_gone(clean):
    trunk = clean.branch(TEXT)
    stream = trunk.stream(SamplingParams(max_tokens=300, ignore_eos=True))
    next(stream)
    trunk.close()
    trunk.close()
    assert [chunk.finish_reason for chunk in stream][-1] == "abort"
    for use in (trunk.fork, trunk.info, lambda: trunk.extend("x"), trunk.generate, lambda: trunk.score(["x"])):
        refused(use, 410)


def test_what_is_wrong_is_named(clean):
    with clean.branch() as trunk:
        assert trunk.tokens == []
        assert "empty" in refused(trunk.generate, 400)
        refused(lambda: trunk.extend([10**6]), 400)
        refused(lambda: trunk.extend([5] * 600), 400)
        refused(lambda: trunk.fork(0), 400)
        refused(lambda: clean.branch(ttl=0), 400)
        refused(lambda: clean.branch([{"role": "user", "content": "<|im_end|>"}]), 400)
        assert trunk.tokens == []
        assert trunk.extend(TEXT) == len(clean.tokenizer.encode(TEXT))


def test_the_limit_and_the_end_of_the_engine(checkpoint):
    engine = Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024, max_branches=3)
    trunk = engine.branch(TEXT)
    refused(lambda: trunk.fork(3), 429)
    trunk.fork(2)
    engine.close()
    with pytest.raises(EngineDead):
        trunk.fork()


@pytest.mark.parametrize("flag", ["max_branches", "branch_ttl"])
def test_bad_settings_are_named(checkpoint, flag):
    with pytest.raises(LoadError, match=f"--{flag.replace('_', '-')} must be between"):
        Engine(checkpoint("llama-gqa"), **{flag: -1})


async def test_the_asynchronous_twins(checkpoint):
    async with AsyncEngine(checkpoint("llama-gqa"), kv_cache_tokens=4096, max_num_seqs=32) as engine:
        async with await engine.branch(TEXT) as trunk:
            prompt = await trunk.tokens()
            children = await trunk.fork(20)

            async def use(i, child):
                await child.extend(f" {i}")
                answer = await child.generate(GREEDY)
                assert await child.tokens() == [*prompt, *engine.tokenizer.encode_more(f" {i}"), *answer.token_ids]
                streamed = [chunk async for chunk in child.generate(GREEDY, stream=True)]
                scores = await child.score([" yes", " no"])
                assert [len(score.logprobs) for score in scores] == [len(score.token_ids) for score in scores]
                await child.close()
                return answer.token_ids, [token for chunk in streamed for token in chunk.token_ids]

            results = await asyncio.gather(*(use(i, child) for i, child in enumerate(children)))
            with pytest.raises(InvalidRequest):
                await children[0].info()
        for i in (0, 7, 19):
            ids = [*prompt, *engine.tokenizer.encode_more(f" {i}").tolist()]
            first = await engine.generate(ids, GREEDY)
            second = await engine.generate([*ids, *first.token_ids], GREEDY)
            assert results[i] == (first.token_ids, second.token_ids)
        task = asyncio.ensure_future((await engine.branch(TEXT)).generate(SamplingParams(max_tokens=300)))
        for _ in range(20):  # until it has been sent, and long before its end
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("what", ["create", "fork"])
async def test_who_is_cancelled_while_branches_are_made_leaves_none(checkpoint, monkeypatch, what):
    """The engine has begun to make them: it cannot be told to stop, and nobody gets their ids."""
    async with AsyncEngine(checkpoint("llama-gqa"), kv_cache_tokens=1024) as engine:
        async with await engine.branch(TEXT) as trunk:
            loop, cancelled = asyncio.get_running_loop(), threading.Event()
            service = engine._core.branches
            take = service.take

            def late(op):
                if op.what == what:
                    loop.call_soon_threadsafe(task.cancel)
                    assert cancelled.wait(60)
                take(op)

            monkeypatch.setattr(service, "take", late)
            task = asyncio.ensure_future(trunk.fork(3) if what == "fork" else engine.branch(TEXT))
            with pytest.raises(asyncio.CancelledError):
                await task
            cancelled.set()
            await trunk.info()  # the deletions are queued before its end, and so before the trunk's
        assert (await asyncio.to_thread(engine.stats)).branches == 0
