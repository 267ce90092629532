"""Products streamed through shared memory, which only a device runs, and kernels that overlap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from branchwise.kernels import triton_launch, triton_ops
from branchwise.kernels.streamed_linear import FEW, StreamedLinear, streams


@pytest.fixture(autouse=True)
def overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launch, "OVERLAP", True)
    if not streams(torch.empty((64, 128), dtype=torch.bfloat16, device="cuda")):
        pytest.skip("needs a Hopper GPU")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 4096), (192, 384), (9024, 256)])
def test_a_streamed_product_is_the_product(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, bias = (
        torch.randn((outputs, inputs), device="cuda", dtype=dtype),
        torch.randn(outputs, device="cuda").to(dtype),
    )
    for tokens in (1, 5, 17, 33, FEW.stop - 1, FEW.stop):
        x = torch.randn((tokens, inputs), device="cuda", dtype=dtype)
        for added in (None, bias):
            linear = StreamedLinear(weight, added)
            got = linear(x)
            expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
            assert float((got.double() - expected).norm()) < 3e-3 * float(expected.norm())
            assert all(torch.equal(linear(x), got) for _ in range(3))  # the sums of parts have one order


def test_kernels_that_overlap_compute_what_they_do_one_after_the_other() -> None:
    torch.manual_seed(0)
    weights = [torch.randn((1024, 1024), device="cuda", dtype=torch.bfloat16) / 32 for _ in range(16)]
    linears, norm = [StreamedLinear(weight) for weight in weights], torch.ones(1024, device="cuda")

    def run(hidden: torch.Tensor) -> torch.Tensor:
        hidden, delta = hidden.clone(), hidden.sin()
        for linear in linears:
            delta = linear(triton_ops.add_rms_norm(delta, hidden, norm, 1e-5))
        return hidden + delta

    given = torch.randn((48, 1024), device="cuda", dtype=torch.bfloat16)
    run(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(given)
    for _ in range(10):
        given.normal_()
        hidden, delta = given.clone(), given.sin()
        for linear in linears:  # the device is idle before every kernel
            torch.cuda.synchronize()
            normed = triton_ops.add_rms_norm(delta, hidden, norm, 1e-5)
            torch.cuda.synchronize()
            delta = linear(normed)
        graph.replay()
        assert torch.equal(out, hidden + delta)
