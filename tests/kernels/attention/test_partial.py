"""Partial attention: the library's kernel equals the reference, and merged parts equal attention over all keys."""

from __future__ import annotations

import pytest
import torch

from branchwise.kernels.attention import partial
from branchwise.kernels.attention.partial import attend, attend_reference, merge_


@pytest.mark.parametrize("kind", ["plain", "keys masked", "queries masked", "causal"])
def test_library_kernel_equals_the_written_out_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    monkeypatch.setattr(partial, "SCORES_BYTES", 4 * 6 * 50 * 7)  # blocks of 7 queries
    q, k, v = (torch.randn(2, 3, 50, 16) for _ in range(3))
    mask = None
    if "masked" in kind:
        mask = torch.zeros(2, 1, 50 if kind == "queries masked" else 1, 50)
        mask[:, :, ::2, 5:] = float("-inf")
    out, lse = attend(q, k, v, 0.3, None, mask, kind == "causal")
    expected, expected_lse = attend_reference(q, k, v, 0.3, None, mask, kind == "causal")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_parts_merge_to_the_whole(softcap: float | None) -> None:
    torch.manual_seed(2)
    q, k, v = (torch.randn(1, 2, n, 16) for n in (9, 60, 60))
    whole, whole_lse = attend(q, k, v, 1.0, softcap)

    def part(keys: slice) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = attend(q, k[:, :, keys], v[:, :, keys], 1.0, softcap)
        return out[0].transpose(0, 1), lse[0].T

    out, lse = (x.clone() for x in part(slice(40, 60)))
    merge_(out, lse, slice(0, 9), *part(slice(0, 7)))
    some = torch.tensor([0, 2, 3, 8])
    rest, rest_lse = part(slice(7, 40))
    merge_(out, lse, some, rest[some], rest_lse[some])
    others = torch.tensor([1, 4, 5, 6, 7])
    merge_(out, lse, others, rest[others], rest_lse[others])
    torch.testing.assert_close(out, whole[0].transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, whole_lse[0].T, atol=1e-5, rtol=1e-5)
