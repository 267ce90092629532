"""Connects the ranks of one machine: which collectives a device has."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .gloo import GlooGroup
from .group import TensorGroup
from .place import MEET_SECONDS


def connect(store: Path, rank: int, size: int, device: torch.device) -> TensorGroup:
    """Returns once all ranks have connected. ``store``: a file in a private directory, the same for all, by which they
    find each other. Raises RuntimeError if one of them does not come."""
    file = dist.FileStore(str(store), size)
    file.set_timeout(timedelta(seconds=MEET_SECONDS))
    if device.type == "cpu":
        return GlooGroup(file, rank, size)
    from .nccl import NcclGroup

    return NcclGroup(file, rank, size, device)
