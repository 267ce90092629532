"""The engine's loop: a scheduler, an executor, and the steps in flight between them. No sockets, no text."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from ..config import DISK_WRITE_SECONDS, EngineConfig, step_budget
from ..errors import EngineDead, InvalidRequest
from ..grammar.compiler import GrammarCompiler
from ..messages import Control, ControlReply, Generate, Limits, Refusal, Stats, StepOutput
from ..scheduler.branches.service import BranchService
from ..scheduler.memory import LowerTiers
from ..scheduler.node_details import NodeQuestion, node_details
from ..scheduler.scheduled_step import ScheduledStep
from ..scheduler.scheduler import Scheduler
from ..scheduler.watch import WatchQuestion, watch
from ..step import Executor, PendingStep
from ..tiers.copies import HostCopies
from .profiling import StepProfiler

logger = logging.getLogger(__name__)

_COPY_SECONDS = 0.002  # between looks at copies while nothing else is to be done
_MAX_FAILURES = 3  # failed steps in a row after which the engine ends


class EngineCore:
    """Drives one scheduler and one executor. Not thread-safe: all calls must come from one thread.

    With overlap (the default on a GPU) a step is planned and launched while the one before it runs, and its results are
    read one step later; without overlap they are read at once. The data flow is the same: a sampled token whose value
    the host has not read yet is read from the device.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        eos_ids: tuple[int, ...],
        max_model_len: int,
        *,
        gpu: bool = False,
        grammars: GrammarCompiler | None = None,
        preferred: Mapping[str, float] | None = None,
        lower: LowerTiers | None = None,
    ) -> None:
        self.config = config
        self.preferred = dict(preferred or {})  # `sampling_defaults`, used where requests are made
        self.executor = executor
        limits = Limits(executor.vocab_size, max_model_len, executor.num_pages * executor.page_size)
        budget = step_budget(config, gpu=gpu)
        self.kv_token_bytes = 0  # for `stats`: set once the pool is allocated
        self.scheduler = Scheduler(
            config,
            limits,
            num_pages=executor.num_pages,
            max_rows=min(config.max_num_seqs, budget),
            max_batched_tokens=budget,
            eos_ids=eos_ids,
            grammars=grammars,
            lower=lower,
        )
        self._lower = lower
        self._grammars = grammars
        self.branches = BranchService(self.scheduler, config)
        self._depth = int(config.overlap if config.overlap is not None else gpu)
        self._inflight: deque[tuple[ScheduledStep, PendingStep]] = deque()
        self._failures = 0
        self._profiler = StepProfiler(Path(config.profile)) if config.profile else None
        self.advanced = False  # whether the last `step` launched or read anything; if not, the caller may wait

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_requests or bool(self._inflight)

    def add(self, message: Generate) -> None:
        self.scheduler.add(message)

    def abort(self, request_id: int) -> None:
        self.branches.abort(request_id)
        self.scheduler.abort(request_id)

    def stop_matched(self, request_id: int) -> None:
        """Ends a request whose output contains a stop string; the detokenizer has sent its client the end."""
        self.scheduler.abort(request_id, "stop")

    def step(self) -> StepOutput | None:
        """Plans, launches and reads steps; returns the new output, or None if there is none.

        A step that fails ends the requests it may have touched with an error, and the engine continues; after
        several failures in a row it raises. Raises `EngineDead` if the executor has ended.
        """
        self.sweep()
        try:
            self._advance()
        except EngineDead:
            raise
        except Exception as error:
            self._failures += 1
            logger.exception("a step failed")
            dropped = [scheduled for scheduled, _ in self._inflight]
            self._inflight.clear()
            self.scheduler.fail_running(f"the engine failed while computing: {type(error).__name__}", dropped)
            if self._failures >= _MAX_FAILURES:
                raise
        output = self.scheduler.take_output()
        if self.config.check_when_idle and not self.has_work:
            self.check()
        return output

    def sweep(self) -> float | None:
        """Ends branches and pins that have expired. Returns the seconds until the next may expire, if any."""
        self.scheduler.clock.tick()
        waits = (self.branches.registry.sweep(), self.scheduler.cache.pins.sweep())
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def idle(self) -> float | None:
        """Called while there is no work: `sweep`, and a piece of the preparation that the executor left for later.
        Returns the seconds after which to call it again, if any."""
        expires = self.sweep()
        self.scheduler.tiers.idle()
        self._pump_copies()
        if self.scheduler.tiers.busy:
            expires = _COPY_SECONDS
        if self.executor.prepare_next() or (self._grammars is not None and self._grammars.prepare()):
            return 0.0
        return expires

    def beat(self) -> None:
        """Returns once the executor's devices have answered, or at once while there is work: then a step's result shows
        it. Raises if one of them cannot answer."""
        if not self.has_work:
            self.executor.beat()

    def _advance(self) -> None:
        scheduled = self.scheduler.plan(self.scheduler.poll(), self.scheduler.tiers.poll())
        copies = self._start_stores()
        # Planning alone may end requests: those that need nothing but what is cached.
        self.advanced = scheduled is not None or bool(self._inflight) or bool(self.scheduler.output)
        if scheduled is not None:
            try:
                pending = self.executor.launch(scheduled.plan)
            finally:
                self._start_loads(copies)
            self._inflight.append((scheduled, pending))
            if len(scheduled.plan.constrained):  # the mask depends on the tokens of the step before
                while len(self._inflight) > 1:
                    self._complete()
                pending.sample(self.scheduler.masks(scheduled))
        else:
            self._start_loads(copies)
        if scheduled is None and not self._inflight:
            if not self.advanced and self.scheduler.has_requests and not self.scheduler.waits_outside:
                logger.error("no request can advance: %s", self.stats())
                self.scheduler.fail_one("the KV pool cannot hold this request beside what is pinned")
            return
        if len(self._inflight) > self._depth or scheduled is None:
            self._complete()

    def _start_stores(self) -> HostCopies | None:
        """Starts the copies to the host of the plan just made: the step may write to the pages that they read."""
        copies = self.scheduler.tiers.begin()
        if copies is not None and self._lower is not None:
            self._lower.host.store(copies)
        return copies

    def _start_loads(self, copies: HostCopies | None) -> None:
        """Starts the copies from the host: the step of the same plan may still copy from the pages that they write."""
        if copies is not None and self._lower is not None:
            self._lower.host.load(copies)

    def _pump_copies(self) -> None:
        """Without a step: applies copies that have ended, and starts others."""
        self.scheduler.tiers.apply(self.scheduler.tiers.poll())
        self._start_loads(self._start_stores())

    def _complete(self) -> None:
        oldest, pending = self._inflight[0]
        self.scheduler.complete(oldest, pending.result())
        self._inflight.popleft()
        self._failures = 0  # only here: device errors surface when results are read

    def control(self, message: Control) -> ControlReply:
        """Answers a control message. flush_cache: evict everything that no running request leases, pinned or not.
        tree: a dump. watch, node: see `scheduler.watch` and `scheduler.node_details`. branches: see
        `BranchService.counts`. info: see `info`. check: the invariants. start_profile, stop_profile: see
        `StepProfiler`. cache_*: see `CacheService.answer`."""
        try:
            return ControlReply(message.id, True, self._control(message))
        except InvalidRequest as error:
            return ControlReply(message.id, False, None, Refusal.of(error))
        except Exception as error:  # a failed control message must not stop the engine
            logger.exception("control %s failed", message.what)
            return ControlReply(message.id, False, None, Refusal(None, f"{type(error).__name__}: {error}", 500))

    def _control(self, message: Control) -> Any:
        if message.what == "flush_cache":
            self.branches.registry.forget()
            unpinned = self.scheduler.cache.pins.forget()
            return {"evicted_pages": self.scheduler.tree.flush(), "unpinned": unpinned}
        if message.what.startswith("cache_"):
            return self.scheduler.cache.answer(message.what, message.argument)
        if message.what == "branches":
            return self.branches.counts(message.argument)
        if message.what == "tree":
            options = message.argument or {}
            return self.scheduler.tree.dump(max_nodes=int(options.get("max_nodes", 1000)))
        if message.what == "watch":
            return watch(self.scheduler, msgspec.convert(message.argument, WatchQuestion))
        if message.what == "node":
            question = msgspec.convert(message.argument, NodeQuestion)
            return node_details(self.scheduler, self.branches.registry, question)
        if message.what == "info":
            return self.info()
        if message.what in ("start_profile", "stop_profile"):
            return self._profile(message.what == "start_profile")
        if message.what == "check":
            self.check()
            return "clean"
        raise RuntimeError(f"the engine has no answer to {message.what}")

    def _profile(self, start: bool) -> Any:
        if self._profiler is None:
            raise RuntimeError("the engine was started without --profile")
        steps = self.stats().steps
        return self._profiler.start(steps) if start else self._profiler.stop(steps)

    def info(self) -> dict[str, Any]:
        """The engine's settings and the limits that follow from them. JSON-able."""
        limits = self.scheduler.limits
        return {
            "vocab_size": limits.vocab_size,
            "max_model_len": limits.max_model_len,
            "pool_tokens": limits.pool_tokens,
            "num_pages": self.executor.num_pages,
            "page_size": self.executor.page_size,
            "max_running_requests": self.scheduler.ledger.rows.max_rows,
            "schedule_policy": self.config.schedule_policy,
            "eviction_policy": self.config.eviction_policy,
            "radix_cache": not self.config.disable_radix_cache,
            "overlap": bool(self._depth),
            "preferred_sampling_params": self.preferred or None,
        }

    def stats(self) -> Stats:
        stats, branches = self.scheduler.stats(), self.branches.registry
        stats.branches, stats.branches_holding = len(branches), branches.holding
        stats.branch_holds_lost = branches.holds_lost
        stats.kv_token_bytes = self.kv_token_bytes
        return stats

    def check(self) -> None:
        """Checks every invariant of rows, leases, branches, pins, tree and pages. Raises RuntimeError; of the tree and
        the pages `InvariantError`."""
        self.branches.check()
        self.scheduler.cache.pins.check()
        self.scheduler.ledger.check()

    def close(self) -> None:
        self._inflight.clear()
        if self._grammars is not None:
            self._grammars.close()
        self._write_everything()
        self.executor.close()
        if self._lower is not None and self._lower.disk is not None:
            self._lower.disk.close()

    def _write_everything(self) -> None:
        """Writes to the disk tier what it lacks."""
        tiers, deadline = self.scheduler.tiers, time.monotonic() + DISK_WRITE_SECONDS
        try:
            while tiers.write_everything():
                if time.monotonic() > deadline:
                    logger.warning("disk cache: not everything was written in %.0f s", DISK_WRITE_SECONDS)
                    break
                self._pump_copies()
                time.sleep(_COPY_SECONDS)
        except Exception:
            logger.exception("disk cache: the cache was not written")
