"""Scores of tokens, kept beside their pages: a token's logprob and rank, and the likeliest token with its logprob."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from .matching import Walk, follow
from .node import SIBLINGS, Int32, Root, common_tokens, join, page_key

# 16 bytes a token. The logprob is NaN where no score is known. ``rank``: how many tokens are at least as likely.
SCORE = np.dtype([("logprob", np.float32), ("rank", np.int32), ("best_id", np.int32), ("best", np.float32)])
Scores = npt.NDArray[Any]  # [n] of `SCORE`


class ScoreTable:
    """The scores of every page, by page number and offset, so that they stay with their tokens through splits.

    A score depends on all tokens up to its own, as keys and values do: it may be used wherever the page may. The table
    is allocated by the first `write`; until then every method does nothing.

    Positions are a sequence's; its ``pages`` are those from position 0 on.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self._shape = num_pages, page_size
        self._table: Scores | None = None  # [num_pages, page_size]

    @property
    def allocated(self) -> bool:
        """Whether there has been a score."""
        return self._table is not None

    def write(self, pages: Int32, start: int, scores: Scores) -> None:
        """Keeps the scores of the tokens from position ``start`` on."""
        if self._table is None:
            self._table = np.zeros(self._shape, SCORE)
            self._table["logprob"] = np.nan
        self._table.reshape(-1)[self._slots(pages, start, start + len(scores))] = scores

    def read(self, pages: Int32, start: int, stop: int) -> Scores:
        """A copy of the scores from position ``start`` up to the first unknown one, at most to ``stop``."""
        if self._table is None or stop <= start:
            return np.empty(0, SCORE)
        return _known_run(self._table.reshape(-1)[self._slots(pages, start, stop)])

    def read_page(self, page: int, start: int, stop: int) -> Scores:
        """The same of one page, by offset."""
        return np.empty(0, SCORE) if self._table is None else _known_run(self._table[page, start:stop].copy())

    def forget(self, pages: Int32, offset: int = 0) -> None:
        """Drops the scores of pages that change owner, or those from ``offset`` on in each page."""
        if self._table is not None and len(pages):
            self._table["logprob"][pages, offset:] = np.nan

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Copies the scores of a page's first ``tokens`` with the page."""
        if self._table is not None:
            self._table[target, :tokens] = self._table[source, :tokens]

    def merge(self, sources: Int32, targets: Int32) -> None:
        """Copies to each target the logprobs that only its source has. A target has at least its source's tokens."""
        if self._table is None:
            return
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            unknown = np.isnan(self._table["logprob"][target])
            self._table[target, unknown] = self._table[source, unknown]

    def known(self, page: int) -> npt.NDArray[np.bool_]:
        """[page_size] which of a page's tokens have a score, for `RadixTree.check`."""
        if self._table is None:
            return np.zeros(self.page_size, np.bool_)
        return ~np.isnan(self._table["logprob"][page])

    @property
    def page_size(self) -> int:
        return self._shape[1]

    def _slots(self, pages: Int32, start: int, stop: int) -> npt.NDArray[np.int64]:
        positions, page_size = np.arange(start, stop), self.page_size
        return pages[positions // page_size].astype(np.int64) * page_size + positions % page_size


def _known_run(scores: Scores) -> Scores:
    unknown = np.isnan(scores["logprob"])
    return scores[: int(unknown.argmax())] if unknown.any() else scores


def remembered(table: ScoreTable, root: Root | None, tokens: Int32, start: int) -> Scores:
    """The scores of ``tokens[start:]`` below ``root``, up to the first that is not known. Changes nothing."""
    if root is None or not table.allocated:
        return np.empty(0, SCORE)
    walk = follow(root, tokens, 0, len(tokens), table.page_size)
    found = table.read(join(walk.pages), start, walk.length)
    if start + len(found) < walk.length:
        return found
    first = max(start, walk.length)
    longest = max(
        (table.read_page(page, first - walk.length, common) for page, common in _next_pages(walk, tokens, table)),
        key=len,
        default=found[:0],
    )
    return np.concatenate((found, longest))


def _next_pages(walk: Walk, tokens: Int32, table: ScoreTable) -> Iterator[tuple[int, int]]:
    """The pages that begin as the page at which the walk stopped, with the tokens that they share with it."""
    if walk.stopped_inside:
        yield int(walk.node.pages[walk.inside]), walk.beyond
        return
    wanted = page_key(tokens[walk.length : walk.length + table.page_size])
    for side in walk.node.nearest_first(wanted):
        for child in islice(side, SIBLINGS):
            if len(child.pages):
                yield int(child.pages[0]), common_tokens(child.key, wanted)
