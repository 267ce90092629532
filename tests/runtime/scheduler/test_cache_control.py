"""Pins, breakpoints and no-cache requests under memory pressure, with the canary executor."""

from __future__ import annotations

import random

import msgspec
import numpy as np
import pytest

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.messages import CacheReport, Control, Generate
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.scheduler.cache.accounts import MAX_NAMESPACES, Accounts

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["read-at-once", "read-one-late"])
PAGES = pytest.mark.parametrize("page_size", [1, 4, 16])


def prompt(n, start=2):
    return [(start + 7 * i) % 48 + 2 for i in range(n)]


def ask(driver, what, tokens=(), namespace=("", ""), **fields):
    """Asks as another process does: the argument has been through msgpack."""
    question = {"namespace": namespace, "tokens": np.asarray(tokens, "<i4").tobytes(), **fields}
    argument = msgspec.msgpack.decode(msgspec.msgpack.encode(question))
    reply = driver.core.control(Control(1, what, argument))
    driver.core.check()
    if not reply.ok:
        raise reply.error.error()
    return reply.value


def run(driver, tokens, *, breakpoints=(), no_cache=False, namespace=("", ""), **params):
    id_ = driver.next_id
    driver.next_id += 1
    driver.params[id_] = SamplingParams(**({"max_tokens": 3, "seed": id_, "ignore_eos": True} | params))
    driver.prompts[id_], driver.outputs[id_] = list(tokens), []
    data = np.asarray(tokens, "<i4").tobytes()
    message = Generate(
        [id_],
        driver.params[id_],
        tokens=data,
        namespace=namespace,
        breakpoints=[tuple(each) for each in breakpoints],
        no_cache=no_cache,
    )
    driver.core.add(message)
    return id_


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def with_clock(driver):
    clock = Clock()
    driver.core.scheduler.cache.pins._now = clock
    return clock


@BOTH
@PAGES
@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority"])
def test_pins_hold_under_pressure_and_go_when_their_time_is_over(make_driver, overlap, page_size, policy):
    """Whatever runs, expires and is refused meanwhile: what is pinned can be read at any moment, to the token."""
    rng = random.Random(page_size)
    driver = make_driver(
        num_pages=512 // page_size,
        page_size=page_size,
        overlap=overlap,
        eviction_policy=policy,
        max_pinned_share=0.4,
        pinned_share_per_key=0.35,
    )
    pins, tree = driver.core.scheduler.cache.pins, driver.core.scheduler.tree
    clock = with_clock(driver)
    owners = [("", ""), ("ann", ""), ("ann", "salt"), ("bob", "")]
    texts = [prompt(rng.randrange(3, 90), rng.randrange(5)) for _ in range(12)]
    promised = {}  # id -> (tokens, namespace, until)
    refused = ended = 0
    for _ in range(150):
        match rng.randrange(6):
            case 0 | 1 | 2:
                text = rng.choice(texts) + prompt(rng.randrange(30), rng.randrange(9))
                marks = [(rng.randrange(1, len(text)), rng.choice([2, 20]))] if rng.random() < 0.3 else []
                run(driver, text, namespace=rng.choice(owners), breakpoints=marks)
            case 3 | 4:
                text, namespace, ttl = rng.choice(texts), rng.choice(owners), rng.choice([2, 8, 30])
                try:
                    facts = ask(driver, "cache_pin", text, namespace, ttl=ttl)
                except InvalidRequest as error:
                    refused += error.status == 429
                    assert error.status in (409, 429)
                else:
                    assert facts["tokens"] + facts["missing_tokens"] == len(text)
                    promised[facts["id"]] = text[: facts["tokens"]], namespace, clock.now + ttl
            case 5 if promised:
                id_ = rng.choice(list(promised))
                _, namespace, until = promised.pop(id_)
                if until > clock.now:
                    assert ask(driver, "cache_unpin", namespace=namespace, pin=id_)["id"] == id_
                else:
                    with pytest.raises(InvalidRequest):
                        ask(driver, "cache_unpin", namespace=namespace, pin=id_)
        clock.now += rng.random()
        for _ in range(rng.randrange(6)):
            driver.step()  # checks everything
        for id_, (text, namespace, until) in list(promised.items()):
            if until > clock.now:
                assert tree.peek_in_flight(np.array(text, np.int32), namespace)[1] == len(text)
            else:
                ended += 1
                del promised[id_]
        assert pins.pages <= pins.max_pages == int(0.4 * tree.allocator.total)
    assert refused
    assert ended
    driver.drain()
    clock.now += 60
    driver.core.sweep()
    driver.core.check()
    assert len(pins) == pins.pages == 0
    driver.verify()


def test_a_pin_survives_a_pool_that_is_needed_whole(make_driver):
    driver = make_driver(num_pages=40, page_size=4)
    run(driver, prompt(30))
    driver.drain()
    facts = ask(driver, "cache_pin", prompt(30), ttl=60)
    assert facts["tokens"] == 30
    for i in range(12):
        run(driver, prompt(90, i + 3), max_tokens=20)
    driver.drain()
    assert driver.core.scheduler.tree.evicted_total > 40
    seen = ask(driver, "cache_explain", prompt(30))
    assert (seen["hit_tokens"], seen["pinned_tokens"], seen["protected_tokens"], seen["reason"]) == (29, 29, 29, "hit")
    ask(driver, "cache_unpin", pin=facts["id"])
    assert ask(driver, "cache_explain", prompt(30))["pinned_tokens"] == 0
    driver.verify()


def test_what_cannot_run_beside_the_pins_hears_so_and_nobody_else(make_driver):
    driver = make_driver(num_pages=40, page_size=4, max_pinned_share=0.5)
    run(driver, prompt(60))
    driver.drain()
    ask(driver, "cache_pin", prompt(60), ttl=60)
    large = run(driver, prompt(120, 3), max_tokens=10)
    small = run(driver, prompt(20, 5))
    driver.drain()
    assert driver.finished[large].reason == "error"
    assert driver.finished[large].error.status == 503, "there will be room when the pin has ended"
    assert driver.finished[small].reason == "length"
    assert driver.core.scheduler.tree.peek(np.array(prompt(60), np.int32)) == 60


def test_a_small_request_behind_many_that_cannot_run_beside_the_pins(make_driver):
    driver = make_driver(num_pages=40, page_size=4, max_pinned_share=0.5, max_num_seqs=1, schedule_policy="priority")
    driver.add(prompt(60), max_tokens=0)
    driver.drain()
    ask(driver, "cache_pin", prompt(60), ttl=60)
    running = driver.add(prompt(8, 1), max_tokens=20)
    driver.step()
    small = driver.add(prompt(8, 2), max_tokens=4)
    large = [driver.add(prompt(120, 3 + i), max_tokens=4, priority=1) for i in range(12)]
    driver.drain()
    assert {driver.finished[id].error.status for id in large} == {503}
    assert [driver.finished[id].reason for id in (running, small)] == ["length", "length"]


@PAGES
def test_the_quota_counts_what_pins_share_once_and_each_key_by_itself(make_driver, page_size):
    driver = make_driver(
        num_pages=1280 // page_size, page_size=page_size, max_pinned_share=0.25, pinned_share_per_key=0.5
    )
    pins, per_key = driver.core.scheduler.cache.pins, 160 // page_size
    assert pins.max_pages_per_key == per_key
    for owner in ("ann", "bob"):
        for i in range(2):
            run(driver, prompt(160, i + 2), namespace=(owner, ""))
    driver.drain()
    for length in (32, 64, 96, 128, 160):  # every one of them a prefix of the next
        ask(driver, "cache_pin", prompt(length), ("ann", ""), ttl=60)
        assert pins.of("ann") == (length // 32, length // page_size)
    with pytest.raises(InvalidRequest, match="there is room for 0 of the 160 one key may pin") as refused:
        ask(driver, "cache_pin", prompt(1, 3), ("ann", ""), ttl=60)
    assert refused.value.status == 429
    ask(driver, "cache_pin", prompt(160), ("bob", ""), ttl=60)
    assert pins.pages == 2 * per_key


def test_breakpoints_keep_prefixes_to_the_token_and_are_prolonged(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    clock, pins, tree = with_clock(driver), driver.core.scheduler.cache.pins, driver.core.scheduler.tree
    first = run(driver, prompt(40), breakpoints=[(10, 5.0), (21, 30.0)])
    driver.drain()
    assert driver.finished[first].cache.pinned_tokens == 21
    assert driver.finished[first].cache.write_tokens == 40
    assert len(pins) == 2
    tree.flush()
    assert tree.peek(np.array(prompt(40), np.int32)) == 24, "the page of the twenty-first token, whole"
    clock.now += 4
    again = run(driver, prompt(40), breakpoints=[(10, 5.0)])
    driver.drain()
    assert driver.finished[again].cache.pinned_tokens == 10
    assert len(pins) == 2, "the same breakpoint prolongs its pin"
    clock.now += 4
    driver.core.sweep()
    assert len(pins) == 2
    clock.now += 2
    driver.core.sweep()
    assert len(pins) == 1
    clock.now += 30
    assert driver.core.sweep() is None
    driver.core.check()
    assert not len(pins)
    driver.verify()


def test_a_breakpoint_is_kept_where_nothing_had_to_be_computed(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    run(driver, prompt(22))
    driver.drain()
    served = run(driver, prompt(22), max_tokens=0, breakpoints=[(-1, 60.0)])
    driver.drain()
    assert driver.finished[served].cache.hit_tokens == driver.finished[served].cache.pinned_tokens == 22
    driver.core.scheduler.tree.flush()
    assert driver.core.scheduler.tree.peek_in_flight(np.array(prompt(22), np.int32))[1] == 22


def test_a_breakpoint_without_room_is_left_out_and_the_request_is_served(make_driver):
    driver = make_driver(num_pages=64, page_size=4, max_pinned_share=0.1)
    asked = run(driver, prompt(60), breakpoints=[(20, 60.0), (50, 60.0)])
    driver.drain()
    assert driver.finished[asked].reason == "length"
    assert driver.finished[asked].cache.pinned_tokens == 20
    driver.core.check()


def test_one_that_is_aborted_pins_nothing_and_tells_what_it_wrote(make_driver):
    driver = make_driver(num_pages=64, page_size=4, max_num_batched_tokens=16)
    id_ = run(driver, prompt(60), breakpoints=[(8, 60.0)])
    driver.step()
    driver.abort(id_)
    driver.step()
    assert driver.finished[id_].cache.write_tokens == 16
    assert not len(driver.core.scheduler.cache.pins)


@BOTH
@PAGES
def test_a_private_request_reads_nothing_and_leaves_nothing(make_driver, overlap, page_size):
    driver = make_driver(num_pages=256 // page_size, page_size=page_size, overlap=overlap)
    run(driver, prompt(40))
    driver.drain()
    cached = driver.core.scheduler.tree.cached
    ids = [run(driver, prompt(40), no_cache=True, namespace=("", f"private-{i % 2}")) for i in range(4)]
    while driver.core.has_work:
        driver.step()
    for id_ in ids:
        assert driver.finished[id_].cache.reason == "disabled"
        assert driver.finished[id_].cache.write_tokens == 0
    assert driver.core.scheduler.tree.cached == cached
    assert list(driver.core.scheduler.tree.roots) == [("", "")]
    driver.verify()


def test_flushing_and_a_broken_step_end_pins(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    for end in ("flush", "break"):
        run(driver, prompt(20))
        driver.drain()
        ask(driver, "cache_pin", prompt(20), ttl=60)
        if end == "flush":
            reply = driver.core.control(Control(1, "flush_cache"))
            assert reply.value == {"evicted_pages": 6, "unpinned": 1}
        else:
            run(driver, prompt(20, 3))
            driver.executor.fail_next = True
            driver.drain()
        driver.core.check()
        assert not len(driver.core.scheduler.cache.pins)
        assert driver.core.scheduler.tree.allocator.free == 64


def test_pins_and_branches_hold_side_by_side(make_driver):
    driver = make_driver(num_pages=32, page_size=4)
    run(driver, prompt(40))
    driver.drain()
    registry = driver.core.branches.registry
    from branchwise.runtime.shared_tokens import EMPTY

    registry.create(("", ""), EMPTY.extended(np.array(prompt(36), np.int32)))
    ask(driver, "cache_pin", prompt(24), ttl=60)
    registry.relieve(32, True)
    driver.core.check()
    assert registry.holds_lost == 1
    driver.core.scheduler.tree.flush()
    assert driver.core.scheduler.tree.peek(np.array(prompt(40), np.int32)) == 24


def test_what_is_not_there_cannot_be_pinned_and_nobody_elses_can_be_ended(make_driver):
    driver = make_driver()
    with pytest.raises(InvalidRequest, match="none of these 9 tokens is cached") as missing:
        ask(driver, "cache_pin", prompt(9), ttl=60)
    assert missing.value.status == 409
    run(driver, prompt(9), namespace=("ann", ""))
    driver.drain()
    with pytest.raises(InvalidRequest, match="none of these 9 tokens"):
        ask(driver, "cache_pin", prompt(9), ("bob", ""), ttl=60)
    id_ = ask(driver, "cache_pin", prompt(9), ("ann", ""), ttl=60)["id"]
    messages = []
    for pin in (id_, "pin-0"):
        with pytest.raises(InvalidRequest) as unknown:
            ask(driver, "cache_unpin", namespace=("bob", ""), pin=pin)
        assert unknown.value.status == 404
        messages.append(unknown.value.message.replace(pin, "PIN"))
    assert messages[0] == messages[1]
    assert len(driver.core.scheduler.cache.pins) == 1
    for ttl in (0, -1, 1e9):
        with pytest.raises(InvalidRequest, match="--max-pin-ttl"):
            ask(driver, "cache_pin", prompt(9), ("ann", ""), ttl=ttl)


def test_explain_says_what_the_next_request_hears(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    run(driver, prompt(30))
    driver.drain()
    for text in (prompt(30), [*prompt(17), 49, 49, 49], prompt(9, 6), prompt(60)):
        before = driver.core.scheduler.tree.dump()
        said = ask(driver, "cache_explain", text)
        assert driver.core.scheduler.tree.dump() == before
        id_ = run(driver, text)
        driver.drain()
        report = driver.finished[id_].cache
        assert (said["hit_tokens"], said["reason"], said["diverged_at"]) == (
            report.hit_tokens,
            report.reason,
            report.diverged_at,
        )
        assert said["computed_tokens"] == report.write_tokens


def test_sums_by_key_and_reason(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    for namespace in (("ann", ""), ("ann", "salt"), ("bob", "")):
        for _ in range(2):
            run(driver, prompt(20), namespace=namespace)
            driver.drain()
    mine = ask(driver, "cache_stats", namespace=("ann", ""))
    assert (mine["requests"], mine["prompt_tokens"], mine["cached_tokens"], mine["cache_write_tokens"]) == (
        4,
        80,
        38,
        42,
    )
    assert mine["hit_rate"] == 38 / 80
    assert mine["reasons"]["hit"] == {"requests": 2, "cached_tokens": 38, "computed_tokens": 2}
    assert sum(reason["computed_tokens"] for reason in mine["reasons"].values()) == 42
    assert [(each["salt"], each["requests"]) for each in mine["namespaces"]] == [("salt", 2), ("", 2)]
    assert "everybody" not in mine
    assert "bob" not in str(mine)
    everybody = ask(driver, "cache_stats", namespace=("ann", ""), everything=True)["everybody"]
    assert everybody["requests"] == 6
    pages = everybody["pages"]
    assert pages["total"] == pages["free"] + pages["cached"] + pages["held"] + pages["quarantined"]
    assert {each["owner"] for each in everybody["namespaces"]} == {"ann", "bob"}


def test_namespaces_are_remembered_up_to_a_bound():
    accounts = Accounts()
    for i in range(MAX_NAMESPACES + 10):
        accounts.add(("ann", str(i)), 10, CacheReport(0, "cold", write_tokens=10), no_cache=False)
    assert accounts.owner("ann").requests == MAX_NAMESPACES + 10
    assert len(accounts._namespaces) == MAX_NAMESPACES
    assert accounts.namespaces("ann")[0]["salt"] == str(MAX_NAMESPACES + 9)


def test_eviction_takes_one_prompt_and_leaves_the_pinned(make_driver):
    driver = make_driver(num_pages=64, page_size=4)
    for text in (prompt(40), [*prompt(20), 49, 49, 49, 49]):
        run(driver, text)
        driver.drain()
    ask(driver, "cache_pin", prompt(26), ttl=60)
    gone = ask(driver, "cache_evict", prompt(24))
    assert gone["remaining_tokens"] == 24
    assert gone["evicted_pages"] >= 3
    assert ask(driver, "cache_explain", [*prompt(20), 49, 49, 49, 49])["hit_tokens"] == 23


def test_a_key_has_so_many_pins_and_no_more(make_driver, monkeypatch):
    monkeypatch.setattr("branchwise.runtime.scheduler.cache.pins.MAX_PINS", 3)
    driver = make_driver(num_pages=64, page_size=4, max_pinned_share=0.9)
    for owner in ("ann", "bob"):
        run(driver, prompt(16), namespace=(owner, ""))
    driver.drain()
    for _ in range(3):
        ask(driver, "cache_pin", prompt(16), ("ann", ""), ttl=60)
    with pytest.raises(InvalidRequest, match="this key has 3 pins, as many as one may have") as refused:
        ask(driver, "cache_pin", prompt(16), ("ann", ""), ttl=60)
    assert refused.value.status == 429
    ask(driver, "cache_pin", prompt(16), ("bob", ""), ttl=60)
