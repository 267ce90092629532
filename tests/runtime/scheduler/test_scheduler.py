"""The scheduler against a model that can tell whether it was given the right context."""

from __future__ import annotations

import random

import numpy as np
import pytest

from branchwise.radix.tree import RadixTree
from branchwise.runtime.messages import Generate
from branchwise.runtime.sampling_params import SamplingParams

from .conftest import expected_output

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["read-at-once", "read-one-late"])


def prompt(n, start=2):
    return [(start + 7 * i) % 48 + 2 for i in range(n)]


@BOTH
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 15, 16, 17, 33])
def test_one_request_cold_then_warm(make_driver, overlap, page_size, length):
    driver = make_driver(page_size=page_size, num_pages=256 // page_size, overlap=overlap)
    first = driver.add(prompt(length), seed=1)
    driver.drain()
    second = driver.add(prompt(length), seed=1)
    driver.drain()
    assert driver.finished[first].cache.hit_tokens == 0
    assert driver.finished[first].cache.reason == "cold"
    assert driver.finished[second].cache.hit_tokens == length - 1  # token-exact at every page size
    # Of a single token nothing can be reused: it must be computed to be sampled from.
    assert driver.finished[second].cache.reason == ("hit" if length > 1 else "cold")
    driver.verify()


@BOTH
def test_a_follow_up_turn_reuses_prompt_and_answer_to_the_token(make_driver, overlap):
    driver = make_driver(overlap=overlap)
    first = driver.add(prompt(13), max_tokens=6)
    driver.drain()
    history = prompt(13) + driver.outputs[first]
    second = driver.add([*history, 3, 4, 5])
    driver.drain()
    # The last token of the answer was never fed, so it alone has no KV (in overlap a step more may have run).
    assert driver.finished[second].cache.hit_tokens in (len(history) - 1, len(history))
    driver.verify()


@BOTH
def test_requests_of_one_step_compute_a_shared_prefix_once(make_driver, overlap):
    driver = make_driver(overlap=overlap, num_pages=256, max_num_batched_tokens=512)
    shared = prompt(64)
    for i in range(6):
        driver.add([*shared, 2 + i, 3, 4])
    driver.drain()
    assert driver.executor.plans[0].num_tokens == 64 + 6 * 3
    assert driver.core.stats().computed_tokens == 64 + 6 * 3
    driver.verify()


@BOTH
def test_followers_wait_for_the_producer_of_a_chunked_prompt(make_driver, overlap):
    driver = make_driver(overlap=overlap, num_pages=256, max_num_batched_tokens=40, page_size=4)
    shared = prompt(200)
    for i in range(4):
        driver.add([*shared, 2 + i])
    driver.drain()
    assert driver.core.stats().computed_tokens == 200 + 4
    driver.verify()


def test_a_follower_goes_on_alone_when_its_producer_is_aborted(make_driver):
    driver = make_driver(num_pages=256, max_num_batched_tokens=40)
    producer = driver.add(prompt(200))
    driver.step()
    follower = driver.add([*prompt(200), 3])
    driver.step()
    assert driver.core.stats().waiting == 1
    driver.abort(producer)
    driver.drain()
    assert driver.finished[follower].reason == "length"
    assert driver.finished[follower].cache.hit_tokens == 80
    driver.verify()


@BOTH
def test_prefill_chunks_share_steps_with_decodes(make_driver, overlap):
    driver = make_driver(overlap=overlap, max_num_batched_tokens=16, num_pages=128)
    driver.add([2, 3], max_tokens=30)
    for _ in range(3):
        driver.step()
    driver.add(prompt(100))
    driver.drain()
    assert any(plan.num_decodes and len(plan.rows) > plan.num_decodes for plan in driver.executor.plans)
    assert all(plan.num_tokens <= 16 for plan in driver.executor.plans)
    driver.verify()


def test_short_prompts_fill_a_step_beside_decodes_and_no_more(make_driver):
    """Sixteen of 100 tokens: 1,024 query tokens in a step, decodes included. A long prompt is not put off."""
    driver = make_driver(num_pages=2048, max_len=2048, max_num_seqs=32, max_num_batched_tokens=8192)
    driver.add([2, 3], max_tokens=30)
    driver.step()
    for i in range(16):
        driver.add(prompt(100, start=3 + i), max_tokens=2)
    driver.add(prompt(600, start=30), max_tokens=2)
    driver.drain()
    plans = [plan for plan in driver.executor.plans[1:] if len(plan.rows) > plan.num_decodes]
    prompt_tokens = [int(plan.q_lens[plan.num_decodes :].sum()) for plan in plans]
    assert [plan.num_decodes for plan in plans] == [1, 12]  # the long one decodes too
    assert prompt_tokens == [1023 + 600, 577]
    driver.verify()


def test_short_prompts_that_arrive_together_fill_the_budget_while_none_decodes(make_driver):
    driver = make_driver(num_pages=2048, max_len=2048, max_num_seqs=32, max_num_batched_tokens=8192)
    for i in range(20):
        driver.add(prompt(100, start=3 + i), max_tokens=2)
    driver.drain()
    assert driver.executor.plans[0].num_tokens == 2000
    driver.verify()


def test_a_full_step_looks_few_waiting_prompts_up(make_driver, monkeypatch):
    """One look-up a request at most, however many steps it waits."""
    driver = make_driver(num_pages=4096, max_len=2048, max_num_seqs=64, max_num_batched_tokens=8192)
    shared = prompt(1000)
    driver.add(shared, max_tokens=60)
    driver.step()
    seen = []
    peek = RadixTree.peek
    monkeypatch.setattr(RadixTree, "peek", lambda *args, **kwargs: seen.append(1) or peek(*args, **kwargs))
    for i in range(40):
        driver.add([*shared, *prompt(100, start=7 + i)], max_tokens=1)
    driver.drain()
    assert len(seen) <= 2 * 40
    driver.verify()


def test_decodes_that_fill_their_pages_together_get_pages_at_once(make_driver, monkeypatch):
    """Sixteen of equal length: one reservation whenever they cross into their next page."""
    driver = make_driver(num_pages=512, max_num_seqs=16)
    for i in range(16):
        driver.add(prompt(8, start=2 + i), max_tokens=16)
    driver.step()
    calls = []
    reserve_each = RadixTree.reserve_each
    monkeypatch.setattr(RadixTree, "reserve_each", lambda *args: calls.append(len(args[1])) or reserve_each(*args))
    driver.drain()
    assert calls == [16] * 4
    driver.verify()


@BOTH
def test_retraction_when_the_pool_is_too_small_for_what_was_hoped(make_driver, overlap):
    driver = make_driver(overlap=overlap, num_pages=24, page_size=4)
    driver.core.scheduler.planner.estimator.fraction = 0.1
    for i in range(6):
        driver.add(prompt(8, start=i * 3), max_tokens=60)
    driver.drain()
    assert driver.core.stats().retractions > 0
    assert any(f.retractions for f in driver.finished.values())
    assert driver.finished[1].retractions == 0  # the oldest always goes on
    driver.verify()


@BOTH
@pytest.mark.parametrize("page_size", [1, 4])
def test_a_request_that_needs_the_whole_pool(make_driver, overlap, page_size):
    driver = make_driver(overlap=overlap, num_pages=64 // page_size, page_size=page_size)
    driver.add(prompt(30), max_tokens=10)
    driver.drain()
    driver.add([*prompt(30), 5], max_tokens=33)
    driver.drain()
    driver.verify()


@BOTH
def test_max_tokens_zero_computes_and_caches_the_prompt(make_driver, overlap):
    driver = make_driver(overlap=overlap)
    first = driver.add(prompt(20), max_tokens=0)
    driver.drain()
    second = driver.add(prompt(20), max_tokens=0)
    third = driver.add(prompt(20))
    driver.drain()
    assert driver.finished[first].reason == driver.finished[second].reason == "length"
    assert driver.finished[second].cache.hit_tokens == 20
    assert driver.finished[third].cache.hit_tokens == 19
    assert driver.core.stats().computed_tokens == 21
    driver.verify()


@BOTH
def test_stop_tokens_end_a_request_with_the_token_included(make_driver, overlap):
    driver = make_driver(overlap=overlap)
    for i in range(20):
        driver.add([2 + i, 5, 9], max_tokens=100, ignore_eos=False, stop_token_ids=(7,))
    driver.drain()
    assert {f.reason for f in driver.finished.values()} >= {"stop"}
    assert {f.matched for f in driver.finished.values()} <= {None, 1, 7}
    driver.verify()


@BOTH
def test_the_ends_of_one_step_are_sent_in_parts(make_driver, overlap):
    driver = make_driver(overlap=overlap, max_num_seqs=32, num_pages=256)
    parts, step_parts = [], []
    driver.core.scheduler.send_early = parts.append
    for i in range(20):
        driver.add([2 + i, 5, 9], max_tokens=3)
    stopped, third = [3, 17], {}
    for i in stopped:  # in the step that is the last of the others, by a token that they have not sampled before
        first, second, third[i] = expected_output([2 + i, 6, 9], 21, SamplingParams(max_tokens=3))[0]
        assert third[i] not in (first, second)
        driver.add([2 + i, 6, 9], max_tokens=9, stop_token_ids=(third[i],), seed=21)
    while driver.core.has_work:
        output = driver.core.step()
        step_parts.append([*parts, *filter(None, [output])])
        parts.clear()
        for part in step_parts[-1]:
            driver.take(part)
    *_, last = (one for one in step_parts if one and one[-1].finished)
    assert [len(part.finished) for part in last] == [8, 8, 6]
    assert [len(part.ids) // 8 for part in last] == [22, 0, 0], "the tokens come first"
    assert {finish.matched for finish in last[0].finished} == {None, *third.values()}, "a stop token beside its end"
    driver.verify()


@BOTH
@pytest.mark.parametrize("when", range(6))
def test_abort_at_every_moment(make_driver, overlap, when):
    driver = make_driver(overlap=overlap, max_num_batched_tokens=16, num_pages=128)
    victim = driver.add(prompt(40), max_tokens=20)
    other = driver.add([*prompt(24), 3], max_tokens=5)
    for _ in range(when):
        driver.step()
    driver.abort(victim)
    driver.abort(victim)
    driver.core.abort(12345)
    driver.step()
    assert driver.finished[victim].reason == "abort"
    driver.drain()
    assert driver.finished[other].reason == "length"
    driver.verify()


def test_namespaces_share_nothing(make_driver):
    driver = make_driver()
    driver.add(prompt(20), salt="a")
    driver.drain()
    other = driver.add(prompt(20), salt="b")
    same = driver.add(prompt(20), salt="a")
    driver.drain()
    assert driver.finished[other].cache.hit_tokens == 0
    assert driver.finished[other].cache.reason == "namespace"
    assert driver.finished[same].cache.hit_tokens == 19
    driver.verify()


def test_a_disabled_cache_reuses_nothing(make_driver):
    driver = make_driver(disable_radix_cache=True, num_pages=64)
    for _ in range(4):
        driver.add(prompt(20))
    driver.drain()
    assert all(f.cache.reason == "disabled" and f.cache.hit_tokens == 0 for f in driver.finished.values())
    assert driver.core.stats().computed_tokens == 80
    driver.verify()


@pytest.mark.parametrize(
    ("tokens", "params", "field"),
    [
        ([], {}, "prompt"),
        ([2] * 513, {}, "prompt"),
        ([2] * 300, {}, "prompt"),  # the pool holds 256
        ([2] * 200, {"max_tokens": 57}, "max_tokens"),
        ([2, 50], {}, "prompt[1]"),
        ([-1], {}, "prompt[0]"),
    ],
)
def test_what_can_never_be_served_is_answered_at_once(make_driver, tokens, params, field):
    driver = make_driver()
    bad = driver.add(tokens, **params)
    good = driver.add([2, 3])
    driver.step()
    assert driver.finished[bad].reason == "error"
    assert driver.finished[bad].error.status == 400
    assert driver.finished[bad].error.path == field
    del driver.prompts[bad]
    driver.drain()
    assert driver.finished[good].reason == "length"
    driver.verify()


@BOTH
def test_a_broken_step_ends_what_it_touched_and_nothing_else(make_driver, overlap):
    driver = make_driver(overlap=overlap, max_num_seqs=2)
    running = [driver.add(prompt(10 + i)) for i in range(2)]
    waiting = driver.add(prompt(30))
    driver.step()
    driver.executor.fail_next = True
    driver.step()
    assert all(driver.finished[id_].reason == "error" for id_ in running)
    for id_ in running:
        del driver.prompts[id_]
    driver.drain()
    assert driver.finished[waiting].reason == "length"
    assert driver.finished[waiting].cache.hit_tokens == 0  # nothing computed around the failure is trusted
    driver.verify()


def test_prompt_logprobs_lost_with_a_step_are_not_left_out_in_silence(make_driver, monkeypatch):
    """A request retracted meanwhile would continue after positions whose logprobs no later step delivers."""
    driver = make_driver(overlap=True, max_num_batched_tokens=8, num_pages=128)
    scored = driver.add(prompt(40), prompt_logprobs=1)
    driver.step()
    assert driver.executor.plans[-1].prompt_logprobs == [(0, 1, 1)]
    waiting = driver.add(prompt(6, start=9))

    def breaks():
        raise RuntimeError("injected")

    scheduler, pending = driver.core.scheduler, driver.core._inflight[0][1]
    with monkeypatch.context() as patch:
        patch.setattr(pending, "result", breaks)
        patch.setattr(scheduler, "plan", lambda: scheduler.ledger.retract(scheduler.ledger.rows.request(0)))
        driver.step()
    driver.drain()
    assert (driver.finished[scored].reason, driver.finished[scored].error.status) == ("error", 500)
    assert driver.finished[waiting].reason == "length"


def test_errors_that_surface_when_results_are_read_end_the_engine(make_driver):
    """A broken CUDA device launches steps and fails when results are read: launching is no sign of recovery."""
    driver = make_driver(overlap=True)

    class Broken:
        def result(self):
            raise RuntimeError("sticky")

    driver.executor.launch = lambda plan: Broken()
    with pytest.raises(RuntimeError, match="sticky"):
        for _ in range(50):
            driver.add(prompt(9))
            driver.core.step()


@BOTH
def test_retraction_without_a_cache_is_not_a_stalemate(make_driver, overlap):
    """What a retracted request gives up is quarantined until the step being planned ends; if nothing else can run,
    that step is never launched and the pages are free at once."""
    driver = make_driver(
        num_pages=8, page_size=4, max_len=32, overlap=overlap, disable_radix_cache=True, max_num_seqs=2
    )
    driver.core.scheduler.planner.estimator.fraction = 0.0
    driver.add(prompt(12, 1), max_tokens=16)
    driver.add(prompt(12, 2), max_tokens=16)
    driver.drain()
    assert driver.core.stats().retractions > 0
    driver.verify()


def test_an_empty_plan_leaves_the_step_in_flight_in_flight(make_driver):
    driver = make_driver(overlap=True)
    driver.add(prompt(9), max_tokens=1)
    scheduler = driver.core.scheduler
    step = scheduler.plan()
    assert scheduler.plan() is None
    pages = scheduler.tree.allocator.allocate(1)
    scheduler.tree.allocator.quarantine(pages)
    assert scheduler.tree.allocator.quarantined == 1
    scheduler.complete(step, driver.executor.launch(step.plan).result())
    assert scheduler.tree.allocator.quarantined == 0


def test_step_numbers_may_outgrow_32_bits(make_driver):
    driver = make_driver()
    allocator = driver.core.scheduler.tree.allocator
    allocator._begun = allocator._ended = 2**31 - 2
    driver.add(prompt(9))
    driver.drain()
    driver.verify()


def test_requests_that_come_together_share_part_of_a_page(make_driver):
    """A follower waits one step for the page that its producer is writing, and copies from it; but once only, and not
    for a page that the producer leaves unfilled: that one stays the producer's until it is full or finished."""
    driver = make_driver(page_size=16, num_pages=128)
    shared = prompt(28)
    first, *others = [driver.add([*shared, *prompt(20, start=3 + i)]) for i in range(4)]
    driver.drain()
    assert driver.finished[first].cache.hit_tokens == 0
    assert [driver.finished[i].cache.hit_tokens for i in others] == [28] * 3
    assert driver.core.stats().computed_tokens == 28 + 4 * 20
    driver.verify()


@BOTH
def test_retracted_requests_keep_their_order(make_driver, overlap):
    driver = make_driver(num_pages=9, page_size=4, max_len=36, schedule_policy="fcfs", max_num_seqs=3, overlap=overlap)
    driver.core.scheduler.planner.estimator.fraction = 0.0
    for i in range(3):
        driver.add(prompt(9, i), max_tokens=20)
    most = 0
    while driver.core.has_work:
        driver.step()
        waiting = list(driver.core.scheduler.ledger.waiting)
        assert waiting == sorted(waiting)
        most = max(most, len(waiting))
    assert most == 2
    driver.verify()


def test_an_id_in_use_is_refused(make_driver):
    driver = make_driver()
    id_ = driver.add([2, 3])
    with pytest.raises(ValueError, match="in use"):
        driver.core.add(Generate([id_], SamplingParams(), tokens=b"\x02\0\0\0"))


@BOTH
@pytest.mark.parametrize("policy", ["hrrn", "fcfs", "lpm", "priority"])
@pytest.mark.parametrize(("page_size", "num_pages"), [(1, 90), (4, 24), (16, 8)])
def test_random_branching_traffic_in_a_tiny_pool(make_driver, overlap, policy, page_size, num_pages):
    """Thousands of requests that share prefixes, abort and retract: every token right, nothing leaked."""
    rng = random.Random(f"{policy}/{page_size}/{overlap}")
    driver = make_driver(
        overlap=overlap,
        page_size=page_size,
        num_pages=num_pages,
        max_num_seqs=5,
        max_num_batched_tokens=24,
        max_len=88,
        schedule_policy=policy,
        eviction_policy=rng.choice(["lru", "lfu", "fifo", "priority"]),
    )
    stems = [[rng.randrange(2, 6) for _ in range(rng.randrange(1, 40))] for _ in range(5)]
    for _ in range(120):
        for _ in range(rng.randrange(0, 4)):
            stem = rng.choice(stems)
            tail = [rng.randrange(2, 6) for _ in range(rng.randrange(0, 12))]
            base = [*stem[: rng.randrange(1, len(stem) + 1)], *tail]
            driver.add(
                base,
                max_tokens=rng.choice([0, 1, 2, 5, 20, 30]),
                ignore_eos=rng.random() < 0.5,
                priority=rng.randrange(3),
                salt=rng.choice(["", "", "x"]),
            )
            if rng.random() < 0.3:
                stems[rng.randrange(5)] = base
        if rng.random() < 0.2 and driver.next_id > 1:
            driver.abort(rng.randrange(1, driver.next_id))
        driver.step()
    driver.drain()
    driver.verify()
    assert driver.core.stats().evicted_pages > 0


def test_samples_of_a_prompt_share_its_tokens(make_driver):
    driver = make_driver()
    scheduler = driver.core.scheduler
    scheduler.add(Generate([7, 8], SamplingParams(max_tokens=4, seed=5, n=2), tokens=b"\x02\0\0\0" * 40))
    first, second = scheduler.ledger.waiting.values()
    assert (first.id, second.id) == (7, 8)
    assert np.shares_memory(first.tokens, second.tokens)
    assert ((first.seed, first.params.n), (second.seed, second.params.n)) == ((5, 1), (6, 1))
    scheduler.add(Generate([9, 10], SamplingParams(max_tokens=4, n=2), tokens=b"\x02\0\0\0" * 600))
    refused = scheduler.take_output().finished
    assert [(one.id, one.error.status) for one in refused] == [(9, 400), (10, 400)]


def test_an_idle_engine_lets_the_executor_prepare(make_driver):
    """Until nothing is left; then the engine may block."""
    driver = make_driver()
    left = [True, True, False]
    driver.executor.prepare_next = lambda: left.pop(0)
    assert [driver.core.idle() for _ in range(3)] == [0.0, 0.0, None]
