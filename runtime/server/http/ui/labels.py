"""The text of each node of a dumped tree, remembered while the node is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Labels:
    """Decodes new nodes only: decoding a thousand of them for each snapshot would take 20 ms."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._texts: dict[tuple[int, ...], str] = {}

    def add(self, tree: dict[str, Any]) -> None:
        """Replaces each node's ``preview`` (token ids) with its ``text``, in place."""
        texts: dict[tuple[int, ...], str] = {}
        nodes = [child for namespace in tree["namespaces"] for child in namespace["children"]]
        while nodes:
            node = nodes.pop()
            ids = tuple(node.pop("preview"))
            text = self._texts.get(ids)
            node["text"] = texts[ids] = self._decode(ids) if text is None else text
            nodes += node["children"]
        self._texts = texts
