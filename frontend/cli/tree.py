"""``branchwise tree``: draws the radix tree of a server."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import expected_failures, out
from .options import LOCAL_SERVER, ApiKey, ServerUrl, ServerUrlFlag, one_of

if TYPE_CHECKING:
    from rich.console import RenderableType

_STYLES = {
    "cyan": r"(?m)^.+(?=  \[[\d,]+ leases?\]$)",  # the title of a namespace
    "bold": r"(?m)(?<=─ )[\d,]+ tokens?",
    "green": r"(?m)(?<=, )[\d,]+ leases?(?=[ ,])",
    "dim": r"(?m)^[│ ]*[├└]─|  ['\"].*$|….*$",
}


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
            typer.echo(server.get_text(f"{path}&format=text"), nl=False)


def draw(dump: dict[str, Any]) -> RenderableType:
    """The server's text of the tree, in colour. Lines are cut at the terminal's width, not wrapped."""
    from rich.console import Group
    from rich.text import Text

    from ...runtime.server.http.native.tree_text import tree_text

    drawn = Text(tree_text(dump).rstrip("\n"), no_wrap=True, overflow="ellipsis")
    for style, pattern in _STYLES.items():
        drawn.highlight_regex(pattern, style)
    return Group(drawn)  # printed by itself, a Text is wrapped
