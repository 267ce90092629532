"""``branchwise models``: the architectures that are served."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import expected_failures, out


def models(
    transformers: Annotated[
        bool,
        typer.Option("--transformers", help="Also try every architecture of the installed transformers: a minute."),
    ] = False,
) -> None:
    """List the architectures that are served, as the `architectures` of a config.json names them.

    With --transformers, also those that transformers computes with our attention, and why the others are refused.
    """
    from ...runtime.models.registry import listing

    out.print(listing(), markup=False, highlight=False, soft_wrap=True)
    if transformers:
        with expected_failures():
            from ...runtime.models.hf.survey import survey_listing

            out.print(survey_listing(), markup=False, highlight=False, soft_wrap=True)
