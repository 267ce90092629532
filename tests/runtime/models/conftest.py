"""A decoder with a paged pool of its own, and transformers' logits to compare with."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from branchwise.kernels import ops as torch_ops
from branchwise.kernels.addends import Addends
from branchwise.kernels.attention.base import AttentionBatch
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.file_weight import FileWeight
from branchwise.kernels.kv_pool import KVPool
from branchwise.runtime.models.config import load_config
from branchwise.runtime.models.decoder import Decoder, StepTokens
from branchwise.runtime.models.loader import load_weights
from branchwise.runtime.parallel.group import SingleRank, TensorGroup

Tokens = npt.NDArray[np.int64]


class Harness:
    """Runs chunks of requests; every row's pages are scattered over the pool, page 0 is poison and never used."""

    def __init__(
        self,
        folder: Path,
        page_size: int,
        rows: int = 6,
        max_len: int = 160,
        group: TensorGroup | None = None,
        ops: Any = torch_ops,
    ) -> None:
        config, group = load_config(folder), group or SingleRank()
        cpu = torch.device("cpu")
        in_files: dict[str, FileWeight] = {}
        weights = load_weights(folder, config, torch.float32, cpu, rank=group.rank, world=group.size, in_files=in_files)
        self.decoder = Decoder(config, weights, ops, group, in_files=in_files)
        config = self.decoder.config
        self.decoder.reserve(max_len)
        pages = -(-max_len // page_size)
        order = np.random.default_rng(7).permutation(rows * pages) + 1
        self.table = order.reshape(rows, pages).astype(np.int32)
        shape = (config.num_layers, 2, rows * pages + 1, page_size, config.num_kv_heads, config.head_dim)
        data = torch.zeros(shape)
        data[:, :, 0] = 1e4
        self.pool = KVPool(data)
        self.attention = TorchAttention(self.pool, self.decoder.layer_specs(), config.num_heads)

    def step(
        self, chunks: Sequence[tuple[int, Tokens, int]], num_decodes: int = 0, outputs: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """``chunks``: (row, query tokens, position of the first). Returns the logits of each chunk's tokens, or of the
        query tokens ``outputs`` alone."""
        rows = np.array([row for row, _, _ in chunks], np.int32)
        q_lens = np.array([len(tokens) for _, tokens, _ in chunks], np.int32)
        kv_lens = np.array([start + len(tokens) for _, tokens, start in chunks], np.int32)
        batch = AttentionBatch(
            rows, q_lens, kv_lens, num_decodes, self.pool.layout.page_size, torch.from_numpy(self.table), self.table
        )
        tokens = StepTokens(
            torch.from_numpy(np.concatenate([tokens for _, tokens, _ in chunks])),
            torch.cat([torch.arange(start, start + len(tokens)) for _, tokens, start in chunks]),
            torch.from_numpy(batch.query_slots()),
        )
        with torch.inference_mode():
            self.attention.plan(batch)
            hidden = self.decoder.forward(tokens, self.pool, self.attention, outputs)
            logits = self.decoder.logits(hidden)
        return list(logits.split(q_lens.tolist())) if outputs is None else [logits]


class ThreadGroup:
    """A `TensorGroup` whose ranks are threads of one process."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, size
        self._slots, self._barrier = slots, barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._slots[self.rank] = x.clone()
        self._barrier.wait(100)
        everyone = list(self._slots)
        self._barrier.wait(100)
        return everyone

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(torch.stack(self._exchange(x)).sum(0))

    def addends(self, x: torch.Tensor) -> Addends:
        return Addends(tuple(self._exchange(x)), torch.empty(0))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x))

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self._exchange(x)[0])


def _on_ranks(size: int, work: Callable[[ThreadGroup], Any]) -> list[Any]:
    """What ``work`` returns on each of ``size`` ranks."""
    slots, barrier = [None] * size, threading.Barrier(size)
    groups = [ThreadGroup(rank, size, slots, barrier) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, groups))


@pytest.fixture(scope="session")
def on_ranks() -> Callable[[int, Callable[[ThreadGroup], Any]], list[Any]]:
    """``on_ranks(size, work)`` is what ``work(group)`` returns on each rank."""
    return _on_ranks


@pytest.fixture(scope="session")
def harness(checkpoint: Callable[[str], Path]) -> Callable[..., Harness]:
    return lambda family, page_size, **options: Harness(checkpoint(family), page_size, **options)


@pytest.fixture(scope="session")
def harness_of() -> Callable[[Path], Harness]:
    return lambda folder: Harness(folder, 16)


@pytest.fixture(scope="session")
def prompt() -> Tokens:
    """The token ids every family is asked about."""
    return np.random.default_rng(0).integers(2, 300, 120)


def _logits_of(checkpoint: Callable[[str], Path], prompt: Tokens, dtype: torch.dtype) -> Callable[[str], torch.Tensor]:
    """Of transformers, each family's computed once."""

    @functools.cache
    def logits(family: str) -> torch.Tensor:
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(
            checkpoint(family), dtype=dtype, attn_implementation="eager"
        ).eval()
        with torch.no_grad():
            found: torch.Tensor = model(torch.from_numpy(prompt)[None]).logits[0]
        return found

    return logits


@pytest.fixture(scope="session")
def exact(checkpoint: Callable[[str], Path], prompt: Tokens) -> Callable[[str], torch.Tensor]:
    """``exact(family)``: transformers' float64 logits ``[120, vocab]`` of `prompt`."""
    return _logits_of(checkpoint, prompt, torch.float64)


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path], prompt: Tokens) -> Iterator[Callable[[str], torch.Tensor]]:
    """``reference(family)``: transformers' float32 logits ``[120, vocab]`` of `prompt`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield _logits_of(checkpoint, prompt, torch.float32)
    torch.set_num_threads(threads)
