"""A request in the scheduler: its tokens, limits, state and lease."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...radix.lease import Lease
from ..messages import CacheReport
from ..sampling_params import SamplingParams
from ..step import Int32

if TYPE_CHECKING:
    from ..grammar.matcher import Matcher


class Status(enum.Enum):
    """A request's state. Retraction leads from RUNNING back to WAITING; FINISHED is final."""

    COMPILING = enum.auto()  # its grammar is being compiled, or its next mask computed
    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class Request:
    """One sample of a prompt: its tokens (prompt, then outputs) and its state. Samples share the prompt's array.

    ``params.max_tokens`` is set and fits the limits; the prompt's ids are in the vocabulary (see `Scheduler.add`).
    While it runs, how far its KV reaches lives in `Rows`, indexed by ``row``; ``lease`` holds its pages.
    """

    __slots__ = (
        "arrival",
        "arrival_clock",
        "awaits",
        "breakpoints",
        "cache",
        "cached_logprobs",
        "deferred",
        "echo_from",
        "hit_estimate",
        "id",
        "jumped",
        "jumps",
        "lease",
        "limit",
        "matcher",
        "namespace",
        "no_cache",
        "num_tokens",
        "on_end",
        "opened",
        "params",
        "priority",
        "prompt_len",
        "prompt_logprob_done",
        "prompt_logprob_next",
        "queue_seconds",
        "remembered",
        "retractions",
        "row",
        "seed",
        "settle",
        "skips",
        "status",
        "stop_ids",
        "stream",
        "token_buffer",
    )

    def __init__(
        self,
        id: int,
        prompt: Int32,
        params: SamplingParams,
        *,
        namespace: tuple[str, str] = ("", ""),
        priority: int = 0,
        stream: bool = True,
        echo_from: int | None = None,
        breakpoints: Sequence[tuple[int, float]] = (),
        no_cache: bool = False,
        settle: bool = False,
        remembered: int = 0,
        on_end: Callable[[Request], None] | None = None,
    ) -> None:
        self.id: int = id
        self.params: SamplingParams = params  # of one sample
        self.namespace: tuple[str, str] = namespace
        self.priority: int = priority
        self.stream: bool = stream
        self.echo_from: int | None = echo_from  # first prompt token to return; None: the prompt is not returned
        self.breakpoints: Sequence[tuple[int, float]] = breakpoints  # (prompt tokens, seconds) to pin; empty once done
        self.no_cache: bool = no_cache  # its pages are freed when it ends
        self.settle: bool = settle  # of a branch: the detokenizer says where the returned text ended
        self.remembered: int = remembered  # prompt tokens whose KV its branch has computed before
        self.on_end: Callable[[Request], None] | None = on_end  # called once, after its terminal message
        self.seed: int = -1 if params.seed is None else params.seed  # -1: `Scheduler.submit` draws one
        self.stop_ids: frozenset[int] = frozenset(params.stop_token_ids)  # `Scheduler.submit` adds the model's own
        self.prompt_len: int = len(prompt)
        # Tokens at which it ends with reason ``length``.
        self.limit: int = len(prompt) + (params.max_tokens or 0)
        self.token_buffer: Int32 = prompt
        self.num_tokens: int = len(prompt)

        self.matcher: Matcher | None = None  # the state of its grammar, if its output is constrained
        # Tokens that the grammar forces need no decode step, unless logprobs or penalties need every token's logits.
        self.jumps: bool = params.logprobs is None and not params.penalized
        self.jumped: int = 0  # tokens appended without a decode step
        self.status = Status.WAITING
        self.arrival: float = (
            0.0  # seconds, on the scheduler's clock: for the queue time, and for the limit on compiling its grammar
        )
        self.arrival_clock: int = 0  # tokens scheduled by the engine before it arrived
        self.hit_estimate: int = 0  # tokens cached at the last lookup; orders the queue
        self.deferred: bool = False  # it has waited one step to copy from a page that was being written
        self.skips: int = 0  # times a later request was admitted because this one did not fit
        self.row: int = -1
        self.lease: Lease | None = None
        self.cache: CacheReport | None = None  # set at the first admission
        self.opened: bool = False
        self.retractions: int = 0
        self.queue_seconds: float = 0.0
        # First prompt positions whose logprobs are not scheduled, and not delivered. Position 0 has none.
        self.prompt_logprob_next: int = max(1, params.prompt_logprob_start)
        self.prompt_logprob_done: int = self.prompt_logprob_next
        self.cached_logprobs: int = 0  # of the prompt's, those that came from the tree
        self.awaits: Request | None = None  # it computes the logprob that this one needs next

    @property
    def tokens(self) -> Int32:
        """Known tokens, [num_tokens] (a view)."""
        return self.token_buffer[: self.num_tokens]

    @property
    def prompt(self) -> Int32:
        return self.token_buffer[: self.prompt_len]

    @property
    def num_outputs(self) -> int:
        return self.num_tokens - self.prompt_len

    @property
    def wants_prompt_logprobs(self) -> bool:
        return self.params.prompt_logprobs is not None and self.prompt_logprob_next < self.prompt_len

    @property
    def keeps_scores(self) -> bool:
        """Whether the tree remembers its prompt logprobs: with at most one alternative."""
        return self.params.prompt_logprobs is not None and self.params.prompt_logprobs <= 1

    @property
    def shares_scores(self) -> bool:
        """Whether it lacks prompt logprobs that the tree may remember."""
        return self.keeps_scores and self.wants_prompt_logprobs

    @property
    def reuse_limit(self) -> int:
        """Tokens that may come from the cache. Every position whose logits are needed must be computed: the last one to
        sample from, and those of prompt logprobs."""
        limit = self.num_tokens if self.limit == self.prompt_len else self.num_tokens - 1
        if self.wants_prompt_logprobs:
            limit = min(limit, self.prompt_logprob_next - 1)
        return limit

    def append(self, token: int) -> None:
        if self.num_tokens == len(self.token_buffer):
            # Not in place: slices of the old buffer may be in a plan, and the prompt may be a message's memory.
            grown = np.empty(min(self.limit, self.num_tokens + max(64, self.num_tokens // 2)), dtype=np.int32)
            grown[: self.num_tokens] = self.token_buffer
            self.token_buffer = grown
        self.token_buffer[self.num_tokens] = token
        self.num_tokens += 1
