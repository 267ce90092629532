"""One node of the tree in full, for the live view: its tokens, who uses it, and which requests stopped in it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import msgspec
import numpy as np

from ...radix.node import Namespace, Node, Root
from ..errors import InvalidRequest
from .branches.registry import Branches
from .scheduler import Scheduler

MAX_TOKENS = 4096  # of a node that are returned: half from its beginning, half from its end
MAX_STOPS = 20
MAX_HOLDERS = 100  # ids of requests
MAX_PATH = 4096  # nodes


class NodeQuestion(msgspec.Struct):
    """``namespace``, and ``path``: ids of the nodes from the top one to the one that is meant, as `watch` gave them.
    ``owner``: whose namespaces may be asked about; None: everybody's."""

    owner: str | None
    namespace: tuple[str, str]
    path: list[int]


def node_details(scheduler: Scheduler, branches: Branches, question: NodeQuestion) -> dict[str, Any]:
    """JSON-able but for token ids, which are int32 bytes.

    ``start``, ``end``: positions of its tokens in a prompt; ``head``, ``tail``: its first and last tokens, ``between``
    how many are left out; ``requests``: ids of those that read it; ``pins``, ``branches``: how many hold it; ``stops``:
    requests whose reuse ended in it, the latest first: ``request, position, reason, after`` (what the request went on
    with) and ``instead`` (what is cached there).

    Raises `InvalidRequest` (404) if there is no such node any more. O(depth × siblings + requests + pins + branches).
    """
    node = _find(scheduler, question)
    path = np.concatenate([each.tokens for each in reversed(list(node.upwards()))])
    start, size = len(path) - len(node.tokens), len(node.tokens)
    half = MAX_TOKENS // 2
    head = node.tokens if size <= MAX_TOKENS else node.tokens[:half]
    tail = node.tokens[size:] if size <= MAX_TOKENS else node.tokens[size - half :]
    stops = islice(scheduler.cache.stops.within(question.namespace, path, start), MAX_STOPS)
    live = [*scheduler.ledger.rows.running(), *scheduler.ledger.waiting.values()]
    users = (each.id for each in live if each.lease is not None and _passes(each.lease.node, node))
    return {
        "start": start,
        "end": len(path),
        "head": head.tobytes(),
        "between": size - len(head) - len(tail),
        "tail": tail.tobytes(),
        "hits": node.hits,
        "pages": len(node.pages),
        "host": len(node.host),
        "disk": len(node.disk),
        "locks": node.locks,
        "requests": list(islice(users, MAX_HOLDERS)),
        "pins": sum(_passes(pin.hold.node, node) for pin in scheduler.cache.pins),
        "branches": sum(each.hold is not None and _passes(each.hold.node, node) for each in branches),
        "stops": [
            {
                "request": stop.request,
                "position": stop.position,
                "reason": stop.reason,
                "after": stop.after.tobytes(),
                "instead": path[stop.position : stop.position + len(stop.after)].tobytes(),
            }
            for stop in stops
        ],
    }


def _find(scheduler: Scheduler, question: NodeQuestion) -> Node:
    namespace: Namespace = question.namespace
    node: Node | None = scheduler.tree.structure.roots.get(namespace)
    if question.owner is not None and namespace[0] != question.owner:
        node = None  # another tenant's: as if it did not exist
    for id in question.path[:MAX_PATH]:
        if node is not None:
            node = next((child for child in node.children.values() if child.serial == id), None)
    if node is None or isinstance(node, Root):
        raise InvalidRequest("path", "leads to no node of the tree: it has grown or was evicted", status=404)
    return node


def _passes(end: Node, node: Node) -> bool:
    """Whether the path that ends at ``end`` leads through ``node``."""
    return any(each is node for each in end.upwards())
