"""The minimum that a server must compute: every distinct prefix once. The upper bound of a cached share.

A perfect prefix cache reuses, for each request, the longest prefix that any request sent before it has (finished or
not), and any output already received. At least one prompt token is always computed: its logits give the first token.
The last generated token was never computed, so its KV cannot be reused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]


@dataclass(slots=True)
class _Node:
    tokens: Ids
    children: dict[int, _Node] = field(default_factory=dict)


class Trie:
    """A compressed trie of token sequences. Independent of `branchwise.radix`, so that it can check it."""

    def __init__(self) -> None:
        self._root = _Node(np.empty(0, np.int32))
        self.size = 0  # distinct tokens: the number of distinct non-empty prefixes

    def add(self, tokens: Ids) -> int:
        """Inserts ``tokens``; returns how many leading tokens were already in it."""
        node, start = self._root, 0
        while start < len(tokens):
            child = node.children.get(int(tokens[start]))
            if child is None:
                node.children[int(tokens[start])] = _Node(tokens[start:])
                break
            rest = tokens[start : start + len(child.tokens)]
            differ = np.flatnonzero(rest != child.tokens[: len(rest)])
            same = int(differ[0]) if len(differ) else len(rest)
            start += same
            if same < len(child.tokens):
                upper = _Node(child.tokens[:same], {int(child.tokens[same]): child})
                child.tokens = child.tokens[same:]
                node.children[int(upper.tokens[0])] = upper
                child = upper
            node = child
        self.size += len(tokens) - start
        return start


class IdealCache:
    """Replays what a client sent and received, in that order, against a cache that never evicts."""

    def __init__(self) -> None:
        self._trie = Trie()
        self.prompt_tokens = 0
        self.computed_tokens = 0

    def sent(self, prompt: list[int]) -> None:
        known = min(self._trie.add(np.array(prompt, np.int32)), len(prompt) - 1)
        self.prompt_tokens += len(prompt)
        self.computed_tokens += len(prompt) - known

    def received(self, prompt: list[int], output: list[int]) -> None:
        self._trie.add(np.array(prompt + output[:-1], np.int32))

    @property
    def cached_tokens(self) -> int:
        return self.prompt_tokens - self.computed_tokens

    @property
    def cached_share(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
