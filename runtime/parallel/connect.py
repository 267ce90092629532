"""Connects the ranks of one machine: which collectives a device has."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..errors import LoadError
from .devices import without_peer_access
from .gloo import GlooGroup
from .group import TensorGroup
from .place import MEET_SECONDS

REASON_CHARACTERS = 500  # of an error that torch gives


def connect(store: Path, rank: int, size: int, device: torch.device) -> TensorGroup:
    """Returns once all ranks have connected. ``store``: a file in a private directory, the same for all, by which they
    find each other. Raises `LoadError` in one line if they cannot."""
    try:
        return _connect(store, rank, size, device)
    except RuntimeError as error:  # NCCL's are many lines
        reason = " ".join(str(error).split())[:REASON_CHARACTERS]
        raise LoadError(f"the {size} ranks could not connect: {reason}") from error


def _connect(store: Path, rank: int, size: int, device: torch.device) -> TensorGroup:
    file = dist.FileStore(str(store), size)
    file.set_timeout(timedelta(seconds=MEET_SECONDS))
    if device.type == "cpu":
        return GlooGroup(file, rank, size)
    from .nccl import NcclGroup  # these need a torch for GPUs
    from .symmetric import SymmetricGroup

    file.set(f"rank/{rank}", f"{device.index} {int(SymmetricGroup.made)}")
    devices, made = zip(*(map(int, file.get(f"rank/{peer}").split()) for peer in range(size)), strict=True)
    if any(made) or without_peer_access(list(devices)):
        return NcclGroup(file, rank, size, device)
    return SymmetricGroup(file, rank, size, device, f"branchwise-{store.parent.name}")
