"""``branchwise pull``: downloads a model, so that it can be served without a network."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import expected_failures, out


def pull(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Hugging Face hub id, such as Qwen/Qwen3-0.6B.")],
) -> None:
    """Download a model from the Hugging Face hub, and print its folder.

    Checks first that this machine can serve it: a model that cannot be served is not downloaded. What is already
    there is not downloaded again. HF_HOME sets the folder, HF_TOKEN logs in, HF_ENDPOINT names another hub.
    """
    with expected_failures():
        from ...runtime.config import EngineConfig
        from ...runtime.models.folder import model_folder
        from .serve import check_before_download

        check_before_download(EngineConfig(model=model))
        typer.echo(model_folder(model))
        if out.is_terminal:
            out.print(f"serve it: branchwise serve {model}", style="dim", markup=False)
