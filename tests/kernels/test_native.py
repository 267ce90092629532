"""The compiled kernels of a CPU against torch, and how they are built and kept."""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from branchwise.kernels import linear as linear_module
from branchwise.kernels import native, native_ops, ops
from branchwise.kernels.kv_pool import KVLayer
from branchwise.kernels.linear import COPY_ROWS, Int8Linear, PlainLinear, packs
from branchwise.kernels.processor import multiplies_int8
from branchwise.kernels.quantize import QuantizedRows, Quantizer

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE[found.dtype])


def close_quantized(found: QuantizedRows, expected: QuantizedRows) -> None:
    """A sum that is rounded otherwise may fall to the next step."""
    torch.testing.assert_close(found.scales, expected.scales)
    assert (found.values.int() - expected.values.int()).abs().max() <= 1
    assert (found.values != expected.values).float().mean() < 0.02


class Calls:
    """The library, with the names of the functions that were called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library, self.names = library, list[str]()

    def __getattr__(self, name: str) -> Callable[..., None]:
        self.names.append(name)
        function: Callable[..., None] = getattr(self._library, name)
        return function


@pytest.fixture
def calls(compiled_kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    counted = Calls(compiled_kernels)
    monkeypatch.setattr(native, "_library", counted)
    return counted.names


@DTYPES
@pytest.mark.parametrize("rows", [1, 5])
def test_norms(rows: int, dtype: torch.dtype, calls: list[str]) -> None:
    x, residual = torch.randn(rows, 96, dtype=dtype), torch.randn(rows, 96, dtype=dtype) * 3
    weight, same = torch.randn(96), residual.clone()
    close(native_ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5))
    close(native_ops.add_rms_norm(x, residual, weight, 1e-5), ops.add_rms_norm(x, same, weight, 1e-5))
    assert residual.equal(same)
    quantizer = Quantizer(torch.uint8)
    found = native_ops.add_rms_norm_quantized(x, residual, weight, 1e-5, quantizer)
    expected = ops.add_rms_norm_quantized(x, same, weight, 1e-5, quantizer)
    if dtype == torch.float32:  # torch rounds to bfloat16 before it quantizes
        close_quantized(found, expected)
    assert calls == ["add_rms_norm"] * 3


@DTYPES
@pytest.mark.parametrize("rows", [1, 5])
def test_silu(rows: int, dtype: torch.dtype, calls: list[str]) -> None:
    x = torch.randn(rows, 128, dtype=dtype) * 4
    x[0, :6] = torch.tensor([0.0, -0.0, 80.0, -80.0, 1e4, -1e4], dtype=dtype)
    close(native_ops.gate_mul(x, "silu"), ops.gate_mul(x, "silu"))
    quantizer = Quantizer(torch.uint8)
    if dtype == torch.float32:
        x = x.clamp(-8, 8)
        close_quantized(
            native_ops.gate_mul_quantized(x, "silu", quantizer), ops.gate_mul_quantized(x, "silu", quantizer)
        )
    assert set(calls) == {"silu_mul"}
    count = len(calls)
    close(native_ops.gate_mul(x, "gelu_tanh"), ops.gate_mul(x, "gelu_tanh"))
    assert len(calls) == count


@DTYPES
@pytest.mark.parametrize("half", [16, 32])
@pytest.mark.parametrize("normed", ["not", "before", "after"])
def test_rope_write(normed: str, half: int, dtype: torch.dtype, calls: list[str]) -> None:
    heads, kv_heads, dim = 6, 2, 64
    qkv = torch.randn(3, heads + 2 * kv_heads, dim, dtype=dtype)
    cos, sin = torch.randn(3, 2, half).unbind(1)
    slots = torch.tensor([9, 4, 30])
    norm = None if normed == "not" else torch.randn(heads + kv_heads, dim)
    results = []
    for module in (native_ops, ops):
        pages = torch.zeros(2, 8, 4, kv_heads, dim, dtype=dtype)
        layer = KVLayer.of(pages)
        written = module.rope_write(qkv.clone(), heads, cos, sin, layer, slots, norm, 1e-6, normed == "after")
        results.append((*written, pages))
    for found, expected in zip(*results, strict=True):
        close(found, expected)
    assert calls == ["rope_write"]


@pytest.mark.parametrize("shape", [(48, 64), (65, 192), (130, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(shape: tuple[int, int], with_bias: bool, calls: list[str]) -> None:
    """Of a bfloat16 checkpoint: the same values, whatever the number of rows; of more rows packed ones."""
    weight, bias = torch.randn(shape).bfloat16(), torch.randn(shape[0]) if with_bias else None
    layer = PlainLinear(weight, bias, torch.float32)
    layer.lay_out()
    for rows in range(1, COPY_ROWS + 2):
        x = torch.randn(rows, shape[1])
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(layer(x), exact.float(), rtol=1e-5, atol=1e-4)
    assert len(calls) == (COPY_ROWS if packs(weight.device, torch.float32) else 0)


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_of_a_bfloat16_model(with_bias: bool, calls: list[str]) -> None:
    """Sums in float32, rounded once; more rows take the packed kernel. The plan counts both weights."""
    cpu, weight = torch.device("cpu"), torch.randn(65, 192).bfloat16()
    bias = torch.randn(65).bfloat16() if with_bias else None
    if not packs(cpu, torch.bfloat16):
        pytest.skip("bfloat16 is not packed here")
    layer = PlainLinear(weight, bias)
    layer.lay_out()
    for rows in range(1, linear_module.BFLOAT16_ROWS + 1):
        x = torch.randn(rows, 192).bfloat16()
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        torch.testing.assert_close(layer(x), exact.bfloat16(), rtol=2**-8, atol=1e-3)
    assert len(calls) == linear_module.BFLOAT16_ROWS
    assert layer(torch.randn(linear_module.BFLOAT16_ROWS + 1, 192).bfloat16()).isfinite().all()
    assert len(calls) == linear_module.BFLOAT16_ROWS
    assert linear_module.linear_bytes(cpu, weight.shape, torch.bfloat16, int8=False) == 2 * weight.nbytes


def test_a_large_weight_is_kept_in_bfloat16_too(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to `NARROW_BYTES`, and where it stays in memory anyhow. The plan counts it."""
    monkeypatch.setattr(linear_module, "COPY_BYTES", 0)
    cpu, weight = torch.device("cpu"), torch.randn(64, 96).bfloat16()
    if not packs(cpu, torch.float32):
        pytest.skip("float32 is not packed here")
    packed = linear_module.linear_bytes(cpu, weight.shape, torch.float32, int8=False, copied=False)
    assert linear_module.linear_bytes(cpu, weight.shape, torch.float32, int8=False) == packed + weight.nbytes
    for limit, shared, kept in ((1 << 20, False, True), (0, True, True), (0, False, False)):
        monkeypatch.setattr(linear_module, "NARROW_BYTES", limit)
        layer = PlainLinear(weight, None, torch.float32, shared=shared)
        layer.lay_out()
        calls.clear()
        assert layer(torch.randn(2, 96)).isfinite().all()
        assert calls == ["linear"] * kept
    assert linear_module.linear_bytes(cpu, weight.shape, torch.float32, int8=False) == packed


@pytest.mark.parametrize("building", [True, False])
def test_a_weight_is_kept_for_a_library_that_is_being_built(
    building: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first start ever lays weights out before the library is there, and uses it once it is."""
    library, done = native.library(), threading.Event()
    builder = threading.Thread(target=done.wait)
    monkeypatch.setattr(native, "_builder", builder)
    monkeypatch.setattr(native, "_library", None)
    layer = PlainLinear(torch.randn(64, 96).bfloat16(), None, torch.float32)
    if not packs(torch.device("cpu"), torch.float32):
        pytest.skip("float32 is not packed here")
    builder.start()
    try:
        if not building:
            done.set()
            builder.join()
        layer.lay_out()
    finally:
        done.set()
        builder.join()
    monkeypatch.setattr(native, "_library", library)
    assert layer(torch.randn(2, 96)).isfinite().all()
    assert calls == ["linear"] * building


@pytest.mark.skipif(not multiplies_int8(), reason="the processor has no VNNI")
@pytest.mark.parametrize("shape", [(48, 64), (65, 192), (130, 128)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8_linear(
    shape: tuple[int, int], with_bias: bool, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of integers are exact: equal to oneDNN's but for the order of two multiplications."""
    layer = Int8Linear(torch.randn(shape), torch.randn(shape[0]) if with_bias else None)
    layer.lay_out()
    inputs = [torch.randn(rows, shape[1]) for rows in range(1, COPY_ROWS + 2)]
    found = [layer(x) for x in inputs]
    assert calls == ["linear"] * COPY_ROWS
    monkeypatch.setattr(native, "_library", None)
    for one, x in zip(found, inputs, strict=True):
        torch.testing.assert_close(one, layer(x), rtol=1e-6, atol=1e-6)


def test_a_narrower_bias_is_left_to_torch(calls: list[str]) -> None:
    layer = Int8Linear(torch.randn(64, 64), torch.randn(64).bfloat16())
    x = torch.randn(2, 64)
    assert layer(x).isfinite().all()
    assert calls == []


def test_full_vectors_alone_are_multiplied(calls: list[str]) -> None:
    x, weight = torch.randn(3, 40), torch.randn(70, 40).bfloat16()
    assert native_ops.linear(x, weight, None) is None
    assert native_ops.linear(torch.randn(3, 96)[:, ::2], torch.randn(70, 48).bfloat16(), None) is None
    assert calls == []


def test_threads_share_the_work(compiled_kernels: object) -> None:
    """The same sums, whoever computes them: on one thread, and on torch's team."""
    x, weight = torch.randn(5, 256), torch.randn(1000, 256).bfloat16()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(native_ops.linear(x, weight, None))
    finally:
        torch.set_num_threads(threads)
    assert all(found[0].equal(other) for other in found[1:])


def test_nan_stays_nan(calls: list[str]) -> None:
    """A row that is not finite is found by its logits: no kernel may hide it."""
    x = torch.randn(2, 128)
    x[1, 70] = torch.nan
    for found in (native_ops.rms_norm(x, torch.ones(128), 1e-5), native_ops.gate_mul(x, "silu")):
        assert found[0].isfinite().all()
        assert found[1].isnan().any()
    quantizer, residual = Quantizer(torch.uint8), torch.randn(2, 128)
    gated = native_ops.gate_mul_quantized(x, "silu", quantizer)
    for rows in (gated, native_ops.add_rms_norm_quantized(x, residual, torch.ones(128), 1e-5, quantizer)):
        assert rows.scales[0].isfinite().all()
        assert rows.scales[1].isnan().all()
    x = x.bfloat16()
    assert native_ops.rms_norm(x, torch.ones(128), 1e-5)[1].isnan().all()
    assert len(calls) == 5


def test_other_rows_run_torch(calls: list[str]) -> None:
    weight = torch.ones(40)
    for x in (
        torch.randn(native.ROWS + 1, 40),
        torch.randn(2, 40),
        torch.randn(2, 80)[:, ::2],
        torch.randn(2, 40).double(),
    ):
        close_to = ops.rms_norm(x, weight, 1e-5)
        assert native_ops.rms_norm(x, weight, 1e-5).equal(close_to)
    assert calls == []


# -- building ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user without a library, on a processor that could run one."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "branchwise"


@pytest.fixture
def small_source(compiled_kernels: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a compiler: a source that it compiles at once."""
    source = tmp_path / "native.c"
    source.write_text("void set_team(void *team) { (void)team; }")
    monkeypatch.setattr(native, "_SOURCE", source)
    monkeypatch.setattr(native, "_FUNCTIONS", {"set_team": (ctypes.c_void_p,)})
    monkeypatch.setattr(native, "_NICENESS", 0)
    monkeypatch.setattr(native, "_COMPILE_SECONDS", 3600)


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> str:
    path = folder / "cc"
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    monkeypatch.setattr(native, "_COMPILERS", (str(path),))
    return str(path)


def test_a_library_is_compiled_once(small_source: None, cache: Path) -> None:
    native.load()
    (path,) = cache.iterdir()
    assert cache.stat().st_mode & 0o777 == 0o700
    before = path.stat()
    native.load()
    assert path.stat() == before
    assert native.describe() == f"no: {native.SWITCH} is off"


def test_without_a_compiler_torch_runs(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_COMPILERS", ("no-such-compiler",))
    native._build()
    assert native.library() is None
    with pytest.raises(RuntimeError, match="no C compiler"):
        native.load()
    monkeypatch.delenv(native.SWITCH)
    assert native.describe().startswith("no: no C compiler")
    x, weight = torch.randn(2, 64), torch.randn(64)
    assert native_ops.rms_norm(x, weight, 1e-5).equal(ops.rms_norm(x, weight, 1e-5))


def test_a_narrower_processor_runs_torch(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    native._build()
    assert native.library() is None
    monkeypatch.delenv(native.SWITCH)
    assert native.describe() == "no: the processor has no AVX512"
    assert not cache.exists()


def test_a_compiler_that_fails_leaves_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = 'case "$*" in --version) echo 1;; *) echo "no memory" >&2; exit 3;; esac\n'
    fake_compiler(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError, match="exit status 3: no memory"):
        native.load()
    assert list(cache.iterdir()) == []
    native._build()
    assert native.library() is None


def test_a_compiler_that_hangs_is_ended(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the process that it has started, which keeps a pipe open."""
    pipe, readers = tmp_path / "pipe", list[int]()
    os.mkfifo(pipe)
    wait = subprocess.Popen.wait

    def wait_for_pipe(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if timeout is None:
            return wait(process)
        readers.append(os.open(pipe, os.O_RDONLY))  # once there is a writer
        raise subprocess.TimeoutExpired("cc", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_pipe)
    compiler = fake_compiler(tmp_path, monkeypatch, f"sleep 1000 >{pipe} & sleep 1000\n")
    cache.mkdir(parents=True)
    with pytest.raises(subprocess.TimeoutExpired):
        native.compile_library(compiler, cache / "native-x.so")
    (reader,) = readers
    try:
        assert select.select([reader], [], [], 300)[0]
        assert os.read(reader, 1) == b""  # the writer has ended
    finally:
        os.close(reader)
    assert list(cache.iterdir()) == []


def test_a_nicer_process_compiles_as_nicely(small_source: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root may make a process less nice."""
    found: list[int] = []
    monkeypatch.setattr(native.os, "getpriority", lambda which, who: 15)
    monkeypatch.setattr(native.os, "setpriority", lambda which, who, niceness: found.append(niceness))
    native.load()
    assert found == [15]


def test_a_library_of_another_kind_is_refused(small_source: None, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_FUNCTIONS", {"other": ()})
    with pytest.raises(RuntimeError, match="has no function other: remove it"):
        native.load()
    native._build()


def test_a_user_without_a_home_runs_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    fake_compiler(tmp_path, monkeypatch, "echo 1\n")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(native.SWITCH)
    monkeypatch.setattr(Path, "home", home)
    assert native.describe() == "no: no home"
    native._build()
    assert native.library() is None


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_what_others_can_write_is_not_loaded(what: str, cache: Path, tmp_path: Path, small_source: None) -> None:
    native.load()
    (path,) = cache.iterdir()
    if what == "link":
        path.rename(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    else:
        (cache if what == "folder" else path).chmod(0o777)
    with pytest.raises(OSError, match="is not this user's alone"):
        native.load()


def test_another_source_or_compiler_is_another_library(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fake_compiler(tmp_path, monkeypatch, "echo 1\n")
    names = {native.library_path(compiler).name}
    monkeypatch.setattr(native, "_FLAGS", (*native._FLAGS, "-g"))
    names.add(native.library_path(compiler).name)
    fake_compiler(tmp_path, monkeypatch, "echo 2\n")
    names.add(native.library_path(compiler).name)
    source = tmp_path / "native.c"
    source.write_text("int other;")
    monkeypatch.setattr(native, "_SOURCE", source)
    names.add(native.library_path(compiler).name)
    assert len(names) == 4


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_builder", None)
    native.start()
    assert native._builder is None
