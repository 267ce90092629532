"""``branchwise tree``: draws what a server remembers."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import escape, expected_failures, out
from .options import ApiKey, ServerUrl

if TYPE_CHECKING:
    from rich.tree import Tree


def tree(
    url: ServerUrl,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's own JSON.")] = False,
) -> None:
    """Draw the radix tree of a running server: every prefix it remembers, and who uses it.

    On a terminal the tree is drawn in colour; in a pipe it is plain text.
    """
    with expected_failures():
        from ..client import ServerClient

        server = ServerClient(url, api_key, timeout=30.0)
        if as_json:
            typer.echo(json.dumps(server.get("/cache/tree"), indent=1))
        elif out.is_terminal:
            out.print(draw(server.get("/cache/tree")))
        else:
            typer.echo(server.get_text("/cache/tree?format=text"))


def draw(dump: dict[str, Any]) -> Tree:
    """The tree as rich draws it: a branch per node, with its tokens, what it begins with, and who uses it."""
    from rich.tree import Tree

    totals = dump["totals"]
    page_size = totals["page_size"]
    drawn = Tree(
        f"[bold]{totals['cached'] * page_size:,} tokens remembered[/] in {totals['nodes']:,} nodes; "
        f"{totals['cached']:,} of {totals['pages']:,} pages of {page_size} tokens, {totals['evicted']:,} evicted",
        guide_style="dim",
    )
    for namespace in dump["namespaces"]:
        name = " ".join(part for part in (namespace["owner"][:12], namespace["salt"]) if part) or "default"
        branch = drawn.add(f"[cyan]namespace {escape(name)}[/]")
        for child in namespace["children"]:
            _draw_node(branch, child)
        _draw_omitted(branch, namespace)
    return drawn


def _draw_node(parent: Tree, node: dict[str, Any]) -> None:
    text = node.get("text")
    begins = escape(repr(text)) if text is not None else " ".join(map(str, node["preview"])) + " …"
    used = f"  [green]{node['leases']} using[/]" if node["leases"] else ""
    hits = f"  {node['hits']} hits" if node["hits"] else ""
    branch = parent.add(f"[bold]{node['tokens']:,}[/] tokens  [dim]{begins}[/]{hits}{used}")
    for child in node["children"]:
        _draw_node(branch, child)
    _draw_omitted(branch, node)


def _draw_omitted(branch: Tree, node: dict[str, Any]) -> None:
    if node.get("omitted"):
        branch.add(f"[dim]… and {node['omitted']:,} more[/]")
