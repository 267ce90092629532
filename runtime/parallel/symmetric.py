"""Collectives between GPUs that reach each other's memory: torch's symmetric memory, without NVLink multicast.

Measured on two H200s, all-reduce of bfloat16 ``[B, 8192]`` in a CUDA graph, two-shot against NCCL: 7.5 and 9.9 µs
(1 row), 15.4 and 16.5 (64 rows), 23.3 and 34.2 (256), 127 and 136 (2,048).
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _register_process_group, _SymmetricMemory

from ...kernels.addends import Addends

BUFFER_BYTES = 64 << 20  # what ranks exchange at once: 8,192 tokens of 4,096 bfloat16
_ONE_SHOT_BYTES = 1 << 20  # up to here every rank reads all parts; above, each adds up a part for all (two-shot)
_ADDENDS_BYTES = {2: BUFFER_BYTES}  # the most bytes of `addends`, by the number of ranks; else `_ONE_SHOT_BYTES`


class SymmetricGroup:
    """A `TensorGroup` of CUDA tensors. Its calls can be captured in CUDA graphs.

    Every rank has a buffer that all others can read and write. A kernel that waits for another rank spins: after a rank
    has ended, the others' devices are only free once their processes have ended too.

    Args:
        name: of the group, the same for all ranks.
    """

    # A process can make one such group: torch counts the rendezvous of each process and matches ranks by that count,
    # which is 0 in a rank that has just started.
    made = False

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, name: str) -> None:
        self.rank, self.size, self._name = rank, size, name
        SymmetricGroup.made = True
        # Multicast objects belong to the host's NVLink switches, which other users may share.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        group = dist.ProcessGroup(store, rank, size)
        group._set_group_name(dist.GroupName(name))
        _register_process_group(dist.GroupName(name), group)
        # Three regions: for the other methods, and two for addends.
        self._buffer = _SymmetricMemory.empty_strided_p2p((3 * BUFFER_BYTES,), (1,), torch.uint8, device)
        self._shared = _SymmetricMemory.rendezvous(self._buffer, name)
        self._buffers = [self._shared.get_buffer(peer, (3 * BUFFER_BYTES,), torch.uint8) for peer in range(size)]
        self._addresses = [
            torch.tensor([buffer.data_ptr() + region * BUFFER_BYTES for buffer in self._buffers], device=device)
            for region in range(3)
        ]
        self._region = 1  # of the next addends

    def addends(self, x: Tensor) -> Tensor | Addends:
        """One barrier a call: a rank writes to a region again only after the barrier of the call between, which its
        peers reach after they have read the region."""
        if x.nbytes > _ADDENDS_BYTES.get(self.size, _ONE_SHOT_BYTES):
            return self.all_reduce(x)
        region, self._region = self._region, 3 - self._region
        tensors = self._parts(x, region)
        tensors[self.rank].copy_(x)
        self._shared.barrier()
        return Addends(tensors, self._addresses[region])

    def all_reduce(self, x: Tensor) -> Tensor:
        self._region = 1  # captured steps and eager ones take the same regions: each begins here, with the embedding
        if x.dtype not in (torch.bfloat16, torch.float32):  # which the kernels are for
            return self.all_reduce(x.float()).to(x.dtype)
        x = x.contiguous()
        if x.nbytes > BUFFER_BYTES:
            for part in x.split(_rows(x)):
                part.copy_(self.all_reduce(part))
            return x
        own = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        if x.nbytes <= _ONE_SHOT_BYTES:
            summed: Tensor = torch.ops.symm_mem.one_shot_all_reduce_copy(own, x, "sum", self._name)
        else:
            summed = torch.ops.symm_mem.two_shot_all_reduce_(own.copy_(x), "sum", self._name)
        return summed

    def all_gather(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.nbytes > BUFFER_BYTES:
            return torch.cat([self.all_gather(part) for part in x.split(_rows(x))], dim=1)
        parts = self._parts(x)
        parts[self.rank].copy_(x)
        self._shared.barrier()  # once all ranks have written
        gathered = torch.stack(parts)
        self._shared.barrier()  # before anyone overwrites what the others read
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        return self.all_gather(x)[0]  # token ids: a few KiB

    def _parts(self, like: Tensor, region: int = 0) -> tuple[Tensor, ...]:
        """The start of a region of each rank's buffer."""
        start = region * BUFFER_BYTES
        return tuple(buffer[start : start + like.nbytes].view(like.dtype).view(like.shape) for buffer in self._buffers)


def _rows(x: Tensor) -> int:
    """How many rows of ``x`` fit the buffer."""
    return max(1, BUFFER_BYTES * len(x) // x.nbytes)
