"""The radix tree for people: the dump with the text of each node's first tokens, and a drawing of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..tokenizer import Tokenizer

_SHOWN = 48  # characters of a node's text


def add_text(dump: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Gives every node of ``RadixTree.dump`` a ``text``: that of the tokens in its ``preview``. Changes it in place."""
    nodes = [child for namespace in dump["namespaces"] for child in namespace["children"]]
    while nodes:
        node = nodes.pop()
        node["text"] = tokenizer.decode(node["preview"], skip_special_tokens=False)
        nodes += node["children"]
    return dump


def tree_text(dump: dict[str, Any]) -> str:
    """One line a node: tokens, pages, leases, hits, and how its text begins. Takes what `add_text` returns."""
    lines: list[str] = []
    for namespace in dump["namespaces"]:
        title = "default" if not namespace["owner"] else f"owner {namespace['owner'][:8]}"
        if namespace["salt"]:
            title += f", salt {namespace['salt'][:_SHOWN]!r}"
        lines.append(f"{title} ({namespace['leases']} requests)")
        lines += _branches(namespace, "")
    totals = dump["totals"]
    lines.append(
        f"{totals['nodes']} nodes, {totals['cached']} of {totals['pages']} pages cached, {totals['free']} free, "
        f"{totals['page_size']} tokens a page"
    )
    return "\n".join(lines) + "\n"


def _branches(parent: dict[str, Any], indent: str) -> Iterator[str]:
    children = parent["children"]
    omitted = parent.get("omitted", 0)
    for i, child in enumerate(children):
        last = i == len(children) - 1 and not omitted
        yield f"{indent}{'└─' if last else '├─'} {_describe(child)}"
        yield from _branches(child, indent + ("   " if last else "│  "))
    if omitted:
        yield f"{indent}└─ … {omitted} more"


def _describe(node: dict[str, Any]) -> str:
    text = node["text"]
    more = "…" if node["tokens"] > len(node["preview"]) or len(text) > _SHOWN else ""
    facts = [f"{node['tokens']} tokens"]
    if node["leases"]:
        facts.append(f"{node['leases']} leases")
    if node["hits"]:
        facts.append(f"{node['hits']} hits")
    return f"{text[:_SHOWN]!r}{more}  [{', '.join(facts)}]"
