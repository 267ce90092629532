"""No owner's requests wait for all of another's, and nobody waits without bound."""

from __future__ import annotations

import random

import pytest

from branchwise.runtime.scheduler import planner as planner_module

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["read-at-once", "read-one-late"])


def prompt(start, n=8):
    return [(start + 7 * i) % 48 + 2 for i in range(n)]


def steps_until(driver, id_, most):
    for step in range(most):
        driver.step()
        if id_ in driver.finished:
            return step + 1
    raise AssertionError(f"request {id_} did not end within {most} steps: {driver.core.stats()}")


@BOTH
def test_a_request_of_another_owner_does_not_wait_for_a_flood(make_driver, overlap):
    driver = make_driver(num_pages=512, max_num_seqs=8, overlap=overlap)
    for i in range(300):
        driver.add(prompt(i), owner="flood", max_tokens=100)
    for _ in range(20):
        driver.step()
    for i in range(30):
        assert steps_until(driver, driver.add(prompt(i, 14), owner="small", max_tokens=8), 20) <= 12
    driver.drain()
    driver.verify()


@BOTH
def test_retracted_requests_of_the_flood_go_on(make_driver, overlap):
    """One owner's small requests, without end, retract each long request of another only a few times."""
    driver = make_driver(num_pages=64, max_num_seqs=2, overlap=overlap, max_len=256)
    long = [driver.add(prompt(i), owner="flood", max_tokens=120) for i in range(4)]
    small = driver.add(prompt(1, 5), owner="small", max_tokens=3)
    for _ in range(4000):
        driver.step()
        if small in driver.finished:
            small = driver.add(prompt(driver.next_id, 5), owner="small", max_tokens=3)
        if all(id_ in driver.finished for id_ in long):
            break
    assert all(driver.finished[id_].reason == "length" for id_ in long)
    assert max(driver.finished[id_].retractions for id_ in long) <= 4
    driver.drain()
    driver.verify()


@BOTH
def test_pages_are_taken_from_an_owner_with_more_than_its_share(make_driver, overlap):
    driver = make_driver(num_pages=32, page_size=4, max_num_seqs=16, overlap=overlap, max_len=128)
    driver.core.scheduler.planner.estimator.fraction = 1.0
    flood = [driver.add(prompt(i, 9), owner="flood", max_tokens=40) for i in range(12)]
    for _ in range(15):
        driver.step()
    assert steps_until(driver, driver.add(prompt(3, 9), owner="small", max_tokens=4), 20) <= 10
    driver.drain()
    assert all(driver.finished[id_].reason == "length" for id_ in flood)
    driver.verify()


def test_rows_go_to_the_owner_with_the_fewest(make_driver):
    driver = make_driver(num_pages=512, max_num_seqs=6)
    for i in range(20):
        driver.add(prompt(i), owner="a", max_tokens=200)
    for i in range(20):
        driver.add(prompt(i), owner="b", max_tokens=200)
    driver.add(prompt(2), owner="c", max_tokens=200)
    driver.step()
    running = driver.core.scheduler.ledger.running
    assert (running["a"], running["b"], running["c"]) == (3, 2, 1)


@BOTH
def test_a_long_prompt_of_one_owner_leaves_tokens_of_each_step_to_another(make_driver, overlap):
    driver = make_driver(num_pages=512, max_num_seqs=8, max_num_batched_tokens=16, overlap=overlap, max_len=2048)
    long = driver.add(prompt(1, 1200), owner="long", max_tokens=1)
    driver.step()
    assert steps_until(driver, driver.add(prompt(2, 14), owner="small", max_tokens=4), 12) <= 9
    assert long not in driver.finished
    driver.drain()
    # No token is left unused while one owner alone has prompts.
    assert sum(plan.num_tokens == 16 for plan in driver.executor.plans) >= 1200 // 16 - 8
    driver.verify()


def test_prompts_of_one_owner_do_not_lengthen_the_steps_of_another(make_driver):
    """While both have requests, a quarter of a step's budget is for prompts; before and after, all of it."""
    driver = make_driver(num_pages=4096, max_num_seqs=8, max_num_batched_tokens=2048, max_len=8192)
    for i in (1, 2):
        driver.add(prompt(i, 2500), owner="flood", max_tokens=1)
    driver.step()
    steps_until(driver, driver.add(prompt(3, 14), owner="small", max_tokens=4), 5)
    driver.drain()
    alone, *both = [plan.num_tokens for plan in driver.executor.plans]
    assert alone == 2048 and max(both[:4]) <= 512 + 1
    assert sum(both[:4]) >= 4 * 512  # and what is left is used
    assert max(both[4:]) > 512
    driver.verify()


@pytest.mark.parametrize("policy", ["hrrn", "fcfs", "lpm", "priority"])
def test_nobody_waits_longer_than_the_bound(make_driver, policy, monkeypatch):
    """A stream that every policy prefers: more urgent, shorter, and with longer hits. What it delays is first once it
    is overdue."""
    monkeypatch.setattr(planner_module, "_PATIENCE", 8)
    driver = make_driver(num_pages=256, max_num_seqs=2, max_num_batched_tokens=16, max_len=256, schedule_policy=policy)
    stem = prompt(5, 40)
    driver.add(stem, max_tokens=0)
    driver.drain()
    victim = driver.add(prompt(9, 60), max_tokens=1)
    arrived = driver.core.scheduler.ledger.clock
    for i in range(400):
        for j in range(3):
            driver.add([*stem, 2 + (i + j) % 40, 3 + i % 7], max_tokens=1, priority=9)
        driver.step()
        if victim not in driver.core.scheduler.ledger.waiting:
            break
    assert driver.core.scheduler.ledger.clock - arrived <= 8 * 16 + 16 * 10
    if policy in ("lpm", "priority"):  # these prefer the stream without end
        assert driver.core.scheduler.ledger.clock - arrived >= 8 * 16
    driver.drain()
    driver.verify()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("policy", ["hrrn", "priority"])
def test_many_owners_in_tiny_pools(make_driver, policy, overlap):
    """Every request ends once with the right tokens, while owners take rows and pages from each other."""
    rng = random.Random(f"{policy}{overlap}")
    driver = make_driver(
        num_pages=28,
        page_size=4,
        max_num_seqs=6,
        max_num_batched_tokens=24,
        max_len=96,
        overlap=overlap,
        schedule_policy=policy,
    )
    for i in range(160):
        owner = rng.choice(["a", "a", "a", "a", "b", "c"])
        driver.add(prompt(rng.randrange(4), rng.randrange(1, 50)), owner=owner, max_tokens=rng.randrange(1, 40))
        if i % 9 == 0:
            driver.abort(rng.randrange(1, driver.next_id))
        for _ in range(rng.randrange(3)):
            driver.step()
    driver.drain()
    assert driver.core.stats().retractions > 0
    assert not driver.core.scheduler.ledger.owners
    driver.verify()
