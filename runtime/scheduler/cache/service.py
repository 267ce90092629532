"""Cache control: pins, statistics, and the cache operations of clients and operators."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from ....radix.tree import RadixTree
from ...config import EngineConfig
from ...errors import InvalidRequest
from ...step import Int32
from ...tiers.jobs import DiskJobs
from ..clock import Clock
from ..request import Request
from ..stops import Stops
from .accounts import Accounts
from .pins import Pin, Pins

_EVERYTHING = np.empty(0, np.int32)


class CacheQuestion(msgspec.Struct):
    """The argument of a cache `Control`. ``namespace`` is the caller's, and nothing outside it is accessed, except with
    ``everything`` (operators only), which is about all keys and salts."""

    namespace: tuple[str, str]
    tokens: bytes = b""  # int32
    ttl: float = 0.0  # seconds
    pin: str = ""
    count: int = 0
    everything: bool = False
    file: str = ""
    keep_bytes: int = 0
    job: int = 0

    @property
    def ids(self) -> Int32:
        return np.frombuffer(self.tokens, "<i4").astype(np.int32, copy=False)


class CacheService:
    """Notified by the scheduler when requests start and end; answers the cache operations of `EngineCore.control`."""

    def __init__(self, tree: RadixTree, config: EngineConfig, clock: Clock, disk_jobs: DiskJobs | None = None) -> None:
        self._tree = tree
        self._disk_jobs = disk_jobs
        self._clock = clock
        self.pins = Pins(
            tree,
            share=config.max_pinned_share,
            share_per_key=1.0 if config.pinned_share_per_key is None else config.pinned_share_per_key,
            max_ttl=config.max_pin_ttl,
            now=clock,
            instance=config.instance,
        )
        self._accounts = Accounts()
        self.stops = Stops()

    # -- requests ------------------------------------------------------------------------------------------------------

    def begun(self, request: Request) -> None:
        """The request's first chunk is scheduled, or all of it is cached."""
        if request.cache is not None:
            self._accounts.add(request.namespace, request.prompt_len, request.cache, no_cache=request.no_cache)
            self.stops.note(request)

    def leaving(self, request: Request, computed: int) -> None:
        """The request gives up its row after ``computed`` tokens: one that is aborted early has written no more."""
        if request.cache is not None and not request.retractions:
            written = max(0, computed - request.cache.hit_tokens)
            request.cache.write_tokens = min(request.cache.write_tokens, written)

    def ended(self, request: Request, *, well: bool) -> None:
        """The request has ended and released its pages. If it ended ``well`` its breakpoints are pinned."""
        if request.no_cache:
            self._tree.prune(_EVERYTHING, request.namespace)
        elif well:
            self.pin_breakpoints(request)

    def pin_breakpoints(self, request: Request) -> None:
        """Pins the prefixes that the request asked to keep, once."""
        if request.breakpoints and request.cache is not None:
            request.cache.pinned_tokens = self.pins.pin_breakpoints(
                request.prompt, request.namespace, request.breakpoints
            )
            request.breakpoints = []

    # -- operations ----------------------------------------------------------------------------------------------------

    def answer(self, what: str, argument: Any) -> dict[str, Any]:
        """Runs one cache operation; JSON-able. Raises `InvalidRequest` if it cannot be done."""
        question = msgspec.convert(argument, CacheQuestion)
        self._clock.tick()
        match what:
            case "cache_stats":
                return self._stats(question)
            case "cache_explain":
                return self._explain(question)
            case "cache_pin":
                pin = self.pins.pin(question.ids, question.namespace, question.ttl)
                return self._pin_facts(pin, len(question.ids), question.ttl)
            case "cache_unpin":
                pin = self.pins.unpin(question.pin, question.namespace[0])
                return {"id": pin.id, "unpinned_tokens": pin.hold.tokens}
            case "cache_evict":
                return self._evict(question)
            case "cache_hottest":
                found = self._tree.hottest(question.count, None if question.everything else question.namespace)
                return {"prefixes": [{"token_ids": ids.tolist(), "namespace": list(name)} for name, ids in found]}
        if what.startswith("cache_disk_"):
            return self._on_disk(what, question)
        raise InvalidRequest(None, f"there is no cache operation {what!r}")

    def _on_disk(self, what: str, question: CacheQuestion) -> dict[str, Any]:
        """Operations on the disk tier: see `DiskJobs`. Those that take time are answered with the number of a job."""
        jobs = self._disk_jobs
        if jobs is None:
            raise InvalidRequest(None, "the server has no disk tier: start it with --disk-cache")
        match what:
            case "cache_disk_list":
                return jobs.tiers()
            case "cache_disk_prune":
                return jobs.prune(question.keep_bytes)
            case "cache_disk_verify":
                return {"job": jobs.verify()}
            case "cache_disk_save":
                return {"job": jobs.save(question.namespace, question.ids, question.file)}
            case "cache_disk_load":
                return {"job": jobs.load(question.namespace, question.file)}
            case "cache_disk_job":
                return jobs.answer(question.job)
        raise InvalidRequest(None, f"there is no cache operation {what!r}")

    def _stats(self, question: CacheQuestion) -> dict[str, Any]:
        self.pins.sweep()
        owner, size = question.namespace[0], self._tree.page_size
        pins, pages = self.pins.of(owner)
        facts: dict[str, Any] = {
            **self._accounts.owner(owner).facts(),
            "pins": {
                "count": pins,
                "tokens": pages * size,
                "max_tokens": self.pins.max_pages_per_key * size,
            },
            "namespaces": self._accounts.namespaces(owner),
        }
        if question.everything:
            facts["everybody"] = {
                **self._accounts.total.facts(),
                "pages": self._pages(),
                "evicted_pages": self._tree.evicted_total,
                "pins": {
                    "count": len(self.pins),
                    "tokens": self.pins.pages * size,
                    "max_tokens": self.pins.max_pages * size,
                },
                "namespaces": self._accounts.namespaces(None),
            }
        return facts

    def _pages(self) -> dict[str, int]:
        """``free``, ``cached`` (evictable), ``held`` (in use by requests, branches or pins) and ``quarantined`` add up
        to ``total``; ``pinned`` is a part of ``held``."""
        tree = self._tree
        free, quarantined = tree.allocator.free, tree.allocator.quarantined
        return {
            "page_size": tree.page_size,
            "total": tree.allocator.total,
            "free": free,
            "cached": tree.evictable,
            "held": tree.allocator.total - free - quarantined - tree.evictable,
            "quarantined": quarantined,
            "pinned": self.pins.pages,
        }

    def _explain(self, question: CacheQuestion) -> dict[str, Any]:
        """As for a request that samples: the prompt's last token is always computed."""
        self.pins.sweep()
        ids = question.ids
        seen = self._tree.inspect(ids, question.namespace, max(0, len(ids) - 1))
        hit = seen.report.hit_tokens
        pinned = min(hit, self.pins.pinned(seen.pages) * self._tree.page_size)
        reach = self._tree.reach(ids, question.namespace, max(0, len(ids) - 1))
        return {
            "prompt_tokens": len(ids),
            "hit_tokens": hit,
            "tiers": {"device": reach.device, "host": reach.host, "disk": reach.disk},
            "computed_tokens": len(ids) - hit,
            "reason": seen.report.reason,
            "diverged_at": seen.report.diverged_at,
            "pinned_tokens": pinned,
            "protected_tokens": seen.locked,
            "instead": seen.instead.astype("<i4").tobytes(),
        }

    def _pin_facts(self, pin: Pin, requested: int, ttl: float) -> dict[str, Any]:
        tokens = pin.hold.tokens
        return {"id": pin.id, "tokens": tokens, "missing_tokens": requested - tokens, "expires_in": ttl}

    def _evict(self, question: CacheQuestion) -> dict[str, Any]:
        self.pins.sweep()
        pages = self._tree.prune(question.ids, question.namespace)
        left = self._tree.inspect(question.ids, question.namespace).report.hit_tokens
        return {"evicted_pages": pages, "remaining_tokens": left}
