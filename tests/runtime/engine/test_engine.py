"""The engine in process: what `from branchwise import Engine` gives people."""

from __future__ import annotations

import asyncio
import gc
import math
import subprocess
import sys
import threading
import time
import weakref

import pytest

from branchwise import AsyncEngine, BranchwiseError, Engine, EngineDead, InvalidRequest, LoadError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
TEXT = "def fork(program, branches): return [program.copy() for _ in range(branches)]"


@pytest.fixture(scope="module")
def engine(checkpoint):
    with Engine(checkpoint("llama-gqa"), max_num_seqs=16, kv_cache_tokens=4096) as engine:
        yield engine
        engine.check()


def wait_until_idle(engine):
    deadline = time.monotonic() + 60
    while engine.stats().running or engine.stats().waiting:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    engine.check()


def test_one_prompt_gives_one_output_and_a_list_gives_a_list(engine):
    one = engine.generate(TEXT, GREEDY)
    many = engine.generate([TEXT, engine.tokenizer.encode(TEXT).tolist(), TEXT + "x"], GREEDY)
    assert one.token_ids == many[0].token_ids == many[1].token_ids
    assert one.text == engine.tokenizer.decode(one.token_ids)
    assert one.finish_reason == "length"
    assert one.prompt_tokens == len(engine.tokenizer.encode(TEXT))
    assert many[0].cached_tokens == one.prompt_tokens - 1
    assert many[0].cache.reason == "hit"


def test_a_stream_joins_to_the_whole(engine):
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, ignore_eos=True)
    chunks = list(engine.stream(TEXT, params))
    whole = engine.generate(TEXT, params)
    assert "".join(c.text for c in chunks) == whole.text
    assert [t for c in chunks for t in c.token_ids] == whole.token_ids
    assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]
    assert chunks[-1].finish_reason == "length"


def test_leaving_a_stream_aborts_the_request(engine):
    before = engine.stats().generated_tokens
    for chunk in engine.stream(TEXT, SamplingParams(max_tokens=450, ignore_eos=True)):
        assert chunk.finish_reason is None
        break
    gc.collect()
    wait_until_idle(engine)
    assert engine.stats().generated_tokens - before < 450


def test_the_same_seed_gives_the_same_text_whatever_else_runs(engine):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
    alone = engine.generate(TEXT, params).token_ids
    others = [SamplingParams(temperature=1.3, top_p=0.9, max_tokens=30, ignore_eos=True, seed=i) for i in range(9)]
    crowd = engine.generate([TEXT + str(i) for i in range(9)] + [TEXT], [*others, params])
    assert crowd[-1].token_ids == alone
    assert engine.generate(TEXT, SamplingParams(temperature=1.0, seed=12, max_tokens=24)).token_ids != alone


def test_n_samples_differ_and_repeat(engine):
    params = SamplingParams(n=4, seed=5, max_tokens=16, ignore_eos=True)
    first, second = engine.generate(TEXT, params), engine.generate(TEXT, params)
    assert len(first.outputs) == 4
    assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    assert len({tuple(c.token_ids) for c in first.outputs}) == 4
    third = engine.generate(TEXT, SamplingParams(seed=7, max_tokens=16, ignore_eos=True))
    assert third.token_ids == first.outputs[2].token_ids  # sample i is seeded with seed + i


def test_a_stop_string_across_token_borders_ends_the_text_before_it(engine):
    whole = engine.generate(TEXT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 5]
    output = engine.generate(TEXT, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, stop=(stop,)))
    assert output.text == whole[: whole.index(stop)]
    assert output.finish_reason == "stop"
    assert output.outputs[0].matched == stop
    wait_until_idle(engine)


def test_logprobs_equal_transformers(engine, checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=3, prompt_logprobs=2)
    output = engine.generate(TEXT, params)
    again = engine.generate(TEXT, params)  # cached now, yet every prompt logprob is there
    ids = engine.tokenizer.encode(TEXT).tolist() + output.token_ids
    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama-gqa"), dtype=torch.float32)
    with torch.inference_mode():
        reference = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    for result in (output, again):
        assert list(result.prompt_logprobs) == list(range(1, result.prompt_tokens))
        rows = list(result.prompt_logprobs.values()) + result.logprobs
        assert len(rows) == len(ids) - 1
        for position, row in enumerate(rows, start=1):
            expected = reference[position - 1]
            assert row.token == ids[position]
            assert row.logprob == pytest.approx(expected[row.token].item(), abs=2e-4)
            best = expected.topk(len(row.top))
            assert [token for token, _ in row.top] == best.indices.tolist()
            assert [value for _, value in row.top] == pytest.approx(best.values.tolist(), abs=2e-4)


def test_max_tokens_zero_warms_the_cache(engine):
    text = "a prompt nobody has sent before, long enough for several pages of tokens"
    warmed = engine.generate(text, SamplingParams(max_tokens=0))
    assert (warmed.text, warmed.token_ids, warmed.finish_reason) == ("", [], "length")
    assert engine.generate(text, GREEDY).cached_tokens == warmed.prompt_tokens - 1
    assert engine.flush_cache() > 0
    assert engine.generate(text, GREEDY).cached_tokens == 0


def test_a_salt_keeps_prompts_apart(engine):
    text = "what two tenants both send, word for word, and must not learn from each other"
    engine.generate(text, GREEDY, cache_salt="a")
    assert engine.generate(text, GREEDY, cache_salt="b").cached_tokens == 0
    assert engine.generate(text, GREEDY, cache_salt="a").cached_tokens > 0


@pytest.mark.parametrize(
    ("prompt", "params", "names"),
    [
        ("", GREEDY, "prompt"),
        ([], GREEDY, "prompt"),
        ([5, -1], GREEDY, "prompt"),
        ([5, 10**6], GREEDY, "prompt"),
        ([3] * 5000, GREEDY, "prompt"),
        (TEXT, SamplingParams(max_tokens=-1), "max_tokens"),
        (TEXT, SamplingParams(max_tokens=10**7), "max_tokens"),
        (TEXT, SamplingParams(temperature=math.nan), "temperature"),
        (TEXT, SamplingParams(temperature=-1), "temperature"),
        (TEXT, SamplingParams(top_p=0), "top_p"),
        (TEXT, SamplingParams(seed=-1), "seed"),
        (TEXT, SamplingParams(n=100_000), "n "),
        (TEXT, SamplingParams(stop=("x",) * 10_000), "stop"),
        (TEXT, SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        (TEXT, SamplingParams(stop="ab"), "stop must be a tuple of strings, got str"),
        (TEXT, SamplingParams(stop_token_ids=3), "stop_token_ids must be a tuple of token ids, got int"),
        (TEXT, SamplingParams(logit_bias=[(3, 1.0)]), "logit_bias must be a dict of token ids, got list"),
        (TEXT, {"max_tokens": 3, "temperature": 0}, "params must be a SamplingParams, got dict"),
        ([TEXT], ["max_tokens"], "params must be a SamplingParams, got str"),
    ],
)
def test_bad_input_is_a_value_error_that_names_the_field(engine, prompt, params, names):
    with pytest.raises(ValueError, match=names):
        engine.generate(prompt, params)
    wait_until_idle(engine)
    assert engine.generate(TEXT, GREEDY).finish_reason == "length"


def test_one_bad_prompt_in_a_batch_aborts_its_siblings(engine):
    with pytest.raises(InvalidRequest, match="prompt"):
        engine.generate([TEXT, [3] * 5000], SamplingParams(max_tokens=450, ignore_eos=True))
    wait_until_idle(engine)


def test_threads_share_one_engine(engine):
    results: dict[int, list[int]] = {}

    def work(i: int) -> None:
        results[i] = engine.generate(TEXT + str(i), GREEDY).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [results[i] for i in range(8)] == [
        o.token_ids for o in engine.generate([TEXT + str(i) for i in range(8)], GREEDY)
    ]


async def test_the_asynchronous_forms(engine):
    whole = engine.generate(TEXT, GREEDY)
    assert (await engine.agenerate(TEXT, GREEDY)).token_ids == whole.token_ids
    assert "".join([chunk.text async for chunk in engine.astream(TEXT, GREEDY)]) == whole.text
    outputs = await asyncio.gather(*(engine.agenerate(TEXT + str(i), GREEDY) for i in range(20)))
    assert all(len(o.token_ids) == 12 for o in outputs)
    with pytest.raises(InvalidRequest):
        await engine.agenerate([TEXT, [3] * 5000], SamplingParams(max_tokens=450, ignore_eos=True))
    await asyncio.to_thread(wait_until_idle, engine)


async def test_cancelling_a_task_aborts_its_request(engine):
    task = asyncio.create_task(engine.agenerate(TEXT, SamplingParams(max_tokens=450, ignore_eos=True)))
    for _ in range(20):  # until it has been sent, and long before its end
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(wait_until_idle, engine)


async def test_async_engine_is_the_same_engine_with_asynchronous_names(checkpoint):
    async with AsyncEngine(checkpoint("llama-gqa"), kv_cache_tokens=1024) as engine:
        output = await engine.generate(TEXT, GREEDY)
        assert "".join([chunk.text async for chunk in engine.stream(TEXT, GREEDY)]) == output.text


def test_a_closed_engine_says_so(checkpoint):
    engine = Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024)
    failures: list[Exception] = []

    def wait() -> None:
        try:
            engine.generate(TEXT, SamplingParams(max_tokens=450, ignore_eos=True))
        except Exception as error:
            failures.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    while not engine.stats().running:
        time.sleep(0.005)
    engine.close()
    engine.close()
    waiter.join(timeout=100)
    assert not waiter.is_alive()
    assert len(failures) == 1
    assert "closed" in str(failures[0])
    with pytest.raises(EngineDead, match="closed"):
        engine.generate(TEXT, GREEDY)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"page_size": 0}, "--page-size"),
        ({"page_size": "a"}, "--page-size"),
        ({"dtype": "int8"}, "--dtype.*one of.*bfloat16.*int8"),
        ({"schedule_policy": "zz"}, "--schedule-policy.*hrrn"),
        ({"eviction_policy": "zz"}, "--eviction-policy.*lru"),
        ({"load_format": "zz"}, "--load-format"),
        ({"max_num_seqs": 0}, "--max-num-seqs"),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size must be between 1 and 64"),
        ({"tensor_parallel_size": 3}, "--tensor-parallel-size 3: 4 attention heads and 2 KV heads cannot"),
        ({"gpu_memory_utilization": 2.0}, "--gpu-memory-utilization"),
        ({"max_model_len": 10**9}, "--max-model-len"),
        ({"kv_cache_tokens": -5}, "--kv-cache-tokens"),
    ],
)
def test_bad_settings_are_named(checkpoint, settings, says):
    with pytest.raises(LoadError, match=says):
        Engine(checkpoint("llama-gqa"), **settings)


@pytest.mark.parametrize(
    ("keyword", "says"),
    [("kv_tokens", "no setting 'kv_tokens': did you mean 'kv_cache_tokens'"), ("zzz", "no setting 'zzz': see EngineC")],
)
def test_an_unknown_setting_is_named_with_the_closest_one(keyword, says):
    with pytest.raises(TypeError, match=says):
        Engine(**{keyword: 5})


@pytest.mark.parametrize("kind", [Engine, AsyncEngine])
def test_an_engine_that_nobody_holds_is_freed_with_its_thread(checkpoint, kind):
    before = set(threading.enumerate())
    engine = kind(checkpoint("llama-gqa"), kv_cache_tokens=1024)
    executor = weakref.ref(engine._core.executor)
    (thread,) = [each for each in threading.enumerate() if each.name == "branchwise-engine" and each not in before]
    assert asyncio.run(engine.agenerate(TEXT, GREEDY)).token_ids
    del engine
    gc.collect()
    thread.join(100)
    assert not thread.is_alive()
    gc.collect()
    assert executor() is None


def test_an_engine_that_is_in_use_is_not_freed(checkpoint):
    with Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024).branch(TEXT) as branch:
        gc.collect()
        assert branch.generate(GREEDY).token_ids
    stream = Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024).stream(TEXT, GREEDY)
    gc.collect()
    assert sum(len(chunk.token_ids) for chunk in stream) == 12


def test_an_idle_engine_lets_go_of_expired_branches(checkpoint):
    with Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024) as engine:
        branch = engine.branch(TEXT, ttl=0.2)
        branch.generate(GREEDY)
        assert engine.stats().branches_holding == 1
        registry = engine._core.branches.registry  # looked at from here: a question would wake the engine
        deadline = time.monotonic() + 60
        while len(registry):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_bad_prompt_of_several_is_refused_before_any_runs(engine):
    before = engine.stats().prompt_tokens
    with pytest.raises(InvalidRequest, match="prompt must not be empty"):
        engine.generate([TEXT, ""], GREEDY)
    assert engine.stats().prompt_tokens == before


def test_a_prompt_may_be_an_array(engine):
    ids = engine.tokenizer.encode(TEXT)
    assert engine.generate(ids, GREEDY).token_ids == engine.generate(ids.tolist(), GREEDY).token_ids


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [RuntimeError, BaseException], ids=["error", "panic"])
def test_a_request_queued_while_the_engine_dies_is_answered(checkpoint, monkeypatch, kind):
    """Also where Rust panics, in a tokenizer for one: pyo3 makes a BaseException of that."""
    with Engine(checkpoint("llama-gqa"), kv_cache_tokens=1024) as engine:
        stepping, go = threading.Event(), threading.Event()

        def step():
            stepping.set()
            go.wait(100)
            raise kind("broken")

        monkeypatch.setattr(engine._core, "step", step)
        failures: list[Exception] = []

        def ask():
            try:
                engine.generate(TEXT, GREEDY)
            except Exception as error:
                failures.append(error)

        first = threading.Thread(target=ask)
        first.start()
        stepping.wait(100)
        second = threading.Thread(target=ask)  # its job is queued behind the step that breaks
        second.start()
        while engine._thread._jobs.empty():
            time.sleep(0.001)
        go.set()
        for thread in (first, second):
            thread.join(100)
            assert not thread.is_alive()
        assert [type(f) for f in failures] == [EngineDead, EngineDead]


def test_everything_raised_on_purpose_is_caught_by_one_name():
    assert all(issubclass(kind, BranchwiseError) for kind in (EngineDead, InvalidRequest, LoadError))


def test_a_missing_model_is_one_line_that_says_what_to_give(tmp_path):
    with pytest.raises(LoadError, match="folder"):
        Engine(tmp_path / "nowhere")


def test_a_process_that_ends_while_the_engine_works_ends_as_it_wants_to(checkpoint):
    """The engine's thread is not cut down inside a step, which ends in an abort. A few times: it was a race."""
    code = (
        "import sys\n"
        "from branchwise import Engine, SamplingParams\n"
        "engine = Engine(sys.argv[1], kv_cache_tokens=1024)\n"
        "for chunk in engine.stream('fork', SamplingParams(max_tokens=400, ignore_eos=True)):\n"
        "    sys.exit(7)\n"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, str(checkpoint("llama-gqa"))], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (7, "")


def test_a_forked_process_is_told_that_the_engine_is_not_its_own(checkpoint):
    code = (
        "import os, sys\n"
        "from branchwise import Engine\n"
        "engine = Engine(sys.argv[1], kv_cache_tokens=1024)\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        engine.generate('fork')\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, error, flush=True)\n"
        "        os._exit(0)\n"
        "os.wait()\n"
        "print(len(engine.generate('fork').outputs), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint("llama-gqa"))], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    told, answered = done.stdout.splitlines()
    assert told == "EngineDead the engine belongs to the process that made it: make one in this process"
    assert answered == "1"
