"""``branchwise models``: the architectures that are served."""

from __future__ import annotations

from .console import out


def models() -> None:
    """List the architectures that are served, as the `architectures` of a config.json names them."""
    from ...runtime.models.registry import listing

    out.print(listing(), markup=False, highlight=False, soft_wrap=True)
