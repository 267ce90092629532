"""The ``branchwise`` command and its sub-commands."""

from __future__ import annotations

import typer

from . import (
    architectures,
    bench,
    cache,
    chat,
    cluster,
    docs,
    doctor,
    generate,
    peers,
    pull,
    serve,
    simulate,
    top,
    tree,
)

app = typer.Typer(
    name="branchwise",
    help="Serve language models to programs that branch: every shared prefix is computed once.",
    epilog="Start with **branchwise serve**, and in another terminal **branchwise chat http://127.0.0.1:8000**. "
    "**branchwise docs** has the manual, the tutorial of the language and the way to the examples.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from ... import __version__

        typer.echo(f"branchwise {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", help="Print the version and leave.", callback=_version, is_eager=True
    ),
) -> None:
    pass


app.command("serve", cls=peers.KnowsPeers)(serve.serve)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("tree")(tree.tree)
app.command("top")(top.top)
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("models")(architectures.models)
app.command("pull")(pull.pull)
app.command("simulate")(simulate.simulate)
app.command("docs")(docs.docs)
app.add_typer(cache.app, name="cache")
app.add_typer(cluster.app, name="cluster")


def main() -> None:
    app()
