"""A process's place among the ranks, and how it meets the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .group import SingleRank, TensorGroup

MEET_SECONDS = 60.0  # how long the ranks may take to connect, once all have loaded their weights


@dataclass(frozen=True, slots=True)
class Place:
    """Rank ``rank`` of ``size``.

    ``meet(device)`` connects the ranks. Each calls it once, after its weights are loaded: loading takes a time of its
    own on each, and a rank that cannot load must not leave the others waiting in a collective.
    """

    rank: int
    size: int
    meet: Callable[[torch.device], TensorGroup]


ALONE = Place(0, 1, lambda device: SingleRank())
