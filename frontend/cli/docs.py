"""``branchwise docs``: the manual, which is part of the package."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import expected_failures, out


def docs(
    page: Annotated[
        str, typer.Argument(metavar="PAGE", help="Its name in the list, such as http/chat.", show_default=False)
    ] = "",
) -> None:
    """Read the manual: without a page, list all of them and say where the examples are.

    A running server shows the same pages, and a reference of every route, at **/docs**.
    """
    with expected_failures():
        from ...runtime.errors import BranchwiseError
        from ...runtime.server.http.ui import manual

        if not page:
            width = max(map(len, manual.pages()))
            for name, file in manual.pages().items():
                out.print(f"  {name:{width}}  {manual.title(file)}", markup=False, soft_wrap=True)
            out.print("\nbranchwise docs PAGE shows one; branchwise serve has them at /docs", style="dim", markup=False)
            out.print(f"examples: {manual.ROOT / 'examples'}", markup=False, soft_wrap=True)
            return
        name = manual.find(page) or ""
        if not name:
            raise BranchwiseError(f"no page is called {page}: branchwise docs lists them")
        text = manual.pages()[name].read_text(encoding="utf-8")
        if not out.is_terminal:
            typer.echo(text)
            return
        from rich.markdown import Markdown

        with out.pager(styles=True):
            out.print(Markdown(text, hyperlinks=False))
