"""Connects the ranks of one machine: which collectives a device has."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .devices import without_peer_access
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
    from .nccl import NcclGroup  # these need a torch for GPUs
    from .symmetric import SymmetricGroup

    file.set(f"device/{rank}", str(device.index))
    devices = [int(file.get(f"device/{peer}")) for peer in range(size)]
    if not without_peer_access(devices):
        return SymmetricGroup(file, rank, size, device, f"branchwise-{store.parent.name}")
    return NcclGroup(file, rank, size, device)
