"""The adapter to FlashInfer's compiled modules. No other file depends on their names or parameters.

FlashInfer's wrapper classes are not used. Their `plan` walks tensors element by element in Python (0.46 to 0.85 ms at
256 requests in 0.6, twice a step), their `run` checks and repacks its arguments for every layer, and each allocates
buffers that all our calls can share. `gen_batch_prefill_module` is public; ``plan`` and ``paged_run`` are those of
``csrc/batch_prefill.cu`` and ``csrc/batch_prefill_sm90.cu``, compared in all releases from 0.6.12 to 0.7.4. Only
``plan`` of `fa2` differs: 0.6.16 appended a parameter, 0.7.4 another (`plan_tail`).
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from packaging.version import Version
from torch import Tensor

from .base import Unavailable

logger = logging.getLogger(__name__)

OLDEST, NEWEST_READ, TOO_NEW = "0.6.12", "0.7.4", "0.8"
HEAD_DIMS = (64, 128, 256)
_INFORMATIVE = ("error:", "not found", "No such file")
_NHD, _NO_ROPE = 0, 0  # TensorLayout.NHD, PosEncodingMode.NONE
_BINDINGS = {"fa2": "batch_prefill_jit_binding.cu", "fa3": "batch_prefill_sm90_jit_binding.cu"}
# The parameters of ``plan``. FlashInfer binds them by position and number, and appends new ones from time to time.
_PLAN_HEAD = (
    *("float_workspace_buffer", "int_workspace_buffer", "page_locked_int_workspace_buffer"),
    *("qo_indptr", "kv_indptr", "kv_len_arr", "total_num_rows", "batch_size", "num_qo_heads", "num_kv_heads"),
    *("page_size", "enable_cuda_graph", "head_dim_qk", "head_dim_vo", "causal", "window_left"),
)
_PLAN_TAIL: dict[str, int | bool] = {
    "fixed_split_size": -1,  # decided by the planner
    "disable_split_kv": False,
    "num_colocated_ctas": 0,
    "uniform_q_len": 0,  # from 0.6.16: no promise about query lengths
    "fixed_uniform_q_len": False,  # from 0.7.4
}

FlashInferKernel = Literal["fa2", "fa3"]


@dataclass(frozen=True, slots=True)
class Variant:
    """What a module is compiled for."""

    kernel: FlashInferKernel
    dtype: torch.dtype
    head_dim: int
    window: bool = False
    softcap: bool = False

    def spec(self) -> Any:
        """FlashInfer's build recipe."""
        from flashinfer.jit import gen_batch_prefill_module

        dtype, dim = self.dtype, self.head_dim
        return gen_batch_prefill_module(
            self.kernel, dtype, dtype, dtype, torch.int32, dim, dim, _NO_ROPE, self.window, self.softcap, False
        )


def check_available(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Raises `Unavailable` unless a supported version of FlashInfer is installed and has kernels for this model."""
    try:
        version = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        raise Unavailable(
            f"FlashInfer is not installed: pip install 'flashinfer-python>={OLDEST},<{TOO_NEW}'"
        ) from None
    if not Version(OLDEST) <= Version(version) < Version(TOO_NEW):
        raise Unavailable(f"FlashInfer {version} is installed; this version of Branchwise needs >={OLDEST},<{TOO_NEW}")
    if device.type != "cuda":
        raise Unavailable(f"FlashInfer runs on CUDA devices, not on {device}")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise Unavailable("FlashInfer's fa2 kernels in bfloat16 need compute capability 8.0 or newer")
    if dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable(f"FlashInfer computes in bfloat16 or float16, not {str(dtype).removeprefix('torch.')}")
    if head_dim not in HEAD_DIMS:
        raise Unavailable(f"FlashInfer has no kernel for head_dim {head_dim} (it has {HEAD_DIMS})")
    plan_tail("fa2")
    logger.info("FlashInfer %s (supported: >=%s,<%s)", version, OLDEST, TOO_NEW)


@cache
def plan_tail(kernel: FlashInferKernel) -> list[int | bool]:
    """The arguments of the installed FlashInfer's ``plan`` behind ``window_left``, read from its C++ binding.

    Raises `Unavailable` if it has parameters that this adapter does not support.
    """
    package = find_spec("flashinfer")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    path = Path(folders[0] if folders else "flashinfer", "data", "csrc", _BINDINGS[kernel])
    try:
        found = re.search(r"\w+Plan\(([^()]*)\);", path.read_text())
    except OSError as error:
        raise Unavailable(f"FlashInfer's sources cannot be read: {error}") from error
    names = re.findall(r"(\w+)\s*(?:,|$)", found[1]) if found else []
    tail = names[len(_PLAN_HEAD) :]
    if tuple(names[: len(_PLAN_HEAD)]) != _PLAN_HEAD or not _PLAN_TAIL.keys() >= set(tail):
        raise Unavailable(
            f"FlashInfer's `plan` has parameters that this version of Branchwise does not support, in {path}: "
            f"{', '.join(names) or 'none found'}; install flashinfer-python>={OLDEST},<={NEWEST_READ}"
        )
    return [_PLAN_TAIL[name] for name in tail]


def build(variants: Sequence[Variant]) -> None:
    """Loads the modules, and compiles those that FlashInfer's cache lacks in parallel: half a minute the first time.

    FlashInfer's own `build_jit_specs` does not help: it runs ninja in another folder than `build_and_load` does, and
    each ninja considers the other's output stale, so both compile everything again at every start (0.6.12).
    """
    try:
        if not _compiled(variants):
            logger.warning(
                "compiling FlashInfer's attention kernels for this model: half a minute, the first time only"
            )
        for loading in [_in_thread(partial(_load, variant)) for variant in variants]:
            loading.result()
    except Exception as error:  # FlashInfer raises errors of any class
        raise Unavailable(
            f"FlashInfer's kernels could not be compiled: {_gist(str(error))} (it needs CUDA's nvcc and a C++ compiler)"
        ) from error


def build_later(variants: Sequence[Variant]) -> Future[None]:
    """`build` for modules that work can begin without: compiles in a thread what FlashInfer's cache lacks, and loads
    what it has before returning. A failure is logged and is the future's exception."""

    def run() -> None:
        try:
            build(variants)
        except Unavailable as error:
            logger.warning("serving goes on without %s: %s", names, error)
            raise

    names = ", ".join(dict.fromkeys(variant.kernel for variant in variants))
    try:
        compiled = _compiled(variants)
    except Exception:  # FlashInfer raises errors of any class; `build` says which
        compiled = True
    if not compiled:
        logger.warning("serving begins without FlashInfer's %s, which is compiled meanwhile (about a minute)", names)
    future = _in_thread(run)
    if compiled:
        wait([future])
    return future


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Runs ``work`` in a daemon thread: a process that exits does not wait for the compiler, as it does for the threads
    of an executor."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, name="flashinfer-build", daemon=True).start()
    return future


def _compiled(variants: Sequence[Variant]) -> bool:
    return all(variant.spec().is_compiled for variant in variants)


def _gist(output: str) -> str:
    """The most informative line of a compiler's output, or the first."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if any(word in line for word in _INFORMATIVE)), lines[0])[:300]


@cache
def _load(variant: Variant) -> Any:
    """The module as FlashInfer's cache has it, compiled if need be.

    `build_and_load` of 0.6 runs ninja first, which compiles a module again if generated sources are missing or newer:
    in an image that carries the compiled modules alone, say. The cache's folder is named by version and architecture,
    so what it has can be loaded as it is.
    """
    spec = variant.spec()
    if spec.is_compiled:
        try:
            return spec.load(spec.get_library_path())
        except Exception as error:  # written in part, or being written by another process
            logger.warning(
                "FlashInfer's compiled module cannot be loaded, and is compiled again: %s", _gist(str(error))
            )
    return spec.build_and_load()


class PagedCall:
    """One call over requests of a step, planned once and run for every layer of one window.

    Args:
        variant: which compiled module.
        window: a token sees the last ``window`` tokens, itself included; None: all.
        causal: False where each request has one query token, which sees all keys.
        heads, kv_heads, page_size: the model's and the pool's.
        workspace: uint8 on the device, for partial results of split keys. Shared by calls that follow each other.
        int_workspace: uint8 on the device and pinned on the host, of equal size, not shared with other calls: `plan`
            writes them and every `run` until the next `plan` reads them. The host side is copied asynchronously, so the
            copies of a step must have run before the next step plans.
    """

    def __init__(
        self,
        variant: Variant,
        window: int | None,
        causal: bool,
        heads: int,
        kv_heads: int,
        page_size: int,
        workspace: Tensor,
        int_workspace: tuple[Tensor, Tensor],
    ) -> None:
        self._module, self._fa2, self._dim = _load(variant), variant.kernel == "fa2", variant.head_dim
        self._plan_tail = plan_tail(variant.kernel)
        self._causal = causal
        self._window_left = -1 if window is None else window - 1
        self._heads, self._kv_heads, self._page_size = heads, kv_heads, page_size
        self._workspace, (self._ints, self._host_ints) = workspace, int_workspace
        self._pdl = torch.cuda.get_device_capability(workspace.device) >= (9, 0)
        self._plan: Any = None

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_lens: Tensor, rows: int, capture: bool) -> None:
        """int32 tensors on the host: query tokens ``[R + 1]`` and pages ``[R + 1]`` before each request, and their
        tokens ``[R]``. ``capture``: kernels' grids depend on R and ``rows`` (query tokens, at most) alone."""
        args = [
            *(self._workspace, self._ints, self._host_ints, qo_indptr, kv_indptr, kv_lens),
            *(rows, len(kv_lens), self._heads, self._kv_heads, self._page_size, capture, self._dim, self._dim),
            *(self._causal, self._window_left),
            *self._plan_tail,
        ]
        self._plan = self._module.plan(*args)

    def run(
        self,
        q: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
        out: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        last_page_lens: Tensor,
        scale: float,
        softcap: float,
        lse: Tensor | None = None,
    ) -> None:
        """Attends into ``out`` ``[rows, heads, D]``. Index tensors int32 on the device, as planned. ``lse``: float32
        ``[rows, heads]``, where to put the logarithm to base 2 of each row's sum."""
        args = [
            *(self._workspace, self._ints, self._plan, q, k_pages, v_pages),
            *(qo_indptr, kv_indptr, kv_indices, last_page_lens, out, lse),
            *(int(self._causal), _NHD, self._window_left, self._pdl),  # MaskMode: 0 none, 1 causal
        ]
        if self._fa2:
            args += [None] * 8  # custom mask (2), ALiBi, multi-item scoring (3), block scales of K and V
            args += [softcap, scale, 1.0, 1.0, 0]  # 1.0: RoPE's scale and theta, unused here
        else:
            args += [None] * 4  # multi-item scoring (3), scale of V
            args += [softcap, scale, 1.0, 0]
        self._module.paged_run(*args)
