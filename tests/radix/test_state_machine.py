"""Random programs against the tree and an oracle without nodes.

The oracle is a dictionary: whole token prefix -> the one page that ends it. It finds hits by trying every entry,
decides evictions page by page, and keeps its own clock. Beside it runs a device that executes steps late and in
order (copies, then writes, then reads) on a pool where each slot holds a fingerprint of the whole prefix up to it:
a request that reads a wrong page, or a page too early, or one that was given away, reads a wrong fingerprint.
A subscriber keeps a third copy from the tree's events alone.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from branchwise.radix import SCORE, Lease, RadixTree

NAMESPACES = [("ann", ""), ("ann", "salt"), ("bob", "")]
X, Y, Z = 1, 256, 2  # the tokens: bytes in the wrong order would sort them otherwise
EMPTY = -1

Prefix = tuple[tuple[str, str], tuple[int, ...]]  # (namespace, every token from position 0)


def fingerprint(namespace: tuple[str, str], tokens: tuple[int, ...]) -> int:
    return hash((NAMESPACES.index(namespace), tokens))


def scores_of(namespace: tuple[str, str], tokens: tuple[int, ...], start: int) -> np.ndarray:
    """A score depends on all tokens up to its own."""
    marks = [fingerprint(namespace, tokens[: position + 1]) for position in range(start, len(tokens))]
    return np.array([(-(mark % 997), mark % 89, mark % 31, -(mark % 13)) for mark in marks], SCORE)


@dataclass
class Cached:
    """One page in the tree."""

    page: int
    created: int
    last_access: int
    priority: int
    by: int  # the request that published it
    hits: int = 0


@dataclass
class Request:
    uid: int
    namespace: tuple[str, str]
    tokens: tuple[int, ...]
    priority: int
    lease: Lease
    computed: int  # tokens whose KV is written or scheduled
    to_copy: tuple[int, int] | None
    scheduled_in: int = 0

    def prefix(self, length: int) -> Prefix:
        return self.namespace, self.tokens[:length]


@dataclass
class Step:
    copies: list[tuple[int, int]] = field(default_factory=list)
    writes: list[tuple[int, int, int]] = field(default_factory=list)  # page, slot, fingerprint
    reads: list[tuple[list[int], list[int]]] = field(default_factory=list)  # pages, fingerprints expected


class Machine(RuleBasedStateMachine):
    policy = "lru"
    operations = 0
    mirror_type: type[Any]

    @initialize(
        page_size=st.sampled_from([1, 2, 4]),
        pages=st.integers(6, 30),
        enabled=st.sampled_from([True] * 24 + [False]),
    )
    def start(self, page_size: int, pages: int, enabled: bool) -> None:
        self.size, self.pages, self.enabled = page_size, pages, enabled
        self.longest = 6 * page_size  # tokens of a request
        self.tree = RadixTree(pages, page_size, self.policy, enabled)
        self.mirror = self.mirror_type(page_size)
        self.tree.subscribe(self.mirror)
        self.kv = np.full((pages, page_size), EMPTY, np.int64)
        self.cache: dict[Prefix, Cached] = {}
        self.gone: set[Prefix] = set()  # evicted at some time
        self.waiting: dict[int, int] = {}  # quarantined page -> the step that must end
        self.in_flight_pages: set[int] = set()
        self.requests: list[Request] = []
        self.seen: list[tuple[int, ...]] = [(X,) * page_size + (Y,) * page_size]
        self.clock = self.uids = self.evicted = self.ended = 0
        self.in_flight: deque[tuple[int, Step]] = deque()
        self.step, self.draft = self.tree.begin_step(), Step()

    # ---- what the oracle knows ----

    def now(self) -> int:
        self.clock += 1
        return self.clock

    def locked(self) -> set[Prefix]:
        """A lease locks its path, and the node it copies from (only the tree knows how far that node reaches)."""
        sources = {
            int(page)
            for r in self.requests
            if r.lease.source is not None
            for node in r.lease.source.upwards(r.lease.node)
            for page in node.pages
        }
        locked = {prefix for prefix, cached in self.cache.items() if cached.page in sources}
        for r in self.requests:
            assert r.lease.length % self.size == 0
            locked |= {r.prefix(end) for end in range(self.size, r.lease.length + 1, self.size)}
        return locked

    def quarantine(self, page: int) -> None:
        if self.ended < self.step:
            self.waiting[page] = self.step

    def free(self) -> int:
        owned = sum(r.lease.owned for r in self.requests)
        return self.pages - len(self.cache) - len(self.waiting) - owned

    def expected_match(
        self, namespace: tuple[str, str], tokens: tuple[int, ...], limit: int
    ) -> tuple[int, int, set[int]]:
        """(path length, tokens shared with the closest next page, the pages that share that many)."""
        length = 0
        while length + self.size <= limit and (namespace, tokens[: length + self.size]) in self.cache:
            length += self.size
        shared: dict[int, int] = {}
        for (where, cached_tokens), cached in self.cache.items():
            if where == namespace and cached_tokens[:length] == tokens[:length]:
                n = len(cached_tokens) - length
                if 0 < n <= self.size:
                    k = 0
                    while k < min(n, limit - length) and cached_tokens[length + k] == tokens[length + k]:
                        k += 1
                    shared[cached.page] = k
        best = max(shared.values(), default=0)
        return length, best, {page for page, k in shared.items() if k == best}

    def evict(self, n: int) -> None:
        """Page by page, in the order of the policy: unlocked pages that no cached page continues."""
        order = {
            "lru": lambda c: c.last_access,
            "lfu": lambda c: (c.hits, c.last_access),
            "fifo": lambda c: c.created,
            "priority": lambda c: (c.priority, c.last_access),
        }[self.policy]
        locked = self.locked()
        for _ in range(n):
            continued = {(w, tokens[:end]) for w, tokens in self.cache for end in range(0, len(tokens), self.size)}
            leaves = [p for p in self.cache if p not in continued and p not in locked]
            victim = min(leaves, key=lambda p: order(self.cache[p]))
            assert sum(order(self.cache[p]) == order(self.cache[victim]) for p in leaves) == 1, "the order is ambiguous"
            del self.cache[victim]
            self.gone.add(victim)
        self.evicted += n

    def drop_covered_pages(self, prefix: Prefix, border: int) -> None:
        locked = self.locked()
        for end in range(border + 1, len(prefix[1])):
            partial = prefix[0], prefix[1][:end]
            if partial in self.cache and partial not in locked:
                self.quarantine(self.cache.pop(partial).page)

    # ---- what a program does ----

    @precondition(lambda self: len(self.requests) < 4)
    @rule(
        data=st.data(),
        twins=st.sampled_from([1, 1, 2]),
        priority=st.integers(0, 2),
        fate=st.sampled_from(["waits", "starts", "ends", "ends"]),
    )
    def arrive(self, data: st.DataObject, twins: int, priority: int, fate: str) -> None:
        """One or two requests with the same prompt, which often continues or leaves an earlier one."""
        base = data.draw(st.sampled_from(self.seen))
        kept = data.draw(st.sampled_from([len(base), len(base) // self.size * self.size, len(base) // 2, 1]))
        tail = data.draw(st.lists(st.sampled_from([X, Y, Z]), max_size=self.size + 2))
        tokens = (base[:kept] + tuple(tail))[: self.longest]
        namespace = data.draw(st.sampled_from([NAMESPACES[0]] * 4 + NAMESPACES))
        limit = data.draw(st.sampled_from([max(0, len(tokens) - 1)] * 4 + [len(tokens), len(tokens) // 2]))
        arrived = [self.match(namespace, tokens, limit, priority) for _ in range(twins)]
        if fate == "waits":
            return
        for r in arrived:
            self.schedule(r, len(tokens))
        if fate == "ends":
            self.launch(lag=1)
            for r in arrived:
                self.leave(r, keep=True)

    def match(self, namespace: tuple[str, str], tokens: tuple[int, ...], limit: int, priority: int) -> Request:
        array = np.array(tokens, np.int32)
        peeked = self.tree.peek(array, namespace, limit)
        lease = self.tree.match(array, namespace, limit, priority)
        assert lease.hit == peeked
        if not self.enabled:
            assert (lease.length, lease.hit, lease.copy, lease.report.reason) == (0, 0, None, "disabled")
        else:
            self.compare_match(lease, namespace, tokens, limit, priority)
        self.uids += 1
        self.requests.append(Request(self.uids, namespace, tokens, priority, lease, lease.hit, lease.copy))
        return self.requests[-1]

    def compare_match(
        self, lease: Lease, namespace: tuple[str, str], tokens: tuple[int, ...], limit: int, priority: int
    ) -> None:
        length, shared, closest = self.expected_match(namespace, tokens, limit)
        assert lease.length == length
        path = [(namespace, tokens[:end]) for end in range(self.size, length + 1, self.size)]
        assert lease.pages.tolist() == [self.cache[prefix].page for prefix in path]
        used = [self.cache[prefix] for prefix in path]
        if lease.copy is None:
            assert lease.hit == length
            assert not shared or closest <= self.in_flight_pages, "a page could have been copied"
        else:
            page, k = lease.copy
            assert k >= 1 and lease.hit == length + k <= limit
            assert page not in self.in_flight_pages
            source = next(p for p, cached in self.cache.items() if cached.page == page)
            assert source[0] == namespace and source[1][: length + k] == tokens[: length + k]
            assert k == shared or closest <= self.in_flight_pages, "a better page could have been copied"
            if len(source[1]) % self.size:  # a partial page: all of it is used
                used.append(self.cache[source])
        now = self.now()
        for cached in used:
            cached.last_access, cached.hits, cached.priority = now, cached.hits + 1, max(cached.priority, priority)
        self.compare_reason(lease, namespace, tokens, limit, shared)

    def compare_reason(
        self, lease: Lease, namespace: tuple[str, str], tokens: tuple[int, ...], limit: int, shared: int
    ) -> None:
        hit, report = lease.hit, lease.report
        assert report.hit_tokens == hit
        here = [p for where, p in self.cache if where == namespace]
        differs = any(len(p) > hit and p[:hit] == tokens[:hit] and p[hit] != tokens[hit] for p in here if hit < limit)
        went = any(
            (namespace, tokens[:end]) in self.gone and (namespace, tokens[:end]) not in self.cache
            for end in range(lease.length + shared + 1, min(lease.length + self.size, len(tokens)) + 1)
        )
        elsewhere = not here and any(w[0] == namespace[0] for w, _ in self.cache)
        if report.reason == "evicted":
            assert went and lease.length + shared < limit
            return
        if hit == limit > 0:
            expected = "hit"
        elif hit and differs and hit == lease.length + shared:
            expected = "diverged"
        elif not hit and elsewhere:
            expected = "namespace"
        else:
            expected = "cold"
        assert report.reason == expected
        assert report.diverged_at == (hit if expected == "diverged" else None)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), chunk=st.integers(1, 9))
    def advance(self, data: st.DataObject, chunk: int) -> None:
        """Advances every request by a chunk: of the prompt, then of generated tokens, which are often the same."""
        more = tuple(data.draw(st.sampled_from([(X,) * chunk, (Y,) * chunk, (X, Y) * chunk])))
        for r in list(self.requests):
            target = min(r.computed + chunk, self.longest)
            r.tokens += more[: max(0, target - len(r.tokens))]
            if not self.schedule(r, target) and r.scheduled_in < self.step:
                self.leave(r, keep=True)  # retracted

    def schedule(self, r: Request, target: int) -> bool:
        """Tokens up to ``target`` become part of the step being planned and are published. False: pages are short."""
        if target <= r.computed:
            return True
        if not self.take_pages(r, target):
            return False
        if r.to_copy is not None:
            self.draft.copies.append((r.to_copy[0], int(r.lease.pages[r.lease.length // self.size])))
            r.to_copy = None
        self.publish(r, target)
        for position in range(r.computed, target):
            page = int(r.lease.pages[position // self.size])
            self.draft.writes.append((page, position % self.size, fingerprint(*r.prefix(position + 1))))
        expected = [fingerprint(*r.prefix(position + 1)) for position in range(target)]
        self.draft.reads.append((r.lease.pages.tolist(), expected))
        r.computed, r.scheduled_in = target, self.step
        self.seen = [*self.seen, r.tokens][-12:]
        return True

    def take_pages(self, r: Request, target: int) -> bool:
        n = max(0, -(-target // self.size) - len(r.lease.pages))
        free, locked = self.free(), self.locked()
        evictable = sum(prefix not in locked for prefix in self.cache)
        before = r.lease.pages
        pages = self.tree.reserve(r.lease, n)
        if n > free + evictable:
            assert pages is None and r.lease.pages is before
            return False
        assert pages is not None and len(pages) == n
        assert r.lease.pages.tolist() == before.tolist() + pages.tolist()
        assert not set(pages.tolist()) & self.waiting.keys(), "a quarantined page was handed out"
        self.evict(max(0, n - free))
        return True

    def publish(self, r: Request, target: int) -> None:
        first, last = r.lease.length // self.size, target // self.size
        before = r.lease.pages.tolist()
        known = first
        while known < last and r.prefix((known + 1) * self.size) in self.cache:
            known += 1
        replaced = self.tree.publish(r.lease, np.array(r.tokens[:target], np.int32))
        if not self.enabled:
            assert replaced is None and r.lease.length == 0
            return
        canonical = [self.cache[r.prefix((i + 1) * self.size)].page for i in range(first, known)]
        assert (replaced is None) == (not canonical)
        if replaced is not None:
            assert replaced[0] == first and replaced[1].tolist() == canonical
            for page in before[first:known]:
                self.quarantine(page)
        assert r.lease.pages.tolist() == before[:first] + canonical + before[known:]
        assert r.lease.length == max(first, last) * self.size and r.lease.source is None
        if last > known:
            self.grow(r, known, last, before)

    def grow(self, r: Request, known: int, last: int, pages: list[int]) -> None:
        border, now = known * self.size, self.now()
        self.drop_covered_pages(r.prefix(border + self.size), border)
        parent, created = self.cache.get(r.prefix(border)), now
        if parent is not None and self.policy == "fifo":
            alone = not any(
                o is not r and o.lease.length >= border and o.prefix(border) == r.prefix(border) for o in self.requests
            )
            copied = any(o.lease.source is not None and parent.page in o.lease.source.pages for o in self.requests)
            childless = not any(
                w == r.namespace and len(p) > border and p[:border] == r.tokens[:border] for w, p in self.cache
            )
            if alone and childless and not copied and parent.by == r.uid and not parent.hits:
                created = parent.created  # the run it belongs to began then
        for i in range(known, last):
            self.cache[r.prefix((i + 1) * self.size)] = Cached(pages[i], created, now, r.priority, r.uid)
            self.in_flight_pages.add(pages[i])

    @precondition(lambda self: any(r.scheduled_in < self.step for r in self.requests))
    @rule(data=st.data(), keep=st.sampled_from([True, True, False]))
    def release(self, data: st.DataObject, keep: bool) -> None:
        """Finishes or aborts a request that is not in the step being planned."""
        self.leave(data.draw(st.sampled_from([r for r in self.requests if r.scheduled_in < self.step])), keep)

    def leave(self, r: Request, keep: bool) -> None:
        keep = keep and r.to_copy is None
        path = [r.prefix(end) for end in range(self.size, r.lease.length + 1, self.size)]
        owned = r.lease.pages.tolist()[len(path) :]
        computed = min(r.computed, len(r.lease.pages) * self.size)
        self.tree.release(r.lease, np.array(r.tokens[:computed], np.int32) if keep else None)
        assert r.lease.released
        tail = r.prefix(computed)
        covered = any(w == r.namespace and p[:computed] == tail[1] for w, p in self.cache)
        r.lease.source = None
        if keep and self.enabled and computed > len(path) * self.size and not covered:
            self.drop_covered_pages(tail, len(path) * self.size)
            now = self.now()
            self.cache[tail] = Cached(owned[0], now, now, r.priority, r.uid)
            self.in_flight_pages.add(owned.pop(0))
        for page in owned:
            self.quarantine(page)
        now = self.now()
        for prefix in path:
            self.cache[prefix].last_access = now
        self.requests.remove(r)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def score(self, data: st.DataObject) -> None:
        """Scores of some of a request's tokens arrive: of those with KV, and of the one after them."""
        r = data.draw(st.sampled_from(self.requests))
        stop = min(r.computed + 1, len(r.tokens))
        if stop > 1:
            self.record(r, data.draw(st.integers(1, stop - 1)), stop)

    def record(self, r: Request, start: int, stop: int) -> None:
        self.tree.record_scores(r.lease, start, scores_of(r.namespace, r.tokens[:stop], start))

    @precondition(lambda self: any(r.scheduled_in < self.step and r.to_copy is None for r in self.requests))
    @rule(data=st.data())
    def score_all_and_release(self, data: st.DataObject) -> None:
        """Whatever page ends up with a token, it has the token's score."""
        ready = [r for r in self.requests if r.scheduled_in < self.step and r.to_copy is None]
        r = data.draw(st.sampled_from(ready))
        computed = min(r.computed, len(r.lease.pages) * self.size)
        if computed < 2:
            return
        self.record(r, 1, computed)
        self.leave(r, keep=True)
        found = self.tree.scores(np.array(r.tokens[:computed], np.int32), r.namespace)
        assert len(found) == (computed - 1 if self.enabled else 0)

    @rule(lag=st.integers(0, 2))
    def launch(self, lag: int) -> None:
        """The step is launched and the next one planned, while up to ``lag`` are still running."""
        self.in_flight.append((self.step, self.draft))
        self.step, self.draft = self.tree.begin_step(), Step()
        self.in_flight_pages = set()
        while len(self.in_flight) > lag:
            self.end_step()

    def end_step(self) -> None:
        number, step = self.in_flight.popleft()
        read = [(destination, self.kv[source].copy()) for source, destination in step.copies]
        for destination, content in read:
            self.kv[destination] = content
        for page, slot, content in step.writes:
            self.kv[page, slot] = content
        for pages, expected in step.reads:
            assert self.kv[pages].reshape(-1)[: len(expected)].tolist() == expected, "a wrong page was read"
        self.tree.end_step(number)
        self.ended = number
        self.waiting = {page: until for page, until in self.waiting.items() if until > number}

    @precondition(lambda self: self.cache)
    @rule(really=st.integers(0, 9))
    def flush(self, really: int) -> None:
        if really:
            return
        unlocked = len(self.cache.keys() - self.locked())
        assert self.tree.flush() == unlocked
        self.evict(unlocked)

    # ---- what must hold always ----

    @invariant()
    def balanced(self) -> None:
        type(self).operations += 1
        tree = self.tree
        tree.check([r.lease for r in self.requests])
        self.mirror.compare(tree)
        assert self.mirror.prefixes == {cached.page: prefix for prefix, cached in self.cache.items()}
        locked = self.locked()
        assert tree.evictable == sum(prefix not in locked for prefix in self.cache)
        assert tree.allocator.free == self.free()
        assert tree.allocator.quarantined == len(self.waiting)
        assert tree.evicted_total == self.evicted
        assert sum(tree.reasons.values()) == self.uids
        for namespace, tokens in self.cache:
            found = tree.scores(np.array(tokens, np.int32), namespace)
            assert found.tolist() == scores_of(namespace, tokens, 1)[: len(found)].tolist()

    def teardown(self) -> None:
        """Releases all requests; then a flush must empty the tree."""
        if not hasattr(self, "tree"):
            return
        self.launch(lag=0)
        for r in self.requests:
            self.tree.release(r.lease)
        self.tree.end_step(self.step)
        self.tree.flush()
        self.tree.check([])
        assert self.tree.allocator.free == self.pages and not self.tree.roots


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "priority"])
def test_random_programs_against_the_oracle(policy: str, mirror: type[Any]) -> None:
    machine = type("Machine", (Machine,), {"policy": policy, "operations": 0, "mirror_type": mirror})
    chosen = settings(
        max_examples=120, stateful_step_count=100, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    if chosen.derandomize:
        seed(policy)(machine)  # each policy its own examples, the same in every run
    run_state_machine_as_test(machine, settings=chosen)
    assert machine.operations >= 5_000
