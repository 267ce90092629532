"""Which kernels run on a device: the choice behind ``--attention-backend``."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from importlib.util import find_spec
from typing import cast

import torch

from ...kernels import native, native_ops, sampling
from ...kernels import ops as torch_ops
from ...kernels.attention.base import AttentionBackend, LayerSpec, Unavailable
from ...kernels.attention.fixed_backend import FixedAttention
from ...kernels.attention.torch_backend import TorchAttention
from ...kernels.base import Ops
from ...kernels.kv_pool import DEQUANTIZED_BYTES, KVPool
from ..config import EngineConfig
from ..errors import LoadError
from ..models.implementation import AnyConfig
from .graphs import CHUNK_TOKENS, CHUNKS, DECODES
from .inputs import PageTable

logger = logging.getLogger(__name__)


def preload(config: EngineConfig, device: torch.device) -> None:
    """Imports FlashInfer, which takes half a second, in a thread, while the device is initialized and weights load."""
    if device.type == "cuda" and config.attention_backend in ("auto", "tree", "flashinfer"):
        threading.Thread(target=_import_flashinfer, name="flashinfer-import", daemon=True).start()


def _import_flashinfer() -> None:
    with contextlib.suppress(Exception):  # whoever needs it imports it again, and tells why it fails
        importlib.import_module("flashinfer.jit")


def pick_ops(device: torch.device, *, deterministic: bool = False) -> Ops:
    """Triton's where it runs. On a CPU torch's, and for few rows the compiled ones once they are there, which is at no
    fixed time: not with ``deterministic``."""
    if _problem_with_triton(device) is None:
        from ...kernels import triton_ops

        return cast(Ops, triton_ops)
    if device.type == "cpu" and not deterministic:
        native.start()
        return cast(Ops, native_ops)
    return cast(Ops, torch_ops)


def set_overlap(config: EngineConfig, device: torch.device) -> None:
    """Kernels start before the ones ahead have ended on one GPU alone: with the sums of several ranks between them, no
    device has checked it."""
    if _problem_with_triton(device) is None:
        from ...kernels import triton_launch

        triton_launch.OVERLAP = config.tensor_parallel_size == 1


def pick_sampling(device: torch.device) -> sampling.SamplingKernels | None:
    """Triton's where it runs."""
    if _problem_with_triton(device) is None:
        from ...kernels import triton_sampling

        return cast(sampling.SamplingKernels, triton_sampling)
    return None


def _problem_with_triton(device: torch.device) -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed: pip install 'triton>=3.6'"
    if device.type != "cuda":
        return f"Triton runs on CUDA devices, not on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton supports compute capability 8.0 or newer"
    return None


def make_attention(
    config: EngineConfig, pool: KVPool, layers: list[LayerSpec], num_heads: int, table: PageTable, max_tokens: int
) -> AttentionBackend:
    """The backend of ``config.attention_backend``.

    ``auto`` and ``tree`` are tree attention over FlashInfer, or over Triton where FlashInfer does not run. Where
    neither does, ``auto`` is torch. ``flashinfer`` and ``triton`` read keys once for each request. Quantized pages are
    read by Triton and torch alone. ``config.deterministic`` has a backend of its own.

    ``max_tokens``: the most query tokens of a step, padding included.

    Raises `LoadError` with the reason where a backend that was named cannot run.
    """
    if config.deterministic:
        try:
            return _triton(pool, layers, num_heads, table, max_tokens, fixed=True)
        except Unavailable:  # on a CPU, or without Triton
            return FixedAttention(pool, layers, num_heads)
    choice, makers = config.attention_backend, {"flashinfer": _flashinfer, "triton": _triton}
    if choice == "torch" or (choice == "auto" and pool.device.type == "cpu"):
        return TorchAttention(pool, layers, num_heads)
    if pool.layout.quantized:
        if choice == "flashinfer":
            raise LoadError(f"--attention-backend flashinfer reads no {pool.layout.names[1]} pages: use tree or triton")
        del makers["flashinfer"]
    for name in [choice] if choice in makers else makers:
        try:
            flat = makers[name](pool, layers, num_heads, table, max_tokens)
        except Unavailable as error:
            if choice == name:
                raise LoadError(f"--attention-backend {name}: {error}") from error
            logger.warning("attention does not run on %s: %s", name, error)
            continue
        if DEQUANTIZED_BYTES and pool.layout.quantized and choice != name:
            flat = _dequantizing(flat, pool, layers, num_heads, table)
        if choice == name or (choice == "auto" and _problem_with_triton(pool.device) is not None):
            return flat
        # Whether a plan fits a captured step depends on the costs, and ranks must run steps of one shape.
        return _over(flat, pool, layers, num_heads, table, max_tokens, measure=config.tensor_parallel_size == 1)
    if choice == "tree":
        raise LoadError("--attention-backend tree: neither FlashInfer nor Triton can run its other steps")
    return TorchAttention(pool, layers, num_heads)


def describe_attention(config: EngineConfig, model: AnyConfig, device: torch.device) -> str:
    """Which attention would serve, for `branchwise doctor`: nothing is compiled or measured.

    On a GPU it says from how many tokens on shared prefixes are read once by the built-in costs. A start measures them
    on the device and logs what it found.
    """
    choice, problem = config.attention_backend, _problem_with_triton(device)
    if config.deterministic:
        return "fixed tiles: the same bits whatever else is in a step (--deterministic)"
    if choice == "torch" or (choice == "auto" and device.type == "cpu"):
        return "torch, which reads each shared prefix once"
    if choice in ("flashinfer", "triton"):
        return f"{choice}, which reads a shared prefix once for each request"
    if problem is not None:
        return f"not the tree: {problem}"
    from ...kernels.attention.tree_backend import MIN_KEYS, SLOTS, WORKERS
    from ...kernels.attention.tree_costs import TreeCosts
    from ...kernels.attention.tree_gate import describe
    from ...kernels.attention.tree_plan import TreeLimits

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    workers = tuple(max(1, each * processors // model.num_kv_heads) for each in WORKERS)
    limits = TreeLimits((SLOTS,) * len(WORKERS), SLOTS, workers, MIN_KEYS)
    gate = describe(model.num_heads // model.num_kv_heads, config.page_size, TreeCosts(), limits)
    return f"tree: by the built-in costs, which a start measures anew, {gate}"


def describe_small_steps(config: EngineConfig) -> str:
    """Whether compiled kernels compute the small steps of a CPU, for `branchwise doctor`."""
    return "no: --deterministic runs torch's operations" if config.deterministic else native.describe()


def _over(
    flat: AttentionBackend,
    pool: KVPool,
    layers: list[LayerSpec],
    num_heads: int,
    table: PageTable,
    max_tokens: int,
    *,
    measure: bool,
) -> AttentionBackend:
    """Tree attention, with ``flat`` for the steps that share little. ``measure``: see `TreeAttention`."""
    problem = _problem_with_triton(pool.device)
    if problem is not None:
        raise LoadError(f"--attention-backend tree: {problem}")
    from ...kernels.attention.tree_backend import TreeAttention

    return TreeAttention(pool, layers, num_heads, table.device, flat, max_tokens, measure=measure)


def _dequantizing(
    flat: AttentionBackend, pool: KVPool, layers: list[LayerSpec], num_heads: int, table: PageTable
) -> AttentionBackend:
    """``flat``, but long chunks run on FlashInfer over a copy of their pages; ``flat`` itself where that cannot run."""
    from ...kernels.attention.dequantized_chunks import DequantizedChunks
    from ...kernels.attention.flashinfer_backend import FlashInferAttention
    from ...kernels.attention.flashinfer_module import check_available

    rows, row_pages = len(table.host) - 1, table.host.shape[1]

    def make_long(copy: KVPool, of_copy: torch.Tensor) -> AttentionBackend:
        return FlashInferAttention(copy, layers, num_heads, of_copy, pick_ops(pool.device), rows, captured=(1, 1, 1))

    try:
        check_available(pool.device, pool.layout.dtype, pool.layout.head_dim)
        return DequantizedChunks(pool, flat, make_long, rows, row_pages)
    except Unavailable as error:
        logger.warning("long chunks over quantized pages do not run on FlashInfer: %s", error)
        return flat


def _flashinfer(
    pool: KVPool, layers: list[LayerSpec], num_heads: int, table: PageTable, max_tokens: int
) -> AttentionBackend:
    from ...kernels.attention.flashinfer_backend import FlashInferAttention
    from ...kernels.attention.flashinfer_module import check_available

    check_available(pool.device, pool.layout.dtype, pool.layout.head_dim)
    max_requests = len(table.host) - 1
    captured = min(max_requests, DECODES[-1]), CHUNK_TOKENS[-1], CHUNKS
    return FlashInferAttention(pool, layers, num_heads, table.device, pick_ops(pool.device), max_requests, captured)


def _triton(
    pool: KVPool,
    layers: list[LayerSpec],
    num_heads: int,
    table: PageTable,
    max_tokens: int,
    *,
    fixed: bool = False,
) -> AttentionBackend:
    problem = _problem_with_triton(pool.device)
    if problem is not None:
        raise Unavailable(problem)
    from ...kernels.attention.triton_backend import HEAD_DIMS, TritonAttention

    head_dim = pool.layout.head_dim
    if head_dim not in HEAD_DIMS:
        raise Unavailable(f"there is no Triton kernel for head_dim {head_dim} ({HEAD_DIMS[0]} to {HEAD_DIMS[-1]})")
    return TritonAttention(pool, layers, num_heads, len(table.host) - 1, max_tokens, fixed=fixed)
