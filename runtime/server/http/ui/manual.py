"""The pages of the manual: Markdown files of the package, for ``/docs`` and ``branchwise docs``."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[4]  # of the package, which is the repository's root in a checkout
BASE = "/docs"


@cache
def pages() -> dict[str, Path]:
    """The manual's pages by name: ``README``, ``architecture``, ``http/chat`` (``http`` is ``docs/http/README.md``)."""
    found = {"README": ROOT / "README.md"} if (ROOT / "README.md").is_file() else {}
    for file in sorted((ROOT / "docs").rglob("*.md")):
        name = file.relative_to(ROOT / "docs").with_suffix("").as_posix()
        found[name.removesuffix("/README")] = file
    return found


@cache
def images() -> dict[str, Path]:
    """The pictures of the pages, by their path below `BASE`."""
    folder = ROOT / "docs"
    files = (file for file in sorted(folder.rglob("*")) if file.suffix in (".png", ".svg"))
    return {f"{BASE}/{file.relative_to(folder).as_posix()}": file for file in files}


def title(page: Path) -> str:
    """Its first heading."""
    with page.open(encoding="utf-8") as lines:
        return next((line.lstrip("# ").strip() for line in lines if line.startswith("# ")), page.stem)


def body(name: str) -> str:
    """A page as HTML. Links between pages lead to where they are served; those to files that are not become text."""
    file = pages()[name]
    parser = _parser()
    tokens = parser.parse(file.read_text(encoding="utf-8"))
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", slug(tokens[i + 1].content))
        elif token.type in ("td_open", "th_open") and token.attrs.pop("style", None) == "text-align:right":
            token.attrSet("class", "right")
        elif token.children:
            token.children = _relinked(token.children, file)
    return str(parser.renderer.render(tokens, parser.options, {}))


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub writes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable("table")


def _relinked(tokens: list[Token], page: Path) -> list[Token]:
    kept, dropped = [], False
    for token in tokens:
        attribute = {"link_open": "href", "image": "src"}.get(token.type)
        if attribute is not None:
            target = _target(str(token.attrGet(attribute)), page)
            dropped = target is None
            if target is None:
                continue
            token.attrSet(attribute, target)
        elif token.type == "link_close" and dropped:
            dropped = False
            continue
        kept.append(token)
    return kept


def _target(link: str, page: Path) -> str | None:
    """Where a link of ``page`` leads on the server; None if the file is not served."""
    parts = urlsplit(link)
    if parts.scheme or not parts.path:
        return link
    file = (page.parent / parts.path).resolve()
    if file.is_dir():
        file /= "README.md"
    served = {path: f"{BASE}/{name}" for name, path in pages().items()}
    served |= {path: where for where, path in images().items()}
    where = served.get(file)
    return None if where is None else where + (f"#{parts.fragment}" if parts.fragment else "")


def find(name: str) -> str | None:
    """The page that a person means: its name, its path, or the last part of a name that only one page has."""
    wanted = PurePosixPath(name.removeprefix("docs/")).with_suffix("").as_posix().removesuffix("/README")
    by_case = {page.lower(): page for page in pages()}
    if wanted.lower() in by_case:
        return by_case[wanted.lower()]
    ends = [page for page in pages() if page.rpartition("/")[2].lower() == wanted.lower()]
    return ends[0] if len(ends) == 1 else None
