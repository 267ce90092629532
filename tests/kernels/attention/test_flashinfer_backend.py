"""The FlashInfer backend without a GPU: a stand-in for FlashInfer's module computes in torch from the same arguments.

Tests with FlashInfer itself are in tests/gpu.
"""

from __future__ import annotations

import gc
import math
import subprocess
import sys
import threading
import weakref
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from branchwise.kernels import ops
from branchwise.kernels.attention import flashinfer_backend as subject
from branchwise.kernels.attention import flashinfer_module
from branchwise.kernels.attention.base import AttentionBatch, LayerSpec, StepShape, Unavailable
from branchwise.kernels.attention.flashinfer_module import OLDEST, Variant, check_available
from branchwise.kernels.attention.torch_backend import TorchAttention
from branchwise.kernels.kv_pool import KVPool

PAGE, HEADS, KV_HEADS, DIM = 4, 4, 2, 16
SINKS = torch.tensor([-4.0, 0.5, 2.0, 9.0])
SPECS = [
    LayerSpec(0.25),
    LayerSpec(0.25, window=9),
    LayerSpec(0.3, softcap=3.0),
    LayerSpec(0.25, sinks=SINKS),
    LayerSpec(0.25, window=9, sinks=SINKS),
]


class Module:
    """Stands in for `PagedCall`: checks its arguments, which compiled modules do not, and attends in torch."""

    def __init__(self, variant, window, causal, heads, kv_heads, page_size, workspace, int_workspace):
        self.variant, self.window, self.causal, self.page_size = variant, window, causal, page_size

    def plan(self, qo_indptr, kv_indptr, kv_lens, rows, capture):
        for tensor in (qo_indptr, kv_indptr, kv_lens):
            assert tensor.dtype == torch.int32 and tensor.device.type == "cpu"
        assert len(qo_indptr) == len(kv_indptr) == len(kv_lens) + 1
        assert qo_indptr[-1] <= rows if capture else qo_indptr[-1] == rows
        self.host = [tensor.clone() for tensor in (qo_indptr, kv_indptr, kv_lens)]

    def run(self, q, k, v, out, qo_indptr, kv_indptr, kv_indices, last_page_lens, scale, softcap, lse):
        for mine, planned in zip((qo_indptr, kv_indptr), self.host[:2], strict=True):
            assert mine.dtype == torch.int32
            assert torch.equal(mine, planned)
        assert self.variant.window == (self.window is not None)
        assert self.variant.softcap == (softcap != 0.0)
        for i, kv_len in enumerate(self.host[2].tolist()):
            start, end = qo_indptr[i : i + 2].tolist()
            pages = kv_indices[kv_indptr[i] : kv_indptr[i + 1]].long()
            if start == end:
                assert not len(pages)
                continue
            assert (len(pages) - 1) * self.page_size + int(last_page_lens[i]) == kv_len
            assert self.causal or end - start == 1
            keys, values = (x[pages].flatten(0, 1)[:kv_len].repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
            scores = torch.einsum("qhd,khd->hqk", q[start:end], keys) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            query, key = torch.arange(kv_len - (end - start), kv_len)[:, None], torch.arange(kv_len)
            scores[:, (key > query) | (key <= query - (self.window or kv_len + 1))] = float("-inf")
            out[start:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
            if lse is not None:
                lse[start:end] = scores.logsumexp(-1).T / math.log(2)


@pytest.fixture
def fa3():
    """Whether `fa3` is compiled; it is, unless a test replaces this."""
    future = Future()
    future.set_result(None)
    return future


@pytest.fixture
def backend(monkeypatch, fa3):
    monkeypatch.setattr(subject, "PagedCall", Module)
    monkeypatch.setattr(subject, "build", lambda variants: None)
    monkeypatch.setattr(subject, "build_later", lambda variants: fa3)
    monkeypatch.setattr(
        subject, "kernels", lambda device, spec, head_dim: ["fa2", "fa3"] if spec in SPECS[::3] else ["fa2"]
    )
    torch.manual_seed(0)
    pool = KVPool(torch.randn(len(SPECS), 2, 101, PAGE, KV_HEADS, DIM))
    table = torch.from_numpy(np.random.default_rng(0).permutation(96).reshape(8, 12).astype(np.int32))
    table = torch.cat([table, torch.full((1, 12), 100, dtype=torch.int32)])
    return subject.FlashInferAttention(pool, SPECS, HEADS, table, ops, 8), TorchAttention(pool, SPECS, HEADS)


def batch_of(requests, table):
    q_lens, kv_lens = (np.array(column, np.int32) for column in zip(*requests, strict=True))
    rows = np.array([5, 2, 7, 0, 3, 1][: len(requests)], np.int32)
    decodes = int((np.cumsum(q_lens != 1) == 0).sum())
    return AttentionBatch(rows, q_lens, kv_lens, decodes, PAGE, table, table.numpy())


@pytest.mark.parametrize("shape", [None, (0, 0, 0), (2, 5, 1)], ids=["as it is", "exact", "padded"])
@pytest.mark.parametrize(
    "requests",
    [[(1, 1), (1, 4), (1, 37)], [(1, 9), (1, 48), (3, 3), (7, 40)], [(20, 20), (1, 30)], [(5, 9)]],
    ids=["decodes", "both", "chunks", "chunk"],
)
def test_what_flashinfer_is_given(backend, requests, shape):
    flashinfer, reference = backend
    batch = batch_of(requests, flashinfer._table)
    n, tokens = batch.num_decodes, int(batch.q_lens.sum())
    if shape is not None:
        shape = StepShape(n + shape[0], tokens - n + shape[1], len(requests) - n + shape[2])
    q = torch.randn(tokens, HEADS + 3, DIM)[:, :HEADS]
    given, where = q, torch.arange(tokens)
    if shape is not None:
        given = torch.randn(shape.num_tokens, HEADS, DIM)
        where = torch.cat([torch.arange(n), torch.arange(shape.decodes, shape.decodes + tokens - n)])
        given[where] = q
    flashinfer.plan(batch, shape)
    reference.plan(batch)
    pool = flashinfer._pool
    own = torch.cat([torch.arange(kv_len - q_len, kv_len) + int(i) * 100 for i, (q_len, kv_len) in enumerate(requests)])
    slots = torch.tensor(
        [
            int(flashinfer._table[batch.rows[at // 100], at % 100 // PAGE]) * PAGE + at % 100 % PAGE
            for at in own.tolist()
        ]
    )
    for layer in range(len(SPECS)):
        flat = pool.data[layer].flatten(1, 2)
        expected = reference.run(layer, q, flat[0, slots], flat[1, slots])
        out = flashinfer.run(layer, given, flat[0, slots], flat[1, slots])
        torch.testing.assert_close(out[where], expected, atol=1e-5, rtol=1e-5)


def test_long_chunks_take_fa3_where_there_is_one(backend, monkeypatch):
    flashinfer, _ = backend
    monkeypatch.setattr(subject, "LONG_CHUNK", 16)
    for requests, kernel in ([(1, 5), (20, 20)], "fa3"), ([(1, 5), (3, 20), (4, 9)], "fa2"):
        flashinfer.plan(batch_of(requests, flashinfer._table))
        assert [call.variant.kernel for call in flashinfer._planned[-1].calls.values()] == [kernel, "fa2", "fa2"]


class TestBeforeFa3IsCompiled:
    @pytest.fixture
    def fa3(self):
        return Future()

    def test_long_chunks_take_fa2_until_then(self, backend, fa3, monkeypatch):
        flashinfer, _ = backend
        monkeypatch.setattr(subject, "LONG_CHUNK", 16)
        batch = batch_of([(1, 5), (20, 20)], flashinfer._table)

        def kernel():
            flashinfer.plan(batch)
            return next(iter(flashinfer._planned[-1].calls.values())).variant.kernel

        assert kernel() == "fa2"
        fa3.set_result(None)
        assert kernel() == kernel() == "fa3"

    def test_and_always_if_it_cannot_be(self, backend, fa3, monkeypatch):
        flashinfer, _ = backend
        monkeypatch.setattr(subject, "LONG_CHUNK", 16)
        fa3.set_exception(Unavailable("no compiler"))
        flashinfer.plan(batch_of([(1, 5), (20, 20)], flashinfer._table))
        assert {call.variant.kernel for call in flashinfer._planned[-1].calls.values()} == {"fa2"}


def planned_bytes(num_heads, kv_heads, head_dim, processors, tokens, requests, captured):
    """The most workspace that FlashInfer's planner uses (`PrefillPlan` and `PrefillSplitQOKVIndptr` in scheduler.cuh):
    in a graph it depends on the shape alone, otherwise on the tiles of a step whose keys are split."""
    group = num_heads // kv_heads
    rows = ((tokens - requests + 1) % 2**32 if captured else tokens / requests) * group
    tile = 128 if rows > 64 and head_dim < 256 else 64 if rows > 16 else 16
    tiles = 2 * processors // kv_heads
    if captured:
        tiles = max(tiles, -(-tokens * group // tile) + requests - 1)
    return -(-num_heads * tiles * tile * head_dim * 4 // 16) * 16 + num_heads * tiles * tile * 4


@pytest.mark.parametrize("processors", [20, 78, 132, 170, 188], ids="{} processors".format)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(32, 8, 128), (14, 2, 64), (16, 2, 128), (4, 1, 256), (32, 32, 64), (64, 2, 128), (32, 1, 128), (71, 1, 64)],
)
def test_the_workspace_is_large_enough_for_any_step(processors, heads, kv_heads, head_dim):
    for most in (1, 8, 64, 512):
        size = subject.workspace_bytes(heads, kv_heads, head_dim, processors, most, 1024, min(64, most))
        shapes = [(n, n, True) for n in (1, most)] + [(n, min(64, most), True) for n in (32, 256, 1024)]
        steps = [(n, requests, False) for n in (1, 100, 8192) for requests in (1, 4, 64, 4096) if requests <= n]
        for step in shapes + steps:
            assert planned_bytes(heads, kv_heads, head_dim, processors, *step) <= size, step


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "not installed: pip install 'flashinfer-python>=0.6.12,<0.8'"),
        ("0.5.3", "0.5.3 is installed; this version of Branchwise needs >=0.6.12,<0.8"),
        ("0.8.0", "0.8.0 is installed"),
        (OLDEST, "runs on CUDA devices, not on cpu"),
    ],
)
def test_the_reason_why_it_cannot_run(version, message, monkeypatch):
    def installed(name):
        if version is None:
            raise subject_metadata.PackageNotFoundError(name)
        return version

    subject_metadata = flashinfer_module.metadata
    monkeypatch.setattr(flashinfer_module.metadata, "version", installed)
    with pytest.raises(Unavailable, match="FlashInfer") as error:
        check_available(torch.device("cpu"), torch.bfloat16, 128)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("Could not find nvcc and default cuda_home='/usr/local/cuda' doesn't exist\nmore"),
            "Could not fi",
        ),
        (
            RuntimeError("Ninja build failed.\n[1/9] c++ -c x\n/bin/sh: c++: not found\nstopped"),
            "/bin/sh: c++: not found",
        ),
        (ImportError("libcuda.so.1: cannot open shared object file: No such file or directory"), "libcuda.so.1: can"),
    ],
)
def test_a_failed_compilation_is_one_line(error, said, monkeypatch):
    class Broken:
        @property
        def is_compiled(self):
            raise error

    monkeypatch.setattr(Variant, "spec", lambda variant: Broken())
    with pytest.raises(Unavailable) as caught:
        flashinfer_module.build([Variant("fa2", torch.bfloat16, 128), Variant("fa3", torch.bfloat16, 128)])
    assert str(caught.value).startswith(f"FlashInfer's kernels could not be compiled: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "compiled, broken, done",
    [(True, False, ["load x.so"]), (True, True, ["load x.so", "build"]), (False, False, ["build"])],
)
def test_a_compiled_module_is_loaded_without_its_sources(compiled, broken, done, monkeypatch, caplog):
    """And compiled again if it cannot be loaded."""
    calls = []

    def load(path):
        calls.append(f"load {path}")
        if broken:
            raise OSError("x.so: file too short")
        return "module"

    spec = SimpleNamespace(
        is_compiled=compiled,
        get_library_path=lambda: "x.so",
        load=load,
        build_and_load=lambda: calls.append("build") or "module",
    )
    monkeypatch.setattr(Variant, "spec", lambda variant: spec)
    flashinfer_module._load.cache_clear()
    try:
        assert flashinfer_module._load(Variant("fa2", torch.bfloat16, 128)) == "module"
    finally:
        flashinfer_module._load.cache_clear()
    assert calls == done
    assert ("file too short" in caplog.text) == broken


@pytest.mark.parametrize("compiled", [True, False])
def test_building_later(compiled, monkeypatch):
    """What FlashInfer's cache has is loaded at once; the rest in a thread."""
    threads = []
    monkeypatch.setattr(Variant, "spec", lambda variant: SimpleNamespace(is_compiled=compiled))
    monkeypatch.setattr(flashinfer_module, "_load", lambda variant: threads.append(threading.current_thread()))
    future = flashinfer_module.build_later([Variant("fa3", torch.bfloat16, 128)])
    if compiled:
        assert future.done()
    assert future.result(100) is None
    assert len(threads) == 1


def test_a_process_that_exits_does_not_wait_for_the_compiler():
    program = """if True:
        import time
        from branchwise.kernels.attention import flashinfer_module as subject
        subject._compiled = lambda variants: False
        subject._load = lambda variant: time.sleep(600)
        assert not subject.build_later([subject.Variant("fa3", None, 128)]).done()
    """
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_later_build_that_fails_is_told_by_its_future(monkeypatch, caplog):
    def fail(variant):
        raise RuntimeError("nvcc: not found")

    monkeypatch.setattr(Variant, "spec", lambda variant: SimpleNamespace(is_compiled=False))
    monkeypatch.setattr(flashinfer_module, "_load", fail)
    future = flashinfer_module.build_later([Variant("fa3", torch.bfloat16, 128)])
    assert isinstance(future.exception(10), Unavailable)
    assert "serving goes on without fa3" in caplog.text


# `csrc/batch_prefill_jit_binding.cu` declares `plan` so, and its successors append parameters.
BINDING = """
using tvm::ffi::Array;

Array<int64_t> BatchPrefillWithKVCache{sm90}Plan(
    TensorView float_workspace_buffer, TensorView int_workspace_buffer,
    TensorView page_locked_int_workspace_buffer, TensorView qo_indptr, TensorView kv_indptr,
    TensorView kv_len_arr, int64_t total_num_rows, int64_t batch_size, int64_t num_qo_heads,
    int64_t num_kv_heads, int64_t page_size, bool enable_cuda_graph, int64_t head_dim_qk,
    int64_t head_dim_vo, bool causal, int64_t window_left{tail});

void BatchPrefillWithPagedKVCacheRun(TensorView float_workspace_buffer, TensorView q);
"""
TAIL = ", int64_t fixed_split_size,\n    bool disable_split_kv, int64_t num_colocated_ctas"
PLANS = {
    "0.6.12": (TAIL, 19),
    "0.6.16": (TAIL + ", int64_t uniform_q_len", 20),
    "0.7.4": (TAIL + ", int64_t uniform_q_len,\n    bool fixed_uniform_q_len", 21),
}


@pytest.fixture
def install(monkeypatch, tmp_path):
    """``install(tail)``: FlashInfer's sources, with ``tail`` behind the parameters that `fa2` always had."""
    folder = tmp_path / "data" / "csrc"
    folder.mkdir(parents=True)
    monkeypatch.setattr(
        flashinfer_module, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    )

    def write(tail):
        flashinfer_module.plan_tail.cache_clear()
        (folder / "batch_prefill_jit_binding.cu").write_text(BINDING.format(sm90="", tail=tail))
        (folder / "batch_prefill_sm90_jit_binding.cu").write_text(BINDING.format(sm90="SM90", tail=""))

    yield write
    flashinfer_module.plan_tail.cache_clear()


@pytest.mark.parametrize("version", PLANS)
def test_plan_is_called_with_the_arguments_of_the_installed_version(version, install, monkeypatch):
    tail, count = PLANS[version]
    install(tail)
    calls = []
    monkeypatch.setattr(
        flashinfer_module, "_load", lambda variant: SimpleNamespace(plan=lambda *args: calls.append(args))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    ints = torch.zeros(8, dtype=torch.int32)
    for kernel, expected in ("fa2", count), ("fa3", 16):
        call = flashinfer_module.PagedCall(
            Variant(kernel, torch.bfloat16, 128), 9, True, 32, 8, 16, torch.zeros(8), (ints, ints)
        )
        call.plan(ints, ints, ints, 8, capture=True)
        assert len(calls[-1]) == expected
        assert calls[-1][14:16] == (True, 8)  # causal, window_left
    assert calls[0][16:] == (-1, False, 0, 0, False)[: count - 16]


@pytest.mark.parametrize("tail", [TAIL + ", int64_t something_new", ""], ids=["a new parameter", "none"])
def test_a_plan_with_unknown_parameters_is_refused(tail, install, monkeypatch):
    install(tail)
    if not tail:  # the head is another too
        flashinfer_module.plan_tail.cache_clear()
        monkeypatch.setattr(flashinfer_module, "_PLAN_HEAD", ("another", "head"))
    with pytest.raises(
        Unavailable, match=r"does not support, in .*window_left.*; install flashinfer-python>=0\.6\.12,<="
    ):
        flashinfer_module.plan_tail("fa2")


def test_unreadable_sources_are_refused(install):
    with pytest.raises(Unavailable, match="FlashInfer's sources cannot be read"):
        flashinfer_module.plan_tail("fa2")


@pytest.mark.parametrize("fa3", [Future()], ids=["while it compiles"])
def test_a_backend_that_is_dropped_is_freed_at_once(backend):
    """A cycle would keep the pool, most of a GPU's memory, until the garbage collector runs."""
    pool, table = backend[0]._pool, backend[0]._table
    gc.disable()
    try:
        dropped = weakref.ref(subject.FlashInferAttention(pool, SPECS, HEADS, table, ops, 8))
        assert dropped() is None
    finally:
        gc.enable()
