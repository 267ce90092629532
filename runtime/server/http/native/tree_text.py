"""The radix tree as text: the dump with the text of each node's first tokens, and a drawing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

from ....tokenizer.tokenizer import Tokenizer

_SHOWN = 72  # characters of a node's text
_HEAD = 8  # of those, how many stay of a beginning that siblings share
_BEFORE = 6  # and how many before the place where they part


Decode = Callable[[tuple[int, ...]], str]


def decoder(tokenizer: Tokenizer, remembered: int = 0) -> Decode:
    """Tokens to text for `add_text`, special tokens spelled out. ``remembered``: how many texts are kept: decoding a
    thousand nodes again for each snapshot would take 20 ms."""
    return lru_cache(remembered)(lambda ids: tokenizer.decode(ids, skip_special_tokens=False))


def add_text(dump: dict[str, Any], decode: Decode, *, keep_preview: bool = True) -> dict[str, Any]:
    """Gives every node of ``RadixTree.dump`` a ``text``: that of the tokens in its ``preview``. Changes it in place."""
    nodes = [child for namespace in dump["namespaces"] for child in namespace["children"]]
    while nodes:
        node = nodes.pop()
        node["text"] = decode(tuple(node["preview"]))
        if not keep_preview:
            del node["preview"]
        nodes += node["children"]
    return dump


def tree_text(dump: dict[str, Any]) -> str:
    """One line a node: tokens, leases, hits, and how its text begins; then the sums, which a tenant's view lacks. Takes
    what `add_text` returns."""
    lines: list[str] = []
    for namespace in dump["namespaces"]:
        lines.append(f"{namespace_title(namespace)}  [{counted(namespace['leases'], 'lease')}]")
        lines += _branches(namespace, "")
    if dump["omitted"]:
        lines.append(f"… {counted(dump['omitted'], 'more namespace')}")
    totals = dump["totals"]
    if "nodes" in totals:
        lines.append(
            f"{counted(totals['nodes'], 'node')}, {totals['cached']:,} of {counted(totals['pages'], 'page')} cached, "
            f"{totals['free']:,} free, {totals['evicted']:,} evicted, {counted(totals['page_size'], 'token')} a page"
        )
    return "\n".join(lines or ["nothing is cached"]) + "\n"


def counted(count: int, noun: str) -> str:
    """``1 hit``, ``1,200 hits``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def namespace_title(namespace: dict[str, Any]) -> str:
    """The title of a namespace. Owner and salt are digests: their beginnings tell them apart."""
    parts = [f"{word} {namespace[name][:8]}" for name, word in (("owner", "key"), ("salt", "salt")) if namespace[name]]
    return ", ".join(parts) or "default (requests without a key or a salt)"


def branch_labels(nodes: Sequence[dict[str, Any]], width: int = _SHOWN) -> list[str]:
    """Labels of siblings: their texts in quotes, cut to ``width`` characters.

    A branch begins at a page, so the texts of siblings may begin alike: then the middle of what they share is left
    out, and the place where they part is shown.
    """
    texts = [str(node["text"]) for node in nodes]
    order = sorted(range(len(texts)), key=texts.__getitem__)
    shared = [0] * len(texts)  # characters in common with the most similar sibling: a neighbour in sorted order
    for left, right in pairwise(order):
        same = _in_common(texts[left], texts[right])
        shared[left], shared[right] = max(shared[left], same), max(shared[right], same)
    labels = []
    for node, text, same in zip(nodes, texts, shared, strict=True):
        begin = same - _BEFORE
        if len(text) > width and begin > _HEAD + 1:
            rest = text[begin : begin + width - _HEAD - 1]
            label, whole = f"{text[:_HEAD]}…{rest}", begin + len(rest) == len(text)
        else:
            label, whole = text[:width], len(text) <= width
        more = "" if whole and node["tokens"] <= len(node.get("preview", ())) else "…"
        labels.append(f"{label!r}{more}")
    return labels


def _in_common(left: str, right: str) -> int:
    """Characters both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (one, other) in pairs if one != other), min(len(left), len(right)))


def _branches(parent: dict[str, Any], indent: str) -> Iterator[str]:
    children = parent["children"]
    omitted = parent.get("omitted", 0)
    for i, (child, label) in enumerate(zip(children, branch_labels(children), strict=True)):
        last = i == len(children) - 1 and not omitted
        yield f"{indent}{'└─' if last else '├─'} {', '.join(_facts(child))}  {label}"
        yield from _branches(child, indent + ("   " if last else "│  "))
    if omitted:
        yield f"{indent}└─ … {omitted:,} more"


def _facts(node: dict[str, Any]) -> Iterator[str]:
    yield counted(node["tokens"], "token")
    for name in ("lease", "hit"):
        if node[f"{name}s"]:
            yield counted(node[f"{name}s"], name)
