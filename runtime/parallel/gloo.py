"""Collectives between processes of one machine's CPUs: gloo, over the loopback interface."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .place import MEET_SECONDS

# A step on a CPU may take long; a rank that has died closes its connections, which ends the call at once.
_STEP_SECONDS = 3600.0


class GlooGroup:
    """A `TensorGroup` of CPU tensors. A call raises RuntimeError when another rank has ended."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        gloo: Any = dist.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname="127.0.0.1")]
        options._timeout = timedelta(seconds=MEET_SECONDS)
        self._group = gloo(store, rank, size, options)
        self._group._set_default_timeout(timedelta(seconds=_STEP_SECONDS))

    def all_reduce(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.allreduce([x]).wait()
        return x

    def addends(self, x: Tensor) -> Tensor:
        return self.all_reduce(x)

    def all_gather(self, x: Tensor) -> Tensor:
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype)
        self._group.allgather([list(gathered.unbind())], [x.contiguous()]).wait()
        return gathered

    def broadcast(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        self._group.broadcast(x, 0).wait()
        return x
