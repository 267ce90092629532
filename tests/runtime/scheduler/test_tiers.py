"""Requests over memory tiers: what was evicted comes back, failures are misses, and no token changes.

The canary executor verifies every context that it reads, so a page that came back wrong, or was read too early, fails.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchwise.runtime.step import StepPlan
from branchwise.runtime.tiers.disk import DiskTier
from branchwise.runtime.tiers.fingerprint import Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder
from branchwise.runtime.tiers.manager import TierManager
from branchwise.runtime.tiers.none import NoTiers

Make = Callable[..., Any]


def prompt(seed: int, length: int = 40) -> list[int]:
    return random.Random(seed).choices(range(2, 50), k=length)


def tiers(driver: Any) -> TierManager:
    manager = driver.core.scheduler.tiers
    assert isinstance(manager, TierManager)
    return manager


def test_what_the_device_evicts_comes_back_from_the_host(make_driver: Make) -> None:
    """Ten prompts of 10 pages pass through a pool of 16; each is then asked again and computes its last token only."""
    d = make_driver(num_pages=16, host_slots=200, max_num_seqs=1)
    for i in range(10):
        d.add(prompt(i), max_tokens=4)
        d.drain()
    computed = d.executor.prefilled
    again = [d.add(prompt(i), max_tokens=4, seed=i + 1) for i in range(10)]
    d.drain()
    assert d.executor.prefilled == computed, "one token each, as a decode"
    for id_ in again:
        cache = d.finished[id_].cache
        assert cache.hit_tokens == 39 and not cache.disk_tokens
    stats = d.core.stats()
    assert stats.host_tokens == sum(d.finished[id_].cache.host_tokens for id_ in again) >= 8 * 39
    assert stats.host_pages_total == 200 and stats.tier_failures == 0
    d.verify()


def test_what_the_host_evicts_comes_back_from_the_disk(make_driver: Make, tmp_path: Path) -> None:
    """Without a restart: five prompts of 10 pages pass through a pool of 16 and a host of 12, each used twice."""
    d = make_driver(num_pages=16, host_slots=12, max_num_seqs=1, disk=disk_of(tmp_path))
    for i in range(5):
        for again in range(2):
            d.add(prompt(i), max_tokens=1, seed=again)
            d.drain()
        wait_until(d, lambda i=i: d.core.stats().disk_pages_cached >= 9 * (i + 1))  # a last page is copied
    evict(d)
    for i in range(4):
        id_ = d.add(prompt(i), max_tokens=1, seed=5)
        d.drain()
        assert d.finished[id_].cache.disk_tokens >= 36
    assert d.core.stats().tier_failures == 0
    d.check_outputs()
    d.core.close()


def test_a_request_is_admitted_once_its_own_load_has_ended(make_driver: Make) -> None:
    """Neither one that is ahead of it in the queue and whose load is slow, nor one that runs, holds it up."""
    d = make_driver(num_pages=64, host_slots=100)
    for i in range(2):
        d.add(prompt(i), max_tokens=1)
        d.drain()
    evict(d)
    d.host.fate = lambda: "waits"
    d.add(prompt(2), max_tokens=60)
    slow, fast = (d.add(prompt(i), max_tokens=4, seed=1) for i in range(2))
    while len(d.core.scheduler.tree.moves.active) < 2:
        d.step()
    fates = iter(["waits", "arrives"])
    d.host.fate = lambda: next(fates, "waits")
    for _ in range(3):
        d.step()
    assert d.outputs[fast] and not d.outputs[slow]
    d.host.fate = lambda: "arrives"
    d.drain()
    assert [d.finished[id_].cache.host_tokens for id_ in (slow, fast)] == [39, 39]
    d.verify()


def test_loads_that_fill_the_pool_do_not_wait_for_each_other(make_driver: Make) -> None:
    """Three prompts of 12 pages in a pool of 16: a load that held pages and waited for more would stop all of them."""
    d = make_driver(num_pages=16, host_slots=100)
    for i in range(3):
        d.add(prompt(i, 48), max_tokens=1)
        d.drain()
    evict(d)
    again = [d.add(prompt(i, 48), max_tokens=4, seed=1) for i in range(3)]
    d.drain(max_steps=100)
    assert [d.finished[id_].cache.host_tokens for id_ in again] == [47, 47, 47]
    d.verify()


def test_all_who_want_arriving_pages_share_one_load(make_driver: Make) -> None:
    d = make_driver(num_pages=32, host_slots=100)
    d.add(prompt(0), max_tokens=1)
    d.drain()
    evict(d)
    assert d.host.stores == 10
    d.host.fate = lambda: "waits"
    for tail in range(6):
        d.add([*prompt(0), 2 + tail], max_tokens=2)
    for _ in range(5):
        d.step()
    assert len(d.core.scheduler.tree.moves.active) == 1
    d.host.fate = lambda: "arrives"
    d.drain()
    assert d.host.loads == 10
    d.verify()


def test_a_long_prompt_comes_back_in_as_many_transfers_as_it_needs(
    make_driver: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transfers are bounded, and so are those that bring nothing; those that bring something are not."""
    monkeypatch.setattr("branchwise.runtime.tiers.manager._MOST_PAGES", 1)
    d = make_driver(num_pages=64, host_slots=100)
    d.add(prompt(0, 200), max_tokens=1)
    d.drain()
    evict(d)
    computed = d.executor.prefilled
    id_ = d.add(prompt(0, 200), max_tokens=1, seed=1)
    d.drain()
    assert d.executor.prefilled - computed <= 1
    assert d.finished[id_].cache.host_tokens == 199
    d.verify()


@pytest.mark.parametrize("fate", ["fails", "damaged"])
def test_a_failed_load_is_a_miss(make_driver: Make, fate: str) -> None:
    d = make_driver(num_pages=32, host_slots=100)
    d.add(prompt(0), max_tokens=1)
    d.drain()
    evict(d)
    d.host.fate = lambda: fate
    id_ = d.add(prompt(0), max_tokens=3, seed=1)
    d.drain()
    assert d.finished[id_].cache.hit_tokens < 39
    assert tiers(d).failures > 0
    d.verify()


def test_a_late_load_is_a_miss_and_ends_later(make_driver: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("branchwise.runtime.tiers.manager._LATE", 0.0)
    d = make_driver(num_pages=32, host_slots=100)
    d.add(prompt(0), max_tokens=1)
    d.drain()
    evict(d)
    d.host.fate = lambda: "waits"
    id_ = d.add(prompt(0), max_tokens=3, seed=1)
    while id_ not in d.finished:
        d.step()
    assert d.finished[id_].cache.tier_reason == "late" and d.finished[id_].cache.hit_tokens == 0
    assert tiers(d).late == 1 and tiers(d).busy
    d.host.fate = lambda: "arrives"
    while tiers(d).busy:
        d.core.idle()
    d.core.check()
    d.verify()


def test_the_gate_computes_what_is_slower_to_load(make_driver: Make) -> None:
    d = make_driver(num_pages=32, host_slots=100)
    d.add(prompt(0), max_tokens=1)
    d.drain()
    evict(d)
    gate = tiers(d).gate
    gate.computing, gate.reading[1] = 1e9, 1.0
    id_ = d.add(prompt(0), max_tokens=3, seed=1)
    d.drain()
    cache = d.finished[id_].cache
    assert (cache.hit_tokens, cache.tier_reason, cache.reason) == (0, "slower", "tier")
    assert gate.reading[1] > 1.0, "a refusal makes the next less likely"
    d.verify()


@pytest.mark.parametrize("mode", ["auto", "recompute", "swap"])
def test_preemption_does_not_change_answers(make_driver: Make, mode: str) -> None:
    """Six requests whose answers do not fit beside each other. With swap, what was computed is never computed again."""
    d = make_driver(num_pages=24, host_slots=200, preemption=mode, max_num_batched_tokens=64)
    for i in range(6):
        d.add(prompt(i, 12), max_tokens=60, ignore_eos=True)
    d.drain()
    d.verify()
    retractions = sum(finished.retractions for finished in d.finished.values())
    assert retractions > 0
    again = d.executor.prefilled - 6 * 12
    if mode == "swap":
        assert again <= retractions, "only each one's last token"
        assert d.host.loads > 0
    if mode == "recompute":
        assert d.host.loads == 0


@pytest.mark.parametrize("overlap", [False, True])
def test_chaos_with_a_pool_of_one_percent_of_the_working_set(make_driver: Make, overlap: bool) -> None:
    """300 conversations of 8 pages over a pool of 24, with loads late, failing and damaged, and aborts."""
    chance = random.Random(7)
    d = make_driver(num_pages=24, host_slots=3000, overlap=overlap, max_num_batched_tokens=32)
    d.host.fate = lambda: chance.choice(["arrives", "arrives", "arrives", "waits", "fails", "damaged"])
    for _ in range(800):
        if len(d.core.scheduler.ledger.waiting) < 6:
            talk = prompt(chance.randrange(300), 30)
            id_ = d.add(talk[: chance.randint(3, 30)], max_tokens=chance.randint(1, 12))
            if chance.random() < 0.1:
                d.abort(id_)
        d.step(check=chance.random() < 0.2)
    d.drain()
    assert d.host.loads > 100 and d.host.stores > 1500
    d.verify()


def test_a_failed_step_forgets_what_was_copied_from_it(make_driver: Make) -> None:
    d = make_driver(num_pages=16, host_slots=100)
    d.add(prompt(0), max_tokens=2)
    d.drain()
    evict(d)
    d.executor.fail_next = True
    d.add(prompt(1), max_tokens=2)
    d.step()
    tree = d.core.scheduler.tree
    assert tree.cached == 0 and tree.structure.host.cached == 0
    d.core.check()


def test_no_tier_costs_nothing(make_driver: Make) -> None:
    d = make_driver(num_pages=16)
    assert type(d.core.scheduler.tiers) is NoTiers
    d.add(prompt(0), max_tokens=2)
    d.drain()
    assert d.core.stats().host_pages_total == 0
    d.verify()


def wait_until(d: Any, reached: Callable[[], bool]) -> None:
    """Lets an idle engine copy until something is so."""
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        d.core.idle()
        time.sleep(0.001)


def evict(d: Any) -> None:
    """Fills the device with another prompt, so that what was there moves down."""
    tree = d.core.scheduler.tree
    tree.allocator.give_back(tree.structure.evict(tree.structure.device, tree.evictable))
    d.core._pump_copies()


def test_plans_are_a_function_of_the_copies_that_ended(make_driver: Make) -> None:
    """The same calls, with copies that end after the same plans, make the same plans."""

    def run() -> list[StepPlan]:
        chance = random.Random(3)
        d = make_driver(num_pages=24, host_slots=100, max_num_batched_tokens=32)
        d.core.scheduler.clock._source = lambda: 0.0
        d.host.fate = lambda: chance.choice(["arrives", "waits"])
        for i in range(60):
            d.add(prompt(i % 12, 20), max_tokens=6)
            d.step(check=False)
        d.drain()
        return list(d.executor.plans)

    first, second = run(), run()
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.table_pages, b.table_pages)


def disk_of(path: Path) -> DiskTier:
    """Room for 600 pages of the canary executor: 4 tokens of two int64."""
    return DiskTier(CacheFolder(path, Fingerprint("canary", "cpu", "layout", 64), 600))


def test_chaos_over_three_tiers_and_restarts(
    make_driver: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five servers in turn use one folder, with loads that fail, a disk that is full at times, and bits that flip."""
    chance = random.Random(11)
    pwrite = os.pwrite

    def unreliable(file: int, data: Any, offset: int) -> int:
        if chance.random() < 0.02:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data, offset)

    monkeypatch.setattr("branchwise.runtime.tiers.folder.os.pwrite", unreliable)
    from_disk = failures = 0
    for round_ in range(5):
        d = make_driver(num_pages=24, host_slots=40, disk=disk_of(tmp_path), max_num_batched_tokens=32)
        d.next_id = 1000 * round_ + 1
        d.host.fate = lambda: chance.choice(["arrives", "arrives", "arrives", "waits", "fails"])
        for _ in range(120):
            if len(d.core.scheduler.ledger.waiting) < 6:
                talk = prompt(chance.randrange(30), 30)
                d.add(talk[: chance.randint(3, 30)], max_tokens=chance.randint(1, 12))
            d.step()
        d.drain()
        from_disk += d.core.stats().disk_tokens
        failures += d.core.stats().tier_failures
        d.host.fate = lambda: "arrives"
        d.core.close()
        for finished in d.finished.values():
            assert finished.reason in ("length", "stop")
        d.check_outputs()
        for segment in tmp_path.glob("*/segment-*.bin"):
            data = bytearray(segment.read_bytes())
            for _ in range(3):
                data[chance.randrange(len(data))] ^= 1
            segment.write_bytes(data)
    assert from_disk > 200 and failures > 5
