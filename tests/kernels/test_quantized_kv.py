"""Quantized keys and values: Triton's kernels against the torch specification; without a GPU in the interpreter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from branchwise.kernels import kv_pool, ops
from branchwise.kernels.attention import dequantized_chunks
from branchwise.kernels.attention.base import AttentionBatch, LayerSpec
from branchwise.kernels.attention.dequantized_chunks import DequantizedChunks, dequantize
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_format import NVFP4_GLOBAL, hadamard
from branchwise.kernels.kv_pool import KVLayout, KVPool

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl

from branchwise.kernels import triton_ops
from branchwise.kernels.attention import tree_backend, tree_runner, triton_backend
from branchwise.kernels.attention.register_kernel import RegisterTile
from branchwise.kernels.attention.tree_backend import TreeAttention
from branchwise.kernels.attention.triton_backend import TritonAttention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GLUON = "triton.experimental.gluon"
CHOICES = ["fp8", "int4", "nvfp4", "k16v8"]
PAGE, PAGES, ROWS, COLUMNS = 16, 81, 8, 10


def filled(choice: str, head_dim: int, dtype: torch.dtype, kv_heads: int = 2, layers: int = 1) -> KVPool:
    """A pool whose every token holds a random key and value."""
    pool = KVPool.allocate(KVLayout.of(choice, layers, PAGE, kv_heads, head_dim, dtype), PAGES, DEVICE)
    generator = torch.Generator().manual_seed(head_dim)
    for layer in range(layers):
        k, v = torch.randn((2, PAGES * PAGE, kv_heads, head_dim), generator=generator).to(DEVICE, dtype)
        k[..., 3] *= 8  # a large channel, as models have
        pool.layer(layer).write(torch.arange(PAGES * PAGE, device=DEVICE), k, v * 0.1)
    return pool


def step(requests: list[tuple[int, int]]) -> AttentionBatch:
    """``requests``: (query tokens, tokens before), decodes first. The first four columns are shared by all rows."""
    table = np.random.default_rng(0).permutation(PAGES - 1)[: ROWS * COLUMNS].reshape(ROWS, COLUMNS).astype(np.int32)
    table[:, :4] = table[0, :4]
    table = np.concatenate([table, np.full((1, COLUMNS), PAGES - 1, np.int32)])
    q_lens = np.array([q for q, _ in requests], np.int32)
    return AttentionBatch(
        rows=np.arange(len(requests), dtype=np.int32),
        q_lens=q_lens,
        kv_lens=q_lens + np.array([before for _, before in requests], np.int32),
        num_decodes=int((q_lens == 1).sum()),
        page_size=PAGE,
        page_table=torch.from_numpy(table).to(DEVICE),
        host_page_table=table,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("choice", CHOICES)
def test_rope_write_stores_what_the_specification_does(choice: str, head_dim: int, dtype: torch.dtype) -> None:
    layout = KVLayout.of(choice, 1, PAGE, 2, head_dim, dtype)
    mine, theirs = (KVPool.allocate(layout, PAGES, DEVICE) for _ in "ab")
    qkv = torch.randn((5, 8, head_dim), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    if choice in ("fp8", "k16v8"):  # the interpreter rounds to float8 wrongly where that carries
        qkv = (qkv * 100).to(torch.float8_e4m3fn).float()
        qkv[..., 0] = 448
    qkv = qkv.to(dtype)
    cos = torch.ones(5, head_dim // 2, device=DEVICE)
    slots = torch.tensor([3, 17, 60, 40, 5], device=DEVICE)
    given = qkv.clone()
    q, k, v = triton_ops.rope_write(given, 4, cos, torch.zeros_like(cos), mine.layer(0), slots)
    expected = ops.rope_write(qkv.clone(), 4, cos, torch.zeros_like(cos), theirs.layer(0), slots)
    for got, want in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
    theirs.layer(0).write(slots, k, v)  # of the same bits
    assert torch.equal(mine.data, theirs.data)
    if layout.k_format.rotates_keys:
        torch.testing.assert_close(hadamard(q), qkv[:, :4], atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nvfp4_of_any_magnitude_is_stored_as_the_specification_does(dtype: torch.dtype) -> None:
    """Subnormal and largest scales, zeros, and blocks that both scales store as well."""
    tokens, layout = 64, KVLayout.of("nvfp4", 1, PAGE, 2, 64, dtype)
    qkv = torch.randn((tokens, 8, 64), generator=torch.Generator().manual_seed(3))
    qkv[::4] = (qkv[::4] * 2).round() / 2  # ties of codes and of errors
    qkv[1::4, :, 1::2] *= 0.03
    qkv[:, 7, :16], qkv[:, 7, 17:32] = 0, 0
    qkv = (qkv * 2.0 ** torch.linspace(-15, 11, tokens)[:, None, None].round()).to(DEVICE, dtype)
    cos, slots = torch.ones(tokens, 32, device=DEVICE), torch.randperm(PAGES * PAGE)[:tokens].to(DEVICE)
    mine, theirs = (KVPool.allocate(layout, PAGES, DEVICE) for _ in "ab")
    _, k, v = triton_ops.rope_write(qkv, 4, cos, torch.zeros_like(cos), mine.layer(0), slots)
    theirs.layer(0).write(slots, k, v)
    assert torch.equal(mine.data, theirs.data)
    largest = v.float().unflatten(-1, (-1, 16)).abs().amax(-1)
    scales = theirs.layer(0).v_scales.flatten(0, 1)[slots].view(torch.float8_e4m3fn).float() * NVFP4_GLOBAL
    mapped = largest[(largest > 0.02) & (largest < 300)] / scales[(largest > 0.02) & (largest < 300)]
    assert 0.1 < (mapped < 5).float().mean() < 0.9, "mapped to 4, the others to 6"


def test_rope_write_uses_a_checkpoints_scales() -> None:
    pools = [KVPool.allocate(KVLayout.of("fp8", 1, PAGE, 2, 64, torch.float32), 2, DEVICE) for _ in "ab"]
    scales = torch.tensor([[0.25, 0.5], [1.0, 2.0]], device=DEVICE)
    qkv = torch.arange(8, device=DEVICE)[None, :, None] * torch.ones(3, 8, 64, device=DEVICE)
    cos, slots = torch.ones(3, 32, device=DEVICE), torch.tensor([0, 31, 7], device=DEVICE)
    for pool, module in zip(pools, (ops, triton_ops), strict=True):
        pool.set_static_scales(0, scales)
        module.rope_write(qkv.clone(), 4, cos, torch.zeros_like(cos), pool.layer(0), slots)  # type: ignore[attr-defined]
    assert torch.equal(pools[0].data, pools[1].data)
    stored = pools[1].layer(0)
    assert torch.equal(
        torch.stack([stored.k_scales[0, 0].view(torch.bfloat16)[:, i].float() for i in range(2)]), scales
    )


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)
SPECS = [LayerSpec(0.1), LayerSpec(0.1, window=37), LayerSpec(0.1, softcap=4.0), LayerSpec(0.1, sinks=SINKS)]


# Every pair of a format, a head's size and a dtype, not every triple.
CASES = [
    (choice, head_dim, (torch.float32, torch.float16)[(i + j) % 2])
    for i, choice in enumerate(CHOICES)
    for j, head_dim in enumerate((64, 128))
]


@pytest.mark.parametrize(("choice", "head_dim", "dtype"), CASES)
@pytest.mark.parametrize("backend", ["flat", "tree"])
def test_attention_reads_what_the_specification_does(
    backend: str, choice: str, head_dim: int, dtype: torch.dtype
) -> None:
    heads = 4
    pool = filled(choice, head_dim, dtype, layers=len(SPECS))
    batch = step([(1, 70), (1, 150), (1, 64), (1, 90), (20, 60), (3, 100)])
    q = torch.randn((int(batch.q_lens.sum()), heads, head_dim), generator=torch.Generator().manual_seed(2))
    q = (q * 3).to(DEVICE, dtype)
    exact = pool
    if choice != "k16v8":  # whose keys are in the model's dtype
        exact = KVPool(pool.data, replace(pool.layout, dtype=torch.float32))
    oracle = TorchAttention(exact, SPECS, heads, share=False)
    oracle.plan(batch)
    attention: TritonAttention | TreeAttention = TritonAttention(pool, SPECS, heads)
    if backend == "tree":
        attention = TreeAttention(pool, SPECS, heads, batch.page_table, attention, 64)
    attention.plan(batch)
    tolerance = 3e-3  # queries are rounded to float16
    for layer in range(len(SPECS)):
        want = oracle.run(layer, q.to(exact.layout.dtype), q, q)
        torch.testing.assert_close(attention.run(layer, q, q, q).float(), want.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("choice", CHOICES)
def test_dequantize_copies_what_the_specification_reads(choice: str, head_dim: int) -> None:
    pool = filled(choice, head_dim, torch.float16, layers=2)
    pages = torch.tensor([7, 0, 80], dtype=torch.int32, device=DEVICE)
    copied, _ = pool.layout.dequantized(8)
    out = torch.zeros((2, 4, *copied.data_shape(1)[0][3:]), dtype=torch.float16, device=DEVICE)
    dequantize(pool, 1, pages, out)
    for got, want in zip(out, pool.layer(1).read(pages.long()), strict=True):
        torch.testing.assert_close(got[:3], want.half(), atol=1e-6, rtol=1e-3)
        assert not got[3].any()


@pytest.mark.parametrize(
    "requests", [[(1, 70), (1, 150), (600, 64), (3, 90)], [(700, 0), (500, 100)], [(1, 70), (40, 9)]]
)
def test_long_chunks_read_a_copy(requests: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows share pages, which are copied once. The last step has no long chunk."""
    monkeypatch.setattr(sys.modules[__name__], "COLUMNS", 48)
    monkeypatch.setattr(sys.modules[__name__], "PAGES", 8 * 48 + 1)
    pool, heads, specs = filled("fp8", 64, torch.float16, layers=2), 2, [LayerSpec(0.1)] * 2
    batch = step(requests)
    q = torch.randn((int(batch.q_lens.sum()), heads, 64), generator=torch.Generator().manual_seed(2)).to(DEVICE).half()
    flat, copies = TritonAttention(pool, specs, heads), []

    def make_long(copy: KVPool, table: torch.Tensor) -> TritonAttention:
        copies.append(copy)
        return TritonAttention(copy, specs, heads)

    monkeypatch.setattr(kv_pool, "DEQUANTIZED_BYTES", 1 << 24)
    attention = DequantizedChunks(pool, flat, make_long, ROWS, COLUMNS)
    used = len(requests) > 2 or requests[0][0] > 1
    for _ in range(2):  # the second plan replaces the first
        assert attention.plan(batch) is None
        flat_only = TritonAttention(pool, specs, heads)
        flat_only.plan(batch)
        for layer in range(2):
            copies[0].data.zero_()
            got, want = attention.run(layer, q, q, q), flat_only.run(layer, q, q, q)
            torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)
            assert bool(copies[0].data.any()) == used


@pytest.mark.parametrize("room", [True, False])
def test_chunks_of_the_tree_beside_a_long_one(room: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short chunks before and behind a long one are the tree's. They do not keep the long one from being read in the
    copy, with the scratch page in their places; without room for a copy, the flat backend reads it."""
    monkeypatch.setattr(tree_backend, "WIDE_CHUNK", 40)
    monkeypatch.setattr(dequantized_chunks, "LONG_CHUNK", 40)
    pool, heads, specs = filled("fp8", 64, torch.float16), 2, [LayerSpec(0.1)]
    batch = step([(1, 70), (12, 64), (41, 64), (12, 24), (3, 70)])
    q = torch.randn((int(batch.q_lens.sum()), heads, 64), generator=torch.Generator().manual_seed(2)).to(DEVICE).half()
    flat, copies = TritonAttention(pool, specs, heads), []

    def make_long(copy: KVPool, table: torch.Tensor) -> TritonAttention:
        copies.append(copy)
        return TritonAttention(copy, specs, heads)

    monkeypatch.setattr(kv_pool, "DEQUANTIZED_BYTES", 1 << 24 if room else 1 << 13)
    chunks = DequantizedChunks(pool, flat, make_long, ROWS, COLUMNS)
    tree = TreeAttention(pool, specs, heads, batch.page_table, chunks, 128)
    monkeypatch.setattr(tree, "_wide", True)
    tree.plan(batch)
    assert tree._members is not None and tree._members.chunks.tolist() == [1, 3, 4]
    flat_only = TritonAttention(pool, specs, heads)
    flat_only.plan(batch)
    torch.testing.assert_close(tree.run(0, q, q, q), flat_only.run(0, q, q, q), atol=3e-3, rtol=3e-3)
    assert bool(copies[0].data.any()) == room


# -- Gluon without its layouts, in the interpreter ---------------------------------------------------------------------
# A layout says which thread holds which element, not what is computed. That layouts fit each other is checked when a
# kernel is compiled (`test_triton_compile`).


class Language(ModuleType):
    """`gl`: Triton's functions, looked up when they are called, without arguments that are layouts."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("Layout"):
            return lambda *_, **__: None
        found = getattr(tl, name)
        if isinstance(found, type) or not callable(found):
            return found
        return lambda *args, **options: getattr(tl, name)(*args, **options)

    @staticmethod
    def arange(start: int, stop: int, layout: object = None) -> Any:
        return tl.arange(start, stop)

    @staticmethod
    def full(shape: list[int], value: float, dtype: Any, layout: object = None) -> Any:
        return tl.full(shape, value, dtype)

    @staticmethod
    def zeros(shape: list[int], dtype: Any, layout: object = None) -> Any:
        return tl.zeros(shape, dtype)

    @staticmethod
    def convert_layout(value: Any, layout: object, assert_trivial: bool = False) -> Any:
        return value


def interpreted(name: str, replaced: dict[str, Any]) -> ModuleType:
    """A copy of our module ``name`` whose Gluon kernels are interpreted. ``replaced``: its inline assembly."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    gluon, language, ampere = ModuleType(GLUON), Language(f"{GLUON}.language"), ModuleType("ampere")
    gluon.jit, gluon.constexpr_function, gluon.language = triton.jit, lambda f: f, language  # type: ignore[attr-defined]
    ampere.mma_v2 = lambda a, b, acc: tl.dot(a, b, acc)  # type: ignore[attr-defined]
    modules = {
        GLUON: gluon,
        f"{GLUON}.language": language,
        f"{GLUON}.language.nvidia.ampere": ampere,
        "triton.experimental": mock.Mock(gluon=gluon),
    }
    copy = importlib.util.spec_from_file_location(f"{name}_interpreted", spec.origin)
    assert copy is not None and copy.loader is not None
    module = importlib.util.module_from_spec(copy)
    with mock.patch.dict(sys.modules, modules | {copy.name: module}):
        copy.loader.exec_module(module)
    module.tl = tl  # type: ignore[attr-defined]  # the interpreter replaces what kernels' globals call so
    for function, by in replaced.items():
        setattr(module, function, by)
    return module


@triton.jit
def byte_of(words: tl.tensor, index: tl.constexpr) -> tl.tensor:
    return (words >> (8 * index)) & 0xFF


@triton.jit
def e4m3_pair(words: tl.tensor, UPPER: tl.constexpr) -> tl.tensor:
    first: tl.constexpr = 2 if UPPER else 0
    low = byte_of(words, first).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    high = byte_of(words, first + 1).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)
    return joined(low, high)


@triton.jit
def joined(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)


@triton.jit
def times(words: tl.tensor, factors: tl.tensor) -> tl.tensor:
    low = words.to(tl.int16).to(tl.float16, bitcast=True) * factors.to(tl.int16).to(tl.float16, bitcast=True)
    words, factors = words >> 16, factors >> 16
    high = words.to(tl.int16).to(tl.float16, bitcast=True) * factors.to(tl.int16).to(tl.float16, bitcast=True)
    return joined(low, high)


@triton.jit
def picked(a: tl.tensor, b: tl.tensor, choice: tl.constexpr) -> tl.tensor:
    """PTX's ``prmt``."""
    result = tl.zeros_like(a)
    for i in tl.static_range(4):
        index: tl.constexpr = (choice >> (4 * i)) & 15
        result |= (byte_of(a, index) if index < 4 else byte_of(b, index - 4)) << (8 * i)
    return result


@triton.jit
def pick_bytes(a: tl.tensor, b: tl.tensor, LOW: tl.constexpr, HIGH: tl.constexpr) -> Any:
    return picked(a, b, LOW), picked(a, b, HIGH)


@triton.jit
def laid_out_as(x: tl.tensor, other: tl.tensor) -> tl.tensor:
    return x


@pytest.fixture(scope="module")
def attend_few() -> Iterator[Any]:
    assembly = {"_e4m3_pair": e4m3_pair, "_times": times, "_pick_bytes": pick_bytes, "_laid_out_as": laid_out_as}
    tiles = interpreted("branchwise.kernels.attention.register_tiles", assembly)
    names = {name: getattr(tiles, name) for name in vars(tiles) if name.endswith(("_operand", "_channels", "_queries"))}
    # The interpreter knows constants by Triton's name for them.
    normalized = mock.patch("triton.runtime.jit._normalize_ty", lambda each: str(each).rpartition(".")[2])
    with normalized:
        yield interpreted("branchwise.kernels.attention.register_kernel", names).attend_few


IN_REGISTERS = ("fp8", "int4", "nvfp4", "k16v8")
# A format's bits, a head's size and the keys of a block are separate loops of the kernel: all pairs, not all triples.
REGISTER_CASES = [
    *((choice, 128, keys) for choice in IN_REGISTERS for keys in (16, 32)),
    *zip(IN_REGISTERS, (64,) * 4, (16, 32, 16, 32), strict=True),
    *zip(IN_REGISTERS, (256,) * 4, (32, 16, 32, 16), strict=True),
]


@pytest.mark.parametrize(("choice", "head_dim", "keys"), REGISTER_CASES)
@pytest.mark.skipif(DEVICE.type == "cuda", reason="the tests above run the kernel itself")
def test_attention_in_registers_reads_what_the_specification_does(
    attend_few: Any, choice: str, head_dim: int, keys: int
) -> None:
    def tile(rows: int, layout: KVLayout) -> RegisterTile | None:
        return RegisterTile(8 if rows <= 8 else 16, keys) if rows <= 16 else None

    heads, specs = 4, [LayerSpec(0.1), LayerSpec(0.1, window=37, softcap=4.0)]
    pool = filled(choice, head_dim, torch.float16, layers=len(specs))
    batch = step([(1, 70), (1, 150), (1, 64), (3, 100)])
    q = torch.randn((int(batch.q_lens.sum()), heads, head_dim), generator=torch.Generator().manual_seed(2)).half() * 3
    exact = pool if choice == "k16v8" else KVPool(pool.data, replace(pool.layout, dtype=torch.float32))
    oracle = TorchAttention(exact, specs, heads, share=False)
    oracle.plan(batch)
    launched = mock.Mock(side_effect=attend_few)
    with ExitStack() as patches:
        for module in (triton_backend, tree_runner):
            patches.enter_context(mock.patch.multiple(module, register_tile=tile, attend_few=launched))
        for module in (triton_backend, tree_backend):
            patches.enter_context(mock.patch.object(module, "checked", lambda _: True))
        flat = TritonAttention(pool, specs, heads)
        tree = TreeAttention(pool, specs, heads, batch.page_table, TritonAttention(pool, specs, heads), 64)
        for attention in (flat, tree):
            attention.plan(batch)
            launched.reset_mock()
            for layer in range(len(specs)):
                want = oracle.run(layer, q.to(exact.layout.dtype), q, q).float()
                got = attention.run(layer, q, q, q).float()
                torch.testing.assert_close(got, want, atol=3e-3, rtol=3e-3)
            assert launched.call_count >= len(specs)
