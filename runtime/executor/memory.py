"""The memory plan: bytes of weights, KV pages, page table and activations, decided before anything is allocated."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...kernels.kv_format import problem
from ...kernels.kv_pool import KVLayout
from ..config import EngineConfig, parse_bytes
from ..errors import LoadError
from ..models.implementation import AnyConfig, weight_bytes, weight_format
from ..models.weights import rank_config
from ..parallel.group import TensorGroup
from ..tiers.page_format import PageFormat
from .graphs import largest_shape

GIB = 1024**3
# Of a GPU, beyond weights and activations. Measured on an H200, an 8B and a 70B on two ranks with 48 captured steps:
WORKSPACES = 3 * GIB // 8  # attention's and kernels: 0.29 to 0.31 GiB over quantized pages
FLASHINFER_WORKSPACES = GIB // 8  # more, where FlashInfer reads the pool
RANK_BUFFERS = GIB // 4  # where ranks exchange tensors, until it is measured: 0.25 GiB
# What ``gpu_memory_utilization`` leaves must hold captured steps: their nodes (0.47 GiB), and a memory pool with the
# activations of the largest; and 0.75 GiB that stay free.
GRAPHS_AND_MARGIN = 5 * GIB // 4
INDICES = 2  # arrays of the page table's size: FlashInfer's page indices of decodes and of chunks
DISK_STAGING = GIB // 4  # of host memory, for pages on their way to and from a disk tier
_AT_MOST = "at most: the memory of KV pages is taken as they are first used, and stays (--kv-cache-tokens)"
CPU_KV_LIMIT = 4 * GIB  # unless --kv-cache-tokens sets another size: a CPU rarely profits from more


@dataclass(frozen=True, slots=True)
class RankMemory:
    """What one rank would plan by itself: bytes, and pages of KV."""

    free: int
    weights: int
    activations: int
    reserve: int
    pages: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of everything large on one rank's device. All ranks have as many pages: as many as fit each of them."""

    device: str
    dtype: torch.dtype
    weight_format: str
    free_bytes: int  # before the weights were loaded
    weight_bytes: int
    activation_bytes: int  # of the largest step: measured on a GPU, an upper estimate on a CPU
    reserve_bytes: int  # on a GPU: workspaces, libraries and a copy of quantized pages, within the share that is used
    graph_bytes: int  # on a GPU, for captured steps, outside of that share
    layout: KVLayout
    num_pages: int
    max_num_seqs: int
    max_pages_per_row: int
    limit: str  # why the pool is not larger
    read_bytes: int  # of the weights: what a step reads
    ranks: tuple[RankMemory, ...] = ()  # of all ranks, where there are several

    @property
    def kv_tokens(self) -> int:
        return self.num_pages * self.layout.page_size

    @property
    def kv_bytes(self) -> int:
        return self.num_pages * self.layout.page_bytes

    @property
    def largest_bytes(self) -> int:
        """What the process takes at most beside its code. A CPU takes the memory of KV pages as they are first used."""
        fixed = self.weight_bytes + self.activation_bytes + self.reserve_bytes + self.page_table_bytes
        return fixed + self.kv_bytes

    @property
    def page_table_bytes(self) -> int:
        return self.max_num_seqs * self.max_pages_per_row * 4

    def rows(self) -> list[tuple[str, str, str]]:
        """Rows of a table: (name, size, derivation)."""
        layout = self.layout
        of_layers, names = f"{layout.num_layers} layers × {layout.kv_heads} KV heads", dict.fromkeys(layout.names)
        token = f"2 (K, V) × {of_layers} × {layout.head_dim} × {layout.dtype.itemsize} B ({layout.names[0]})"
        if layout.quantized:
            token = f"{of_layers} × {layout.head_bytes} B (K and V with scales, {' and '.join(names)})"
        return [
            ("free on " + self.device, human_bytes(self.free_bytes), "before loading"),
            ("weights", human_bytes(self.weight_bytes), self.weight_format),
            ("activations", human_bytes(self.activation_bytes), "the largest step, at most"),
            *([("reserve", human_bytes(self.reserve_bytes), "workspaces, libraries")] if self.reserve_bytes else []),
            ("page table", human_bytes(self.page_table_bytes), f"{self.max_num_seqs} rows × {self.max_pages_per_row}"),
            ("KV of a token", human_bytes(layout.token_bytes), token),
            ("KV pages", human_bytes(self.kv_bytes), f"{self.num_pages:,} × {layout.page_size} tokens, {self.limit}"),
            ("KV tokens", f"{self.kv_tokens:,}", "held at once, shared prefixes once"),
            *([("CUDA graphs", human_bytes(self.graph_bytes), "and a margin, beside")] if self.graph_bytes else []),
            *([("in all", human_bytes(self.largest_bytes), _AT_MOST)] if self.device == "cpu" else []),
            *(
                (
                    f"rank {rank}",
                    human_bytes(one.weights + one.activations + one.reserve + self.page_table_bytes + self.kv_bytes),
                    f"of {human_bytes(one.free)} free: weights {human_bytes(one.weights)}, activations "
                    f"{human_bytes(one.activations)}, room for {one.pages:,} pages",
                )
                for rank, one in enumerate(self.ranks)
            ),
        ]

    def lines(self) -> list[str]:
        """The plan as aligned text."""
        rows = self.rows()
        names, sizes = max(len(row[0]) for row in rows), max(len(row[1]) for row in rows)
        return [f"{what:<{names}}  {size:>{sizes}}  {how}" for what, size, how in rows]


def plan_memory(
    config: EngineConfig,
    model: AnyConfig,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    max_num_batched_tokens: int,
    measured: tuple[int, int, int, int] | None = None,
    rank: int = 0,
    gpu_bytes: int | None = None,
) -> MemoryPlan:
    """Decides the number of KV pages of a rank. Raises `LoadError` if no memory is left for them.

    Called before the weights are loaded, and on a GPU again afterwards with what was ``measured``: bytes free before
    loading, bytes of the weights, bytes of the largest step, and what else had been taken by then (`taken_beside`).

    ``gpu_bytes``: plan for a Hopper GPU with that much memory, all of it free, which need not be here; ``device`` is
    then ``cuda``.

    With ``kv_cache_tokens`` the pool holds that many tokens, rounded up to whole pages. Otherwise it takes what
    ``gpu_memory_utilization`` of a GPU's memory leaves, however few requests run at once: pages that no request uses
    are the cache. Captured steps are outside of that share, which is less where the rest has no room for them. On a CPU
    it takes half of the free memory times ``gpu_memory_utilization``, less the weights and activations, and at most
    4 GiB; ranks on a CPU share both.
    """
    free, total = device_memory(device) if gpu_bytes is None else (gpu_bytes, gpu_bytes)
    ranks, int8 = config.tensor_parallel_size, config.quantization == "int8"
    weights, read = (weight_bytes(model, dtype, device, rank, ranks, int8=int8, copied=each) for each in (True, False))
    activations = activation_bytes(model, dtype, max_num_batched_tokens, config.max_num_seqs, ranks)
    others = RANK_BUFFERS if ranks > 1 else 0
    if measured is not None:
        free, weights, activations, others = measured
    model = rank_config(model, ranks)
    capability = None
    if device.type == "cuda" and config.kv_cache_dtype != "auto":
        capability = torch.cuda.get_device_capability(device) if gpu_bytes is None else (9, 0)
    layout = kv_layout(config, model, dtype, capability)
    page = layout.page_bytes
    row_pages = -(-max_model_len // config.page_size)
    reserve = graphs = table = 0
    if device.type == "cuda":
        table = 4 * config.max_num_seqs * row_pages
        reserve = others + WORKSPACES + INDICES * table
        largest = min(largest_shape(config.max_num_seqs), max_num_batched_tokens)
        graphs = GRAPHS_AND_MARGIN + activations * largest // max_num_batched_tokens
        if layout.quantized:
            copied, pages = layout.dequantized(row_pages)
            reserve += pages * copied.page_bytes
        else:
            reserve += FLASHINFER_WORKSPACES
    if config.kv_cache_tokens is not None:
        pages, limit = -(-config.kv_cache_tokens // config.page_size), "as asked by --kv-cache-tokens"
        short = weights + activations + reserve + graphs + table + pages * page - free
        if short > 0:
            raise LoadError(
                f"--kv-cache-tokens {config.kv_cache_tokens} needs {human_bytes(short)} more memory than {device} has "
                f"free ({human_bytes(free)})"
            )
    else:
        if device.type == "cpu":
            share = config.gpu_memory_utilization / 2 / ranks
            budget, reason = free * share, f"{share:.0%} of free memory less the rest"
        else:
            used = total - free
            budget = min(total * config.gpu_memory_utilization, total - graphs) - used
            reason = f"what {config.gpu_memory_utilization:.0%} of the memory leaves"
        pages, limit = int(budget - weights - activations - reserve - table) // page, reason
        if device.type == "cpu" and pages > CPU_KV_LIMIT // (ranks * page):
            pages, limit = CPU_KV_LIMIT // (ranks * page), "the default limit on a CPU (--kv-cache-tokens sets another)"
        if pages < 1:
            workspaces = f", workspaces and libraries {human_bytes(reserve)}" if reserve else ""
            taken = f"weights take {human_bytes(weights)}, activations {human_bytes(activations)}{workspaces}"
            there = f"{human_bytes(free)} of {human_bytes(total)} are free on {device}"
            if weights + activations + reserve + table + graphs > total:  # no setting helps
                more = "more GPUs (--tensor-parallel-size)" if device.type == "cuda" else "a machine with more memory"
                raise LoadError(f"the model does not fit: {taken}; {there}; use a smaller model or {more}")
            raise LoadError(
                f"no memory for a KV cache: {taken}, of {human_bytes(max(0, int(budget)))} ({there}); raise "
                "--gpu-memory-utilization, lower --max-num-batched-tokens or use a smaller model"
            )
    return MemoryPlan(
        device=str(device),
        dtype=dtype,
        weight_format=weight_format(model, dtype, device, int8=int8) + _no_bfloat16(config, model, dtype, device),
        free_bytes=free,
        weight_bytes=weights,
        activation_bytes=activations,
        reserve_bytes=reserve,
        graph_bytes=graphs,
        layout=layout,
        num_pages=pages,
        max_num_seqs=config.max_num_seqs,
        max_pages_per_row=min(row_pages, pages),  # a row has no page twice
        limit=limit,
        read_bytes=read,
    )


def kv_layout(
    config: EngineConfig, model: AnyConfig, dtype: torch.dtype, capability: tuple[int, int] | None
) -> KVLayout:
    """How keys and values are stored. Raises `LoadError` for a format that the device or the model cannot have.

    ``capability``: see `kernels.kv_format.problem`.
    """
    choice = config.kv_cache_dtype
    reason = problem(choice, model.head_dim, capability)
    if reason is not None:
        raise LoadError(f"--kv-cache-dtype {choice}: {reason}")
    return KVLayout.of(choice, model.num_layers, config.page_size, model.num_kv_heads, model.head_dim, dtype)


def agree(plan: MemoryPlan, group: TensorGroup) -> MemoryPlan:
    """The plan that all ranks follow: as many pages as the rank with the least room for them has."""
    if group.size == 1:
        return plan
    own = torch.tensor(
        [plan.free_bytes, plan.weight_bytes, plan.activation_bytes, plan.reserve_bytes, plan.num_pages],
        dtype=torch.int64,
        device=plan.device,
    )
    ranks = tuple(RankMemory(*one) for one in group.all_gather(own).tolist())
    pages = min(one.pages for one in ranks)
    limit = plan.limit if pages == plan.num_pages else "as many as fit every rank"
    return replace(
        plan, num_pages=pages, max_pages_per_row=min(plan.max_pages_per_row, pages), limit=limit, ranks=ranks
    )


def _no_bfloat16(config: EngineConfig, model: AnyConfig, dtype: torch.dtype, device: torch.device) -> str:
    """Why ``--dtype auto`` is not the checkpoint's bfloat16 on this CPU."""
    replaced = config.dtype == "auto" and model.dtype == "bfloat16" and dtype == torch.float32 and device.type == "cpu"
    return " (the processor does not multiply bfloat16)" if replaced else ""


def activation_bytes(model: AnyConfig, dtype: torch.dtype, tokens: int, rows: int, ranks: int = 1) -> int:
    """An upper estimate for a step of ``tokens`` query tokens that samples ``rows``: MLP, attention, logits. Of the
    model's whole config, on one of ``ranks``."""
    heads = (2 * model.num_heads // ranks + 2 * max(1, model.num_kv_heads // ranks)) * model.head_dim
    widest = max(-(-3 * model.intermediate_size // ranks), heads) + 4 * model.hidden_size
    if model.experts is not None:  # of each expert: its input, gate and up, their product, its output twice
        expert = 3 * model.hidden_size + -(-3 * model.experts.size // ranks)
        widest = max(widest, model.experts.routing.top_k * (expert + 2 * model.hidden_size) + 4 * model.hidden_size)
    return tokens * widest * dtype.itemsize + 3 * max(rows, 256) * model.vocab_size * 4


def host_slots(config: EngineConfig, memory: MemoryPlan, group: TensorGroup) -> int:
    """Pages of the host tier, the same on every rank: what ``host_cache`` asks for, for all ranks together. A disk tier
    needs some of it, to pass through.

    Raises `LoadError` if the host has less memory free.
    """
    asked = parse_bytes(config.host_cache)
    free, _ = device_memory(torch.device("cpu"))
    if asked > free:
        raise LoadError(f"--host-cache {config.host_cache}: {human_bytes(free)} of memory are free")
    if config.disk_cache is not None and asked < DISK_STAGING:
        asked = min(DISK_STAGING, free // 4)
    slots = asked // group.size // PageFormat(memory.layout, config.host_cache_dtype == "fp8").page_bytes
    if group.size == 1 or not asked:
        return slots
    return int(group.all_gather(torch.tensor([slots], dtype=torch.int64, device=memory.device)).min())


def device_memory(device: torch.device) -> tuple[int, int]:
    """(free, total) bytes. On a CPU the available memory as the kernel counts it, within the container's limit."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # memory that torch caches from another engine of this process is free
        free, total = torch.cuda.mem_get_info(device)
        return free, total
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = total
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            free = int(fields["MemAvailable"].split()[0]) * 1024
    group = container_memory(Path("/sys/fs/cgroup"))
    if group is not None:
        free, total = min(free, group[0]), min(total, group[1])
    return free, total


def container_memory(root: Path) -> tuple[int, int] | None:
    """(free, limit) bytes of the control group (version 2, then 1); None without a limit. Cached file contents, such as
    weights that were loaded once, count as free: the kernel drops them when memory is needed."""
    for folder, limit_name, used_name, reclaimable in (
        (root, "memory.max", "memory.current", "inactive_file"),
        (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit, used = (folder / limit_name).read_text().strip(), (folder / used_name).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():
            kept = _statistics(folder / "memory.stat").get(reclaimable, 0)
            return max(int(limit) - max(int(used) - kept, 0), 0), int(limit)
    return None


def _statistics(path: Path) -> dict[str, int]:
    """A control group's ``memory.stat``: bytes by name."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in fields if len(pair) == 2 and pair[1].isdigit()}


def human_bytes(count: float) -> str:
    """1536 -> ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
