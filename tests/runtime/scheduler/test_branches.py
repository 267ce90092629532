"""Branches against a model that can tell whether it was given the right context; no text, no sockets."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from branchwise.runtime.messages import BranchOp, BranchRun, Piece, Settled
from branchwise.runtime.sampling_params import SamplingParams

BOTH = pytest.mark.parametrize("overlap", [False, True], ids=["read-at-once", "read-one-late"])
PAGES = pytest.mark.parametrize("page_size", [1, 4, 16])
OWNER = ("", "")


def prompt(n, start=2):
    return [(start + 7 * i) % 48 + 2 for i in range(n)]


def piece(tokens):
    return Piece(tokens=np.asarray(tokens, "<i4").tobytes())


def common(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Refused(Exception):
    def __init__(self, reply):
        super().__init__(reply.error.error().message)
        self.status = reply.error.status


class Forest:
    """Branches over a driver, each mirrored by a plain list of what it must hold. Plays the detokenizer: ``kept`` says
    how much of an output stays."""

    def __init__(self, driver):
        self.driver = driver
        self.service = driver.core.branches
        self.expected: dict[str, list[int]] = {}
        self.runs: dict[int, tuple[str, list[int], int | None]] = {}
        self.settled: set[int] = set()
        self._ops = itertools.count(1)

    def op(self, what, branch="", *, namespace=OWNER, **fields):
        self.service.take(BranchOp(next(self._ops), what, namespace, branch, **fields))
        reply = self.service.replies.pop()
        if not reply.ok:
            raise Refused(reply)
        return reply.value

    def create(self, tokens, **fields):
        id = self.op("create", piece=piece(tokens), **fields)["id"]
        self.expected[id] = list(tokens)
        return id

    def fork(self, branch, n):
        ids = self.op("fork", branch, n=n)["ids"]
        self.expected.update({id: list(self.expected[branch]) for id in ids})
        return ids

    def extend(self, branch, tokens):
        self.op("extend", branch, piece=piece(tokens))
        self.expected[branch] += tokens

    def delete(self, branch):
        self.op("delete", branch)
        del self.expected[branch]

    def generate(self, branch, tokens=(), *, kept=None, namespace=OWNER, **params):
        """Starts; the driver holds the request to the oracle as any other."""
        driver = self.driver
        id = driver.next_id
        driver.next_id += 1
        whole = SamplingParams(**({"max_tokens": 6, "seed": id, "ignore_eos": True} | params))
        self.service.take(BranchRun([id], branch, namespace, whole, piece(tokens) if tokens else None))
        if self.service.registry._branches.get(branch) is None or self.service._running.get(id) is None:
            return id  # refused: the terminal message says why
        self.expected[branch] += tokens
        driver.prompts[id], driver.params[id], driver.outputs[id] = list(self.expected[branch]), whole, []
        self.runs[id] = (branch, list(self.expected[branch]), kept)
        return id

    def step(self):
        self.driver.step()
        self.settle()

    def settle(self):
        for id, (branch, before, kept) in list(self.runs.items()):
            if id in self.driver.finished and id not in self.settled:
                self.settled.add(id)
                outputs = self.driver.outputs[id]
                stays = len(outputs) if kept is None else min(kept, len(outputs))
                if self.driver.finished[id].reason == "error":
                    stays = 0
                self.service.settled(Settled(id, stays))
                if branch in self.expected:
                    self.expected[branch] = before + outputs[:stays]

    def drain(self):
        steps = 0
        while self.driver.core.has_work:
            self.step()
            steps += 1
            assert steps < 20_000, self.driver.core.stats()
        self.settle()
        self.driver.core.check()

    def tokens(self, branch):
        return np.frombuffer(self.op("get", branch, tokens=True)["tokens"], "<i4").tolist()

    def verify(self):
        for branch, tokens in self.expected.items():
            assert self.tokens(branch) == tokens
        for branch in list(self.expected):
            self.delete(branch)
        assert len(self.service.registry) == 0
        assert not self.driver.core.scheduler.tree.holds
        assert not (self.service._running or self.service._outputs or self.service._settled)
        assert not (self.service._waiting or self.service._unsubmitted)
        self.driver.verify()


@pytest.fixture
def forest(make_driver):
    return lambda **settings: Forest(make_driver(**settings))


@BOTH
@PAGES
def test_a_branch_generates_what_a_stateless_request_does_and_reuses_all_of_it(forest, overlap, page_size):
    trees = forest(page_size=page_size, num_pages=1024 // page_size, overlap=overlap)
    driver = trees.driver
    computed: list[list[int]] = []  # every sequence whose keys and values were computed: all but the last token drawn

    def run(branch, tokens=()):
        id = trees.generate(branch, list(tokens), seed=5)
        trees.drain()
        whole = driver.prompts[id]
        there = max((common(whole, known) for known in computed), default=0)
        report = driver.finished[id].cache
        # The device may have been fed the last token drawn too, where results are read a step late.
        assert report.hit_tokens in {min(there, len(whole) - 1), min(there + overlap, len(whole) - 1)}
        assert report.refilled == 0
        computed.append(whole + driver.outputs[id][:-1])
        return id

    trunk = trees.create(prompt(37))
    run(trunk)
    children = trees.fork(trunk, 3)
    for i, child in enumerate(children):
        trees.extend(child, prompt(9, i))
    runs = [run(child, [3 + i]) for i, child in enumerate(children)]
    runs += [run(child) for child in trees.fork(children[1], 2)]
    # the same prompts without branches: the same tokens (verify), and now everything is there
    plain = [driver.add(driver.prompts[id], max_tokens=6, seed=5) for id in runs]
    trees.drain()
    assert [driver.outputs[id] for id in plain] == [driver.outputs[id] for id in runs]
    assert all(driver.finished[id].cache.hit_tokens == len(driver.prompts[id]) - 1 for id in plain)
    trees.verify()


@BOTH
@PAGES
def test_what_a_branch_holds_outlives_pressure_and_is_reused_to_the_token(forest, overlap, page_size):
    trees = forest(page_size=page_size, num_pages=256 // page_size, overlap=overlap, max_num_seqs=2)
    trunk = trees.create(prompt(45))
    trees.generate(trunk)
    trees.drain()
    for i in range(6):  # strangers fill the rest of the pool several times
        trees.driver.add([i + 2] * 3 + prompt(80, i), max_tokens=2)
        trees.drain()
    again = trees.generate(trunk, [9, 9])
    trees.drain()
    assert trees.driver.finished[again].cache.hit_tokens in ({50, 51} if overlap else {50})
    assert trees.service.registry.holds_lost == 0
    trees.verify()


@BOTH
def test_a_fork_of_nothing_computed_computes_the_trunk_once(forest, overlap):
    trees = forest(page_size=4, num_pages=256, overlap=overlap, max_num_batched_tokens=512)
    trunk = trees.create(prompt(64))
    for i, child in enumerate(trees.fork(trunk, 6)):
        trees.generate(child, [2 + i, 3, 4])
    trees.drain()
    assert trees.driver.core.stats().computed_tokens == 64 + 6 * 3
    trees.verify()


def test_only_the_longest_unused_idle_branches_lose_their_pages(forest):
    trees = forest(page_size=4, num_pages=64)
    branches = []
    for i in range(5):
        branches.append(trees.create([i + 2, *prompt(39, i)]))  # 11 pages each, with what it generates
        trees.generate(branches[-1], max_tokens=2)
        trees.drain()
    trees.op("get", branches[0])  # a use
    trees.driver.add(prompt(100, 9), max_tokens=1)  # 26 pages of 64 - 55
    trees.drain()
    held = [trees.op("get", branch)["held_tokens"] for branch in branches]
    assert [bool(n) for n in held] == [True, False, False, True, True]
    assert trees.service.registry.holds_lost == 2
    assert trees.tokens(branches[1]) == trees.expected[branches[1]]  # no branch loses its tokens
    lost = trees.generate(branches[1], [5])
    trees.drain()
    report = trees.driver.finished[lost].cache
    assert report.refilled == 41 - report.hit_tokens > 0  # 40 and one generated were computed before
    kept = trees.generate(branches[4], [5])
    trees.drain()
    assert trees.driver.finished[kept].cache.refilled == 0
    assert trees.driver.core.stats().retractions == 0
    trees.verify()


def test_idle_branches_give_way_before_any_running_request_is_retracted(forest):
    trees = forest(page_size=4, num_pages=40, max_num_seqs=4)
    for i in range(3):
        branch = trees.create([i + 2, *prompt(30, i)])
        trees.generate(branch, max_tokens=1)
        trees.drain()
    # Two requests that together outgrow what the branches leave, and fit without them.
    for i in range(2):
        trees.driver.add([i + 9, *prompt(10)], max_tokens=60)
    trees.drain()
    assert trees.driver.core.stats().retractions == 0
    assert trees.service.registry.holds_lost > 0
    trees.verify()


@PAGES
def test_a_branch_that_needs_the_whole_pool_gets_it(forest, page_size):
    """Its own hold, a copied page and other branches' holds must not prevent admission."""
    trees = forest(page_size=page_size, num_pages=64 // page_size, max_len=64)
    others = [trees.create([i + 2, 3, 4, 5, 6]) for i in range(2)]
    trunk = trees.create(prompt(30))
    for branch in (*others, trunk):
        trees.generate(branch, max_tokens=1)
        trees.drain()
    trees.generate(trunk, prompt(20, 5), max_tokens=13)  # 31 + 20 + 13 = 64
    trees.drain()
    assert all(finish.reason == "length" for finish in trees.driver.finished.values())
    trees.verify()


def test_many_branches_that_all_want_to_run_at_once_do(forest):
    """Each has a hold while it waits; together the holds cover nearly the whole pool."""
    trees = forest(page_size=4, num_pages=32, max_len=120)
    branches = []
    for i in range(4):
        branches.append(trees.create([i + 2, *prompt(24, i)]))
        trees.generate(branches[-1], max_tokens=2)
        trees.drain()
    for branch in branches:
        trees.generate(branch, prompt(40, 3), max_tokens=20)
    trees.drain()
    assert all(finish.reason == "length" for finish in trees.driver.finished.values())
    trees.verify()


def test_what_is_not_kept_of_an_output_is_not_in_the_branch(forest):
    trees = forest(page_size=4)
    branch = trees.create(prompt(10))
    run = trees.generate(branch, max_tokens=8, kept=3)
    trees.drain()
    assert trees.tokens(branch) == prompt(10) + trees.driver.outputs[run][:3]
    again = trees.generate(branch, [7, 7, 7])
    trees.drain()
    assert trees.driver.finished[again].cache.hit_tokens == 13
    trees.verify()


def test_a_verdict_may_come_before_the_end(forest):
    """As for a stop string: the detokenizer knows before the scheduler, which runs on for a step or two."""
    trees = forest(page_size=4, overlap=True)
    branch = trees.create(prompt(10))
    run = trees.generate(branch, max_tokens=50, kept=4)
    while len(trees.driver.outputs[run]) < 5:
        trees.driver.step()
    trees.settled.add(run)
    trees.service.settled(Settled(run, 4, ""))
    trees.driver.aborted.add(run)
    trees.driver.step()
    with pytest.raises(Refused) as refused:
        trees.extend(branch, [1])
    assert refused.value.status == 409
    trees.driver.core.stop_matched(run)
    trees.expected[branch] = prompt(10) + trees.driver.outputs[run][:4]
    trees.extend(branch, [5])  # at once
    trees.driver.finished.pop(run, None)
    trees.drain()
    assert trees.tokens(branch) == trees.expected[branch]
    del trees.driver.prompts[run]  # its reason is ``stop``: another than the oracle's
    trees.verify()


def test_operations_wait_for_the_end_to_be_known_and_then_go_in_order(forest):
    trees = forest(page_size=4)
    branch = trees.create(prompt(10))
    run = trees.generate(branch, max_tokens=4)
    while trees.driver.core.has_work:
        trees.driver.step()
    service = trees.service
    service.take(BranchOp(101, "extend", OWNER, branch, piece([5])))
    service.take(BranchOp(102, "fork", OWNER, branch, n=1))
    service.take(BranchOp(103, "extend", OWNER, branch, piece([6])))
    assert not service.replies
    trees.settle()
    assert [reply.id for reply in service.replies] == [101, 102, 103]
    child = service.replies[1].value["ids"][0]
    service.replies.clear()
    output = trees.driver.outputs[run]
    trees.expected[branch] = prompt(10) + output + [5, 6]
    trees.expected[child] = prompt(10) + output + [5]
    trees.verify()


def test_text_left_by_a_stop_string_is_tokenized_with_what_follows(forest):
    trees = forest(page_size=4)
    service = trees.service
    branch = trees.create(prompt(10))
    run = trees.generate(branch, max_tokens=4)
    while trees.driver.core.has_work:
        trees.driver.step()
    trees.settled.add(run)
    service.settled(Settled(run, 2, "x"))
    service.take(BranchOp(101, "extend", OWNER, branch, Piece("yz", tokens=b"alone")))
    service.take(BranchOp(102, "get", OWNER, branch, tokens=True))
    assert not service.replies
    (back,) = service.to_encode
    service.to_encode.clear()
    assert back.piece.before == "x" and back.piece.text == "yz" and back.again
    back.piece = Piece("yz", before="x", tokens=np.array([30, 31], "<i4").tobytes())
    service.take(back)
    assert [reply.id for reply in service.replies] == [101, 102]
    service.replies.clear()
    trees.expected[branch] = prompt(10) + trees.driver.outputs[run][:2] + [30, 31]
    trees.verify()


def test_deleting_ends_what_it_generates(forest):
    trees = forest(page_size=4)
    branch = trees.create(prompt(10))
    run = trees.generate(branch, max_tokens=100)
    for _ in range(4):
        trees.step()
    trees.driver.aborted.add(run)
    trees.delete(branch)
    trees.step()
    assert trees.driver.finished[run].reason == "abort"
    with pytest.raises(Refused) as gone:
        trees.op("get", branch)
    assert gone.value.status == 410
    trees.verify()


def test_a_client_that_leaves_before_its_turn_is_answered_once(forest):
    trees = forest(page_size=4)
    branch = trees.create(prompt(10))
    trees.generate(branch, max_tokens=3)
    while trees.driver.core.has_work:
        trees.driver.step()
    waiting = trees.driver.next_id
    trees.driver.next_id += 1
    trees.service.take(BranchRun([waiting], branch, OWNER, SamplingParams(max_tokens=3), piece([4])))
    trees.driver.core.abort(waiting)
    trees.settle()
    trees.driver.step()
    assert trees.driver.finished[waiting].reason == "abort"
    trees.expected[branch] += [4]  # what is appended stays
    trees.verify()


@BOTH
@PAGES
def test_scores_compute_the_branch_once(forest, overlap, page_size):
    trees = forest(page_size=page_size, num_pages=1024 // page_size, overlap=overlap, max_num_batched_tokens=512)
    branch = trees.create(prompt(50))
    trees.generate(branch, max_tokens=0)
    trees.drain()
    before = trees.driver.core.stats().computed_tokens
    continuations = [prompt(1 + i, i) for i in range(8)]
    ids = list(range(1000, 1008))
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    trees.service.take(BranchRun(ids, branch, OWNER, params, continuations=[piece(c) for c in continuations]))
    trees.drain()
    assert all(trees.driver.finished[id].reason == "length" for id in ids)
    # the branch's last token, for the first logprob; and the continuation, the last token of which tells nothing more
    assert trees.driver.core.stats().computed_tokens - before == sum(1 + len(c) for c in continuations)
    assert all(trees.driver.finished[id].cache.hit_tokens == 49 for id in ids)
    trees.verify()


def test_scores_of_a_cold_branch_compute_it_once_too(forest):
    trees = forest(page_size=4, num_pages=256, max_num_batched_tokens=512)
    branch = trees.create(prompt(48))
    ids = list(range(1000, 1006))
    run = BranchRun(ids, branch, OWNER, SamplingParams(max_tokens=0, prompt_logprobs=0))
    run.continuations = [piece([i + 2, 3]) for i in range(6)]
    trees.service.take(run)
    trees.drain()
    # Once; each continuation; and of the last page what each needs from the branch's last token on.
    assert trees.driver.core.stats().computed_tokens <= 48 + 6 * 2 + 5 * 4
    assert trees.op("get", branch)["held_tokens"] == 48
    trees.verify()


def test_a_step_that_breaks_leaves_the_tokens(forest):
    trees = forest(page_size=4)
    idle = trees.create(prompt(20))
    trees.generate(idle, max_tokens=2)
    trees.drain()
    branch = trees.create(prompt(10))
    trees.generate(branch, [8], max_tokens=5)
    trees.driver.executor.fail_next = True
    trees.step()
    (run,) = [id for id, finish in trees.driver.finished.items() if finish.reason == "error"]
    assert trees.tokens(branch) == [*prompt(10), 8]
    assert trees.op("get", idle)["resident_tokens"] == 0  # nothing that was computed is trusted
    del trees.driver.prompts[run]
    again = trees.generate(idle, [3])
    trees.drain()
    assert trees.driver.finished[again].cache.refilled == 21
    trees.verify()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("policy", ["lru", "priority"])
def test_hundreds_of_branches_over_a_tiny_pool(forest, overlap, page_size, policy):
    """Random uses, deletes, aborts, lost leases; every output is what a stateless request's would be (`verify`), and
    the books balance after every step."""
    rng = random.Random(1000 * page_size + overlap)
    trees = forest(
        page_size=page_size,
        num_pages=400 // page_size,
        overlap=overlap,
        max_len=200,
        max_num_batched_tokens=64,
        eviction_policy=policy,
    )
    service, driver = trees.service, trees.driver
    busy: dict[str, int] = {}
    most = 0
    for _ in range(900):
        busy = {branch: run for branch, run in busy.items() if run not in trees.settled}
        idle = [branch for branch in trees.expected if branch not in busy]
        action = rng.random()
        if action < 0.1 or not idle:
            trees.create(prompt(rng.randrange(1, 60), rng.randrange(4)))
        elif action < 0.25:
            trees.fork(rng.choice(idle), rng.randrange(1, 6))
        elif action < 0.4:
            branch = rng.choice(idle)
            if len(trees.expected[branch]) < 120:
                trees.extend(branch, prompt(rng.randrange(1, 12), rng.randrange(9)))
        elif action < 0.65:
            branch = rng.choice(idle)
            if len(trees.expected[branch]) < 120:
                kept = rng.choice([None, None, 0, 3])
                busy[branch] = trees.generate(branch, [rng.randrange(2, 50)], max_tokens=rng.randrange(12), kept=kept)
        elif action < 0.72 and len(trees.expected) > 30:
            branch = rng.choice(list(trees.expected))
            if branch in busy:
                driver.aborted.add(busy[branch])
            trees.delete(branch)
        elif action < 0.78 and busy:
            driver.abort(rng.choice(list(busy.values())))
        elif action < 0.81:
            service.registry.relieve(rng.randrange(400 // page_size), everything=rng.random() < 0.5)
        elif action < 0.83:
            service.registry.forget()
        else:
            trees.step()
        most = max(most, len(trees.expected))
        driver.core.check()
    trees.drain()
    assert most > 100
    assert driver.core.stats().branch_holds_lost > 10
    trees.verify()
