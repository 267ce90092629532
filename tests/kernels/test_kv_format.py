"""Storage formats of keys and values in torch: errors, independence of tokens, and pages that are copied."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.kernels import ops
from branchwise.kernels.kv_format import (
    CHOICES,
    FORMATS,
    NVFP4_BLOCK,
    NVFP4_GLOBAL,
    FormatName,
    KVFormat,
    hadamard,
    problem,
)
from branchwise.kernels.kv_pool import KVLayout, KVPool

QUANTIZED = [FORMATS["fp8"], FORMATS["int4"], FORMATS["nvfp4"]]
# The largest error of one value: half of the largest gap between neighbours (1 / 6 in nvfp4, whose scale may be larger
# by 1 / 17), in units of the largest magnitude of its head (fp8) or block (nvfp4), or of the range of its head (int4);
# a part of the largest magnitude, from the rounding of what is stored beside the codes; and of the smallest scales.
WORST = {
    "fp8": (1 / 28, 2.0**-12, 2.0**-26),
    "int4": (1 / 30, 2.0**-10, 2.0**-15),
    "nvfp4": (3 / 17, 0.0, 3 * 2.0**-12),
}
CPU = torch.device("cpu")
EDGES = [0.0, -0.0, 1e-30, -1e-12, 1.0, -448.0, 3e4, -3e4]


def tensor(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("each", QUANTIZED, ids=lambda each: each.name)
@given(seed=st.integers(0, 1000), exponent=st.integers(-8, 12), edge=st.sampled_from(EDGES))
@settings(max_examples=40, deadline=None)
def test_errors_are_bounded_and_what_was_read_is_stored_as_it_is(
    each: KVFormat, seed: int, exponent: int, edge: float
) -> None:
    x = tensor(seed, 3, 2, 64, scale=2.0**exponent)
    x[0, 0, 5] = edge
    read = each.decode(*each.encode(x, None))
    assert read.isfinite().all()
    blocks = x.unflatten(-1, (-1, NVFP4_BLOCK if each.name == "nvfp4" else 64))
    largest = blocks.abs().amax(-1)
    span = blocks.amax(-1) - blocks.amin(-1) if each.name == "int4" else largest
    worst = (read - x).abs().unflatten(-1, (span.shape[-1], -1)).amax(-1)
    of_span, of_largest, floor = WORST[each.name]
    in_range = largest < (336 if each.name == "nvfp4" else 1e9)  # beyond, the largest block scale
    assert ((worst <= of_span * span + of_largest * largest + floor) | ~in_range).all()
    again = each.decode(*each.encode(read, None))
    torch.testing.assert_close(again, read, atol=float(largest.max()) * 2e-3, rtol=0)


def test_nvfp4_has_the_better_of_two_scales() -> None:
    """Against all magnitudes of e2m1 and all scales, in float64: blocks of Gaussian channels, of few and of one, of
    zeros, and of all magnitudes that scales have."""
    each, x = FORMATS["nvfp4"], tensor(7, 4000, NVFP4_BLOCK)
    x[1000:2000, 3:] *= 0.05
    x[2000:2500, 1:] = 0
    x[2500] = 0
    x[3000:] *= 2.0 ** torch.linspace(-12, 12, 1000)[:, None]
    blocks = x.double().abs()
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    scales = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # all that are positive
    units, errors = [], []
    for peak in (6, 4):
        nearest = (blocks.amax(-1, keepdim=True) / (peak * NVFP4_GLOBAL) - scales).abs().argmin(-1)
        units.append(scales[nearest] * NVFP4_GLOBAL)
        distances = (blocks[..., None] - units[-1][:, None, None] * grid).abs().amin(-1)
        errors.append(distances.square().sum(-1))
    data, stored = each.encode(x, None)
    got = stored.view(torch.float8_e4m3fn)[:, 0].double() * NVFP4_GLOBAL
    best = torch.where(errors[1] < errors[0], units[1], units[0])
    alike = (errors[1] - errors[0]).abs() < units[0].square() / 64  # as the errors are counted in steps
    assert ((got == best) | alike).all() and ((got == units[0]) | (got == units[1])).all()
    assert alike.float().mean() < 0.25 and 0.2 < (got == units[1])[~alike].float().mean() < 0.8
    error = (each.decode(data, stored).double().abs() - blocks).square().sum(-1)
    torch.testing.assert_close(error, torch.where(got == units[0], errors[0], errors[1]))
    gaussian = error[:1000].sum() / errors[0][:1000].sum()
    assert 0.82 < gaussian < 0.86, "of the error with the first scale alone"


@pytest.mark.parametrize("each", QUANTIZED, ids=lambda each: each.name)
def test_a_tokens_bytes_depend_on_that_token_and_head_alone(each: KVFormat) -> None:
    x = tensor(0, 7, 3, 64)
    data, scales = each.encode(x, None)
    assert data.shape == (7, 3, each.data_bytes(64, torch.bfloat16)) and scales.shape == (7, 3, each.scale_bytes(64))
    for token in range(7):
        for head in range(3):
            alone = each.encode(x[token, head], None)
            assert torch.equal(alone[0], data[token, head]) and torch.equal(alone[1], scales[token, head])


@pytest.mark.parametrize(
    ("name", "digest"), [("fp8", "e558749fa57aec96"), ("int4", "60c9e0efe4bc691e"), ("nvfp4", "15a00af1c587ca99")]
)
def test_what_is_stored_is_what_a_disk_cache_expects(name: FormatName, digest: str) -> None:
    """Changing these values needs another `fingerprint.FORMAT`."""
    x = ((torch.arange(64 * 64) * 7919 % 1009 - 504) / 64).view(64, 64)
    stored = b"".join(part.contiguous().numpy().tobytes() for part in FORMATS[name].encode(x, None))
    assert hashlib.sha256(stored).hexdigest()[:16] == digest


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice != "auto"])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_copied_pages_and_rewritten_tokens_are_those_of_a_cold_pool(choice: str, data: st.DataObject) -> None:
    """Copy-on-write inside a page: the reused tokens of the copy, and those written after them, are bit for bit those
    of a pool that computed the sequence from its start."""
    page = data.draw(st.sampled_from([1, 4, 16]))
    reused, total = data.draw(st.integers(0, page)), page
    layout = KVLayout.of(choice, 2, page, 2, 32, torch.float32)
    warm, cold = (KVPool.allocate(layout, 3, CPU) for _ in "ab")
    first, second = tensor(1, 2, 2, total, 2, 32), tensor(2, 2, 2, total, 2, 32)
    second[:, :, :reused] = first[:, :, :reused]
    for layer in range(2):
        slots = torch.arange(page)
        warm.layer(layer).write(slots, *first[layer])
        cold.layer(layer).write(slots + 2 * page, *second[layer])
    ops.copy_pages(warm.fragments(), torch.tensor([[0, 2]]))
    for layer in range(2):
        rest = second[layer][:, reused:]
        warm.layer(layer).write(2 * page + torch.arange(reused, page), *rest)
    assert torch.equal(warm.data[:, :, 2], cold.data[:, :, 2])
    for mine, theirs in zip(warm.layer(1).read(torch.tensor([2])), cold.layer(1).read(torch.tensor([2])), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("choice", "least"), [("fp8", 1.96), ("int4", 3.5), ("nvfp4", 3.5), ("k16v8", 1.3)])
def test_bytes_of_a_token(choice: str, least: float) -> None:
    sizes = 32, 16, 8, 128, torch.bfloat16
    plain, layout = KVLayout.of("auto", *sizes), KVLayout.of(choice, *sizes)
    assert plain.token_bytes == 131_072 and plain.token_bytes / layout.token_bytes >= least
    pool = KVPool.allocate(layout, 3, CPU)
    assert pool.data.nbytes == 3 * layout.page_bytes == 3 * 16 * layout.token_bytes
    assert pool.fragments().shape[1] == 3 and pool.fragments().nbytes == pool.data.nbytes


@pytest.mark.parametrize("size", [64, 96, 128])
def test_hadamard_is_orthonormal_and_its_own_inverse(size: int) -> None:
    x, y = tensor(3, 4, size), tensor(4, 4, size)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1))


@pytest.mark.parametrize(("name", "most"), [("int4", 0.75), ("nvfp4", 0.45)])
def test_a_rotation_spreads_a_large_channel(name: FormatName, most: float) -> None:
    """What it is for: a channel of keys and queries that is larger than the others leaves them few of int4's steps, and
    its own error counts most in their products."""
    each, queries, keys = FORMATS[name], tensor(4, 64, 128), tensor(5, 64, 128)
    queries[:, 7] *= 20
    keys[:, 7] *= 20
    plain = each.decode(*each.encode(keys, None)) - keys
    rotated = hadamard(each.decode(*each.encode(hadamard(keys), None))) - keys
    assert (queries @ rotated.T).norm() < most * (queries @ plain.T).norm()


def test_static_scales_are_stored_and_used() -> None:
    each, x = FORMATS["fp8"], tensor(6, 5, 2, 32)
    data, scales = each.encode(x, torch.tensor([[0.5], [0.001]]))
    stored = torch.tensor([0.5, 0.001]).bfloat16()
    assert torch.equal(scales.view(torch.bfloat16)[..., 0], stored.expand(5, 2))
    assert each.decode(data, scales)[:, 1].abs().max() == 448 * stored[1].float()  # clamped, not NaN


def test_a_scale_of_two_bytes_costs_no_accuracy() -> None:
    """Largest values whose scale rounds down, up, or to itself: the largest code is 448 in each case, whose value is
    off by the rounding of the scale alone; and what was read is stored as it is."""
    each = FORMATS["fp8"]
    largest = torch.linspace(256, 512, 1001)[:, None]
    x = torch.cat([largest, -largest / 2], dim=1)
    data, scales = each.encode(x, None)
    read = each.decode(data, scales)
    assert (data[:, 0].view(torch.float8_e4m3fn).float() == 448).all()
    assert ((read - x).abs() <= largest / 256).all()
    assert all(map(torch.equal, each.encode(read, None), (data, scales)))


@pytest.mark.parametrize(
    ("choice", "head_dim", "capability", "reason"),
    [
        ("auto", 80, (7, 5), None),
        ("fp8", 80, None, None),
        ("int4", 40, None, "not a multiple of 16; use fp8"),
        ("fp8", 80, (9, 0), "not of 80; use auto"),
        ("nvfp4", 128, (8, 0), "use int4"),
        ("int4", 128, (8, 0), None),
        ("k16v8", 256, (9, 0), None),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_closest_that_can(
    choice: str, head_dim: int, capability: tuple[int, int] | None, reason: str | None
) -> None:
    found = problem(choice, head_dim, capability)
    assert found is None if reason is None else found is not None and found.endswith(reason)
