"""``branchwise tree``: draws the radix tree of a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import escape, expected_failures, out
from .options import LOCAL_SERVER, ApiKey, ServerUrl, ServerUrlFlag, one_of

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

_SHOWN = 72  # characters of a node's text


def tree(
    url: ServerUrl = None,
    url_flag: ServerUrlFlag = None,
    api_key: ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's own JSON.")] = False,
    max_nodes: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Nodes to draw; the others are counted.")
    ] = 1000,
) -> None:
    """Draw the radix tree of a running server: every cached prefix, and the requests that use it.

    On a terminal the tree is drawn in colour; in a pipe it is plain text.
    """
    with expected_failures():
        from ..client import Client

        server = Client(one_of(url, url_flag, "--url") or LOCAL_SERVER, api_key, timeout=30.0)
        path = f"/cache/tree?max_nodes={max_nodes}"
        if as_json:
            typer.echo(json.dumps(server.get(path), indent=1))
        elif out.is_terminal:
            out.print(draw(server.get(path)))
        else:
            typer.echo(server.get_text(f"{path}&format=text"))


def draw(dump: dict[str, Any]) -> Tree:
    """The tree for rich: a branch for each node, with its tokens, how its text begins, and how many requests use it."""
    from rich.tree import Tree

    from ...runtime.server.http.native.tree_text import counted, namespace_title

    totals = dump["totals"]
    page_size = totals["page_size"]
    title = "[bold]cached[/]"
    if "nodes" in totals:  # a tenant's view has no sums
        tokens, nodes = counted(totals["cached"] * page_size, "token"), counted(totals["nodes"], "node")
        title = (
            f"[bold]{tokens} cached[/] in {nodes}; {totals['cached']:,} of "
            f"{counted(totals['pages'], 'page')} of {counted(page_size, 'token')}, {totals['evicted']:,} evicted"
        )
    drawn = Tree(title, guide_style="dim")
    for namespace in dump["namespaces"]:
        branch = drawn.add(_line(f"[cyan]{escape(namespace_title(namespace))}[/]"))
        _draw_children(branch, namespace)
    if dump["omitted"]:
        drawn.add(f"[dim]… {counted(dump['omitted'], 'more namespace')}[/]")
    return drawn


def _line(markup: str) -> Text:
    """A label that is cut at the terminal's width: a tree of wrapped lines is hard to read."""
    from rich.text import Text

    line = Text.from_markup(markup, overflow="ellipsis")
    line.no_wrap = True
    return line


def _draw_children(parent: Tree, node: dict[str, Any]) -> None:
    from ...runtime.server.http.native.tree_text import branch_labels, counted

    for child, begins in zip(node["children"], branch_labels(node["children"], _SHOWN), strict=True):
        facts = [f"[bold]{child['tokens']:,}[/] {'token' if child['tokens'] == 1 else 'tokens'}"]
        if child["hits"]:
            facts.append(counted(child["hits"], "hit"))
        if child["leases"]:
            facts.append(f"[green]{child['leases']} using[/]")
        branch = parent.add(_line(f"{', '.join(facts)}  [dim]{escape(begins)}[/]"))
        _draw_children(branch, child)
    _draw_omitted(parent, node)


def _draw_omitted(branch: Tree, node: dict[str, Any]) -> None:
    if node.get("omitted"):
        branch.add(f"[dim]… and {node['omitted']:,} more[/]")
