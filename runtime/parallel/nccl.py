"""Collectives between GPUs: NCCL."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .place import MEET_SECONDS

_SETTINGS = {
    "NCCL_NVLS_ENABLE": "0",  # NVLink multicast objects are shared by everyone who uses the host's GPUs
    "NCCL_GRAPH_REGISTER": "0",  # replayed graphs with registered buffers were seen to hang (SGLang sets it too)
    "NCCL_SOCKET_IFNAME": "lo",  # the ranks are on one machine
}


class NcclGroup:
    """A `TensorGroup` of CUDA tensors. Its calls can be captured in CUDA graphs, by all ranks in the same order."""

    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=MEET_SECONDS)
        self._group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        self.all_reduce(torch.zeros(1, device=device))  # connects: captured calls cannot
        torch.cuda.synchronize(device)

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def addends(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        self._group._allgather_base(gathered, x.contiguous()).wait()
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.broadcast([x]).wait()
        return x
