"""Which GPU each rank has, and whether the ranks reach each other's memory."""

from __future__ import annotations

import os
from itertools import permutations

import torch


def rank_devices(first: int, size: int) -> list[int]:
    """The GPU of each rank: side by side, unless torch's own switch for tests puts all of them on one."""
    if os.environ.get("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES") == "1":
        return [first] * size
    return list(range(first, first + size))


def without_peer_access(devices: list[int]) -> list[tuple[int, int]]:
    """The pairs of GPUs of which the first cannot read and write the memory of the second."""
    return [(a, b) for a, b in permutations(devices, 2) if a != b and not torch.cuda.can_device_access_peer(a, b)]
