"""How the tree is shown: siblings can be told apart, counts agree with nouns, nothing is wider than the terminal."""

from __future__ import annotations

import os
from typing import Any

from rich.console import Console

from branchwise.frontend.cli.tree import draw
from branchwise.runtime.server.http.native.tree_text import branch_labels, tree_text


def node(text: str, *children: dict[str, Any], **facts: int) -> dict[str, Any]:
    return {"text": text, "tokens": 9, "preview": [1] * 9, "leases": 0, "hits": 0, "children": list(children)} | facts


def dump(*children: dict[str, Any], owner: str = "", salt: str = "") -> dict[str, Any]:
    totals = {"nodes": len(children), "cached": 1, "pages": 2000, "free": 1999, "page_size": 16, "evicted": 0}
    return {
        "namespaces": [{"owner": owner, "salt": salt, "leases": 1, "children": list(children)}],
        "omitted": 0,
        "totals": totals,
    }


def test_siblings_look_different_however_long_they_begin_alike() -> None:
    alike = "the same words again and again, " * 3
    labels = branch_labels([node(alike + "left"), node(alike + "right"), node("something else"), node(alike[:60])])
    assert len(set(labels)) == 4
    assert labels[0].startswith("'the same…") and labels[0].endswith("left'")
    assert labels[1].endswith("right'") and labels[2] == "'something else'"
    assert all(len(label) <= 72 + 3 for label in labels)


def test_an_only_child_begins_at_its_beginning() -> None:
    assert branch_labels([node("x" * 100)], 10) == ["'xxxxxxxxxx'…"]
    assert branch_labels([node("short", tokens=20)]) == ["'short'…"]
    assert branch_labels([]) == []


def test_one_is_singular() -> None:
    text = tree_text(dump(node("a", tokens=1, hits=1, leases=1), node("b", hits=2)))
    assert "─ 1 token, 1 lease, 1 hit  'a'" in text and "─ 9 tokens, 2 hits  'b'" in text
    assert "[1 lease]" in text and "1 of 2,000 pages" in text


def test_namespaces_are_explained() -> None:
    assert tree_text(dump()).startswith("default (requests without a key or a salt)")
    assert tree_text(dump(owner="0123456789", salt="abcdefghij")).startswith("key 01234567, salt abcdefgh  [")


def test_namespaces_left_out_are_counted() -> None:
    assert "… 7 more namespaces\n" in tree_text(dump(node("a")) | {"omitted": 7})
    assert "… 1 more namespace\n" in tree_text(dump(node("a")) | {"omitted": 1})
    assert "more" not in tree_text(dump(node("a")) | {"omitted": 0})
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(draw(dump(node("a")) | {"omitted": 7}))
    assert "… 7 more namespaces" in console.export_text()


def test_a_narrow_terminal_cuts_labels_and_keeps_the_facts() -> None:
    console = Console(width=40, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(draw(dump(node("a [b]long[/b] text " * 9, node("below " * 20, hits=1), hits=3), node("n"))))
    lines = console.export_text().splitlines()
    drawn = lines[next(i for i, line in enumerate(lines) if "default" in line) :]
    assert len(drawn) == 5 and all(len(line) <= 40 for line in drawn)
    assert "9 tokens, 3 hits" in drawn[1] and "[b]" in drawn[1] and "9 tokens, 1 hit " in drawn[2]
    assert drawn[1].rstrip().endswith("…") and drawn[2].rstrip().endswith("…")
