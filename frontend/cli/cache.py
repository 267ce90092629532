"""``branchwise cache``: the folder of ``serve --disk-cache``, while no server uses it."""

from __future__ import annotations

import datetime
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from .console import EXIT_FAILED, check_writable, expected_failures

app = typer.Typer(no_args_is_help=True, help="List, verify, prune, save and load the folder of a disk cache.")

Folder = Annotated[Path, typer.Argument(help="The folder of `serve --disk-cache`. No server may be using it.")]
File = Annotated[Path, typer.Argument(help="The file.")]
Model = Annotated[str | None, typer.Option(help="Which model's pages, as `list` names them. Default: the only one.")]
Key = Annotated[
    str | None, typer.Option(envvar="BRANCHWISE_API_KEY", help="Whose pages: the API key of their requests.")
]


@app.command("list")
def list_(folder: Folder) -> None:
    """The folder's contents, by model."""
    with expected_failures():
        from ...runtime.tiers.offline import describe

        parts = describe(folder)
        typer.echo(f"{'model':<17}{'pages':>10}{'tokens':>12}{'MiB':>10}  {'namespaces':>10}  newest")
        for part in parts:
            newest = datetime.datetime.fromtimestamp(part.newest).isoformat(" ") if part.newest else "-"
            mib = part.payload_bytes / (1 << 20)
            typer.echo(
                f"{part.digest:<17}{part.pages:>10}{part.tokens:>12}{mib:>10.1f}  {part.namespaces:>10}  {newest}"
            )
            typer.echo(f"  {part.facts['computed_by']}, {part.facts['layout']}")


@app.command()
def verify(folder: Folder) -> None:
    """Read every page, and delete those that are damaged. Exits with 1 if there were any."""
    with expected_failures():
        from ...runtime.tiers.offline import digests, open_part
        from ...runtime.tiers.offline import verify as verify_part

        damaged = 0
        for digest in digests(folder):
            with closing(open_part(folder, digest)) as part:
                good, bad = verify_part(part)
            damaged += len(bad)
            typer.echo(f"{digest}: {good} pages are good, {len(bad)} were damaged and are deleted")
        if damaged:
            raise typer.Exit(EXIT_FAILED)


@app.command()
def prune(
    folder: Folder, size: Annotated[str, typer.Option(help="Bytes to keep, such as 10GiB; 0 deletes everything.")]
) -> None:
    """Delete the oldest prefixes until the rest fits, those of other models than the last one first."""
    with expected_failures():
        from ...runtime.config import parse_bytes
        from ...runtime.tiers.offline import prune_folder

        deleted, left = prune_folder(folder, parse_bytes(size, "--size"))
        typer.echo(f"{deleted} pages deleted, {left / (1 << 20):.1f} MiB left")


@app.command()
def save(folder: Folder, file: File, model: Model = None, api_key: Key = None) -> None:
    """Write the prefixes of one key, or of requests without one, to a file that can be loaded elsewhere."""
    with expected_failures():
        from ...runtime.tiers.offline import open_part
        from ...runtime.tiers.offline import save as save_part

        with closing(open_part(folder, _chosen(folder, model))) as part:
            check_writable(file)
            with file.open("wb") as out:
                pages = save_part(part, out, _owner(folder, api_key))
        typer.echo(f"{pages} pages, {file.stat().st_size / (1 << 20):.1f} MiB")


@app.command()
def load(folder: Folder, file: File, model: Model = None, api_key: Key = None) -> None:
    """Add the prefixes of a saved file, as those of one key, or of requests without one."""
    with expected_failures():
        from ...runtime.tiers.offline import load as load_part
        from ...runtime.tiers.offline import open_part

        with closing(open_part(folder, _chosen(folder, model))) as part:
            added, there = load_part(part, file, _owner(folder, api_key))
        typer.echo(f"{added} pages added, {there} were there")


def _chosen(folder: Path, model: str | None) -> str:
    from ...runtime.errors import LoadError
    from ...runtime.tiers.offline import digests

    found = digests(folder)
    if model is None and len(found) == 1:
        return found[0]
    if not found:
        raise LoadError(f"{folder} holds no pages of any model")
    if model not in found:
        raise LoadError(f"--model: one of {', '.join(found)}")
    return model


def _owner(folder: Path, api_key: str | None) -> str:
    """The name that a server gives to the key's namespace."""
    from ...runtime.server.http.plumbing.auth import Namespaces
    from ...runtime.tiers.folder import folder_secret

    return Namespaces(api_key, folder_secret(folder)).of(None)[0]
