"""Building an engine: a model's executor, tokenizer and grammar compiler, joined in an `EngineCore`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import EngineConfig, check, parse_bytes
from ..errors import LoadError
from ..executor.null import NullExecutor
from ..executor.startup_times import StartupTimes
from ..executor.torch_environment import prepare_torch
from ..grammar.compiler import GrammarCompiler
from ..models.folder import model_folder
from ..models.sampling_defaults import sampling_defaults
from ..parallel.ranks import Ranks
from ..scheduler.memory import LowerTiers
from ..step import Executor
from ..tiers.disk import DiskTier
from ..tiers.fingerprint import Fingerprint, model_fingerprint
from ..tiers.folder import CacheFolder, bytes_of_others
from ..tiers.split import OpenDisk, RankCopies, SplitDisk, SplitHost
from ..tokenizer.tokenizer import Tokenizer
from .core import EngineCore

if TYPE_CHECKING:  # it imports torch, which reads what `prepare_torch` sets
    from ..executor.executor import ModelExecutor

logger = logging.getLogger(__name__)

_COMPUTED_BY = ("attention_backend", "deterministic", "quantization")  # on these the bits of keys and values depend
RANK_MODULE = f"{__package__.rpartition('.')[0]}.executor.rank_worker"
NULL_POOL_TOKENS = 1 << 20
NULL_CONTEXT = 32_768


@dataclass(slots=True, frozen=True)
class LoadedEngine:
    core: EngineCore
    tokenizer: Callable[[], Tokenizer]  # loaded by its first call
    memory_plan: list[str]  # lines for display
    rank_pids: list[int] = field(default_factory=list)  # of the processes that compute parts of the model


def load_engine(
    config: EngineConfig,
    progress: Callable[[int, int], None] | None = None,
    failed: Future[str] | None = None,
    *,
    tokenizer_later: bool = False,
) -> LoadedEngine:
    """Loads a model. ``progress(done, total)`` is called with bytes of weights. Raises `LoadError`.

    ``tokenizer_later``: for a process that needs its tokenizer for constraints alone. Another one reports what is wrong
    with it.

    ``failed``: gets the reason, on another thread, when a process that computes a part of the model ends. The thread
    that drives the core may not return from a step then.
    """
    times = StartupTimes()
    check(config)
    prepare_torch()
    with ExitStack() as undo:
        ranks: Ranks | None = None
        if config.tensor_parallel_size > 1:  # first: they import torch while this process does
            ranks = Ranks(config.tensor_parallel_size, RANK_MODULE, failed or Future())
            undo.callback(ranks.close)
        import torch  # noqa: F401  # alone, as `import_torch_early` asks; it takes a second or more

        from ..executor.executor import ModelExecutor
        from ..executor.rank_zero import RankZero

        times.lap("imports")
        tokenizer = _tokenizer(config)
        if not tokenizer_later:
            tokenizer()
            times.lap("tokenizer")
        executor: Executor
        copies: RankCopies | None = None  # of a model that is split
        if ranks is None:
            executor = local = ModelExecutor.load(config, progress, times)
        else:
            executor = split = RankZero.load(config, ranks, progress, times)
            local, copies = split.local, RankCopies(split)
        gpu, lower = local.device.type == "cuda", None
        if local.host is not None:
            undo.callback(local.host.close)
            disk = None if config.disk_cache is None else _open_disk(config, local, local.host.page_bytes, copies)
            if disk is not None:
                undo.callback(disk.close)
            if ranks is not None and disk is not None:
                ranks.wait("disk")
            lower = LowerTiers(local.host if copies is None else SplitHost(local.host, copies), disk)
        core = _core(config, executor, tokenizer, local.eos_ids, local.max_model_len, gpu, lower)
        core.kv_token_bytes = local.memory_plan.layout.token_bytes
        undo.pop_all()
    times.lap("scheduler")
    logger.info("loaded in %s", times)
    lines = [*local.memory_plan.lines(), *_tier_lines(lower, config.tensor_parallel_size)]
    return LoadedEngine(core, tokenizer, lines, [] if ranks is None else ranks.pids)


def load_null_engine(config: EngineConfig, step_seconds: float) -> LoadedEngine:
    """An engine without a model or torch, whose steps take ``step_seconds``."""
    tokenizer = _tokenizer(config)
    pages = -(-(config.kv_cache_tokens or NULL_POOL_TOKENS) // config.page_size)
    executor = NullExecutor(pages, config.page_size, tokenizer().vocab_size, step_seconds)
    core = _core(config, executor, tokenizer, (), config.max_model_len or NULL_CONTEXT, gpu=False)
    return LoadedEngine(core, tokenizer, ["no model: tokens are computed from their positions"])


def _tokenizer(config: EngineConfig) -> Callable[[], Tokenizer]:
    """The model's tokenizer, loaded by the first call."""
    return cache(partial(Tokenizer.load, model_folder(config.model)))


def _tier_lines(lower: LowerTiers | None, ranks: int) -> list[str]:
    """The lower tiers, for display."""
    if lower is None:
        return []
    import torch

    from ..executor.memory import device_memory, human_bytes

    host = lower.host
    size, free = host.num_slots * host.page_bytes * ranks, device_memory(torch.device("cpu"))[0]
    lines = [f"host cache {human_bytes(size)} of {human_bytes(free)} free: {host.num_slots:,} pages"]
    if lower.disk is not None:
        folder = lower.disk.folder
        size = folder.max_records * host.page_bytes * ranks
        lines.append(f"disk cache {human_bytes(size)} at most, in {folder.path}")
    return lines


def _open_disk(config: EngineConfig, executor: ModelExecutor, page_bytes: int, copies: RankCopies | None) -> DiskTier:
    """``page_bytes``: of a page's part on one rank. Other ranks open theirs on a message. Raises `LoadError` if the
    folder cannot be used."""
    from ..executor.device import device_name

    memory = executor.memory_plan
    device = memory.device if memory.device == "cpu" else device_name(memory.device)
    settings = [str(getattr(config, name)) for name in _COMPUTED_BY if name in config.__struct_fields__]
    settings += ["long rope"] if executor.model_config.long_rope else []
    ranks = config.tensor_parallel_size
    layout = str(memory.layout) if ranks == 1 else f"{memory.layout} on each of {ranks} ranks"
    fingerprint = Fingerprint(
        model=model_fingerprint(model_folder(config.model), config.seed if config.load_format == "dummy" else None),
        computed_by=" ".join([device, str(memory.dtype), *settings]),
        layout=layout if config.host_cache_dtype == "auto" else f"{layout} as {config.host_cache_dtype}",
        page_bytes=page_bytes,
    )
    path, quota = Path(config.disk_cache or "").expanduser(), parse_bytes(config.disk_cache_size)
    if quota < page_bytes * ranks:
        raise LoadError(
            f"--disk-cache-size {config.disk_cache_size} is less than one page of {page_bytes * ranks} bytes"
        )
    others = bytes_of_others(path, fingerprint.digest)
    if others:
        logger.warning("disk cache: %d bytes of %s are of other models (branchwise cache prune)", others, path)
    folder = CacheFolder(path, fingerprint, max(1, (quota - others) // (page_bytes * ranks)))
    if copies is None:
        return DiskTier(folder, config.disk_cache_salted)
    with ExitStack() as undo:
        undo.callback(folder.close)
        copies.send(OpenDisk(str(folder.path), fingerprint.facts(), folder.max_records))
        undo.pop_all()
    return SplitDisk(folder, config.disk_cache_salted, copies)


def _core(
    config: EngineConfig,
    executor: Executor,
    tokenizer: Callable[[], Tokenizer],
    eos_ids: tuple[int, ...],
    max_model_len: int,
    gpu: bool,
    lower: LowerTiers | None = None,
) -> EngineCore:
    return EngineCore(
        config,
        executor,
        eos_ids,
        max_model_len,
        gpu=gpu,
        grammars=GrammarCompiler(tokenizer, executor.vocab_size, eos_ids),
        preferred=sampling_defaults(config, model_folder(config.model)),
        lower=lower,
    )
