"""What symmetric memory's group does around torch's kernels, with stand-ins for these: ranks are threads, on a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from branchwise.kernels.addends import Addends, summed
from branchwise.runtime.parallel import symmetric
from branchwise.runtime.parallel.symmetric import SymmetricGroup

SIZE = 2


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[SymmetricGroup]:
    monkeypatch.setattr(symmetric, "BUFFER_BYTES", 256)
    monkeypatch.setattr(symmetric, "_ONE_SHOT_BYTES", 64)
    monkeypatch.setattr(symmetric, "_ADDENDS_BYTES", {2: 256})
    barrier = threading.Barrier(SIZE)
    buffers = [torch.zeros(3 * 256, dtype=torch.uint8) for _ in range(SIZE)]
    shared = SimpleNamespace(barrier=lambda: barrier.wait(100))

    def summed(own: torch.Tensor) -> torch.Tensor:
        barrier.wait(100)
        total = sum(buffer[: own.nbytes].view(own.dtype).view(own.shape) for buffer in buffers)
        barrier.wait(100)
        assert isinstance(total, torch.Tensor)
        return total

    def one_shot(own: torch.Tensor, x: torch.Tensor, op: str, name: str) -> torch.Tensor:
        assert op == "sum" and x.nbytes <= 64
        return summed(own.copy_(x))

    def two_shot(own: torch.Tensor, op: str, name: str) -> torch.Tensor:
        assert op == "sum" and own.nbytes > 64
        return own.copy_(summed(own))

    kernels = SimpleNamespace(one_shot_all_reduce_copy=one_shot, two_shot_all_reduce_=two_shot)
    monkeypatch.setattr(torch.ops, "symm_mem", kernels, raising=False)
    made = []
    for rank in range(SIZE):
        group = SymmetricGroup.__new__(SymmetricGroup)
        group.rank, group.size, group._name = rank, SIZE, "test"
        group._buffer, group._shared, group._buffers = buffers[rank], shared, buffers  # type: ignore[assignment]
        group._region, group._addresses = 1, [torch.tensor(region) for region in range(3)]
        made.append(group)
    return made


def on_ranks(groups: list[SymmetricGroup], call: Any) -> list[torch.Tensor]:
    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(call, groups))


def of(rank: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(rows * 8).view(rows, 8) * (rank + 1)).to(dtype)


# 4 to 100 rows of 8: one shot, two shots, and in several pieces.
@pytest.mark.parametrize("rows", [1, 4, 7, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
class TestGroup:
    def test_all_reduce(self, groups: list[SymmetricGroup], rows: int, dtype: torch.dtype) -> None:
        expected = of(0, rows, dtype) + of(1, rows, dtype)
        for found in on_ranks(groups, lambda group: group.all_reduce(of(group.rank, rows, dtype)).clone()):
            assert found.dtype == dtype
            assert torch.equal(found, expected)

    def test_all_gather(self, groups: list[SymmetricGroup], rows: int, dtype: torch.dtype) -> None:
        expected = torch.stack([of(rank, rows, dtype) for rank in range(SIZE)])
        for found in on_ranks(groups, lambda group: group.all_gather(of(group.rank, rows, dtype))):
            assert torch.equal(found, expected)

    def test_broadcast(self, groups: list[SymmetricGroup], rows: int, dtype: torch.dtype) -> None:
        for found in on_ranks(groups, lambda group: group.broadcast(of(group.rank, rows, dtype))):
            assert torch.equal(found, of(0, rows, dtype))

    def test_addends(self, groups: list[SymmetricGroup], rows: int, dtype: torch.dtype) -> None:
        """Each call leaves the addends of the one before in place."""

        def calls(group: SymmetricGroup) -> list[torch.Tensor]:
            group.all_reduce(of(group.rank, 1, torch.float32))
            first, second = (group.addends(of(group.rank + step, rows, dtype)) for step in (0, 1))
            if of(0, rows, dtype).nbytes > 256:
                return [summed(second)]
            assert isinstance(first, Addends) and isinstance(second, Addends)
            assert int(first.addresses) == 1 and int(second.addresses) == 2
            return [first.total(), second.total()]

        expected = [of(step, rows, dtype) + of(1 + step, rows, dtype) for step in (0, 1)]
        with ThreadPoolExecutor(SIZE) as pool:
            for found in pool.map(calls, groups):
                for total, wanted in zip(found, expected[-len(found) :], strict=True):
                    assert torch.equal(total, wanted)
