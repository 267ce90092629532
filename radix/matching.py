"""How far a token sequence follows the tree, and the page to copy where it stops. Read-only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

from .node import SIBLINGS, TOKEN_BYTES, Int32, Node, common_tokens, page_key


class Walk(NamedTuple):
    """How far a token sequence follows the tree, in whole pages."""

    node: Node  # the last node entered
    inside: int  # pages of it that match; fewer than it has when the walk stopped inside it
    size: int  # pages of it
    length: int  # tokens matched, from position 0
    beyond: int  # tokens of the node's next page that match too, when the walk stopped inside it
    pages: list[Int32]  # the matched pages, node by node

    @property
    def stopped_inside(self) -> bool:
        """Whether the walk ended before the last page of its node."""
        return self.inside < self.size


class Partial(NamedTuple):
    """The cached part of the page at which a walk stopped."""

    tokens: int  # tokens that can be reused by copying a page; 0: none
    page: int
    node: Node | None  # the node of that page
    common: int  # tokens shared with the closest page; more than ``tokens`` if that page may not be copied
    diverges: bool  # a cached token follows those, and it differs


class _Candidate(NamedTuple):
    common: int  # tokens shared with the page sought
    ends: bool  # no token follows those
    page: int
    node: Node


def follow(node: Node, tokens: Int32, start: int, limit: int, page_size: int, *, below: bool = False) -> Walk:
    """Follows ``tokens[start:limit]`` down from the end of ``node``, through nodes on the device only, or, with
    ``below``, also through nodes that only lower tiers hold.

    Costs one dictionary lookup and one array comparison a node.
    """
    length, pages, size = start, [], len(node.tokens) // page_size
    while length + page_size <= limit:
        child = node.children.get(page_key(tokens[length : length + page_size]))
        if child is None or not (below or len(child.pages)):
            break
        node, size = child, len(child.tokens) // page_size
        n = min(len(node.tokens), limit - length)  # at least a page: the lookup compared it
        differs = node.tokens[:n] != tokens[length : length + n]
        same = int(differs.argmax())
        if not differs[same]:
            same = n
        inside = same // page_size
        pages.append(node.pages[:inside])
        length += inside * page_size
        if inside < size:
            return Walk(node, inside, size, length, same - inside * page_size, pages)
    return Walk(node, size, size, length, 0, pages)


def closest_page(walk: Walk, tokens: Int32, limit: int, page_size: int, usable: Callable[[int], bool]) -> Partial:
    """The page to copy where a walk stopped: the node's own next page, or the first page of a child.

    ``usable``: whether a page may be copied from. Of the children, the best is a neighbour of the wanted page: in the
    order of keys, no other shares more leading tokens.
    """
    wanted = page_key(tokens[walk.length : min(walk.length + page_size, limit)])
    if not wanted:
        return Partial(0, -1, None, 0, False)
    if walk.stopped_inside:
        candidates = [_Candidate(walk.beyond, False, int(walk.node.pages[walk.inside]), walk.node)]
    else:
        candidates = []
        for side in walk.node.nearest_first(wanted):
            # Look past the nearest only if it may not be copied: requests that arrive together leave such siblings.
            for child in islice(side, SIBLINGS):
                if not len(child.pages):
                    continue
                common = common_tokens(child.key, wanted)
                page = int(child.pages[0])
                candidates.append(_Candidate(common, common * TOKEN_BYTES == len(child.key), page, child))
                if not common or usable(page):
                    break
    common = max((candidate.common for candidate in candidates), default=0)
    diverges = any(candidate.common == common and not candidate.ends for candidate in candidates)
    sources = [candidate for candidate in candidates if candidate.common and usable(candidate.page)]
    if not sources:
        return Partial(0, -1, None, common, diverges)
    best = max(sources, key=lambda candidate: candidate.common)
    return Partial(best.common, best.page, best.node, common, diverges)
