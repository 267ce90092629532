"""A snapshot of the tree and of the requests on it, for a live view. Read-only."""

from __future__ import annotations

import time
from itertools import islice
from typing import Any

import msgspec

from ...radix.node import Root
from .request import Request
from .scheduler import Scheduler

MAX_REQUESTS = 512


class WatchQuestion(msgspec.Struct):
    """The argument of the ``watch`` control. ``owner``: whose namespaces and requests are shown; None: everybody's, for
    operators only."""

    owner: str | None
    max_nodes: int = 1000
    preview: int | None = None


def watch(scheduler: Scheduler, question: WatchQuestion) -> dict[str, Any]:
    """JSON-able: ``tree`` (`RadixTree.dump`), ``requests`` (at most `MAX_REQUESTS`), ``requests_omitted``, ``seconds``.

    ``seconds`` is the processor time that the answer took, so that who asks again can bound its share of the time.
    O(nodes shown + requests shown).
    """
    began = time.thread_time()
    everybody = question.owner is None
    tree = scheduler.tree.dump(question.max_nodes, question.preview, question.owner)
    if not everybody:
        tree["totals"] = {"page_size": tree["totals"]["page_size"]}  # sums tell what other tenants do
    rows = scheduler.ledger.rows
    live = [*rows.running(), *scheduler.ledger.waiting.values()]
    mine = [each for each in live if everybody or each.namespace[0] == question.owner]
    return {
        "tree": tree,
        "requests": [_describe(scheduler, each) for each in islice(mine, MAX_REQUESTS)],
        "requests_omitted": max(0, len(mine) - MAX_REQUESTS),
        "seconds": time.thread_time() - began,
    }


def _describe(scheduler: Scheduler, request: Request) -> dict[str, Any]:
    """``path``: ids of the nodes that it reads, from the deepest up. ``computed``: tokens with keys and values."""
    running = request.row >= 0
    lease = request.lease
    nodes = [] if lease is None else [each.serial for each in lease.node.upwards() if not isinstance(each, Root)]
    cache = request.cache
    return {
        "id": request.id,
        "state": "running" if running else "waiting",
        "owner": request.namespace[0],
        "salt": request.namespace[1],
        "prompt_tokens": request.prompt_len,
        "tokens": request.num_tokens,
        "limit": request.limit,
        "computed": int(scheduler.ledger.rows.computed[request.row]) if running else 0,
        "hit_tokens": 0 if cache is None else cache.hit_tokens,
        "reason": "" if cache is None else cache.reason,
        "path": nodes,
    }
