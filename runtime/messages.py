"""The messages between the processes of a server: msgspec tagged structs in msgpack, one list of them a frame.

    http ──Generate, Abort──► tokenizer ──the same, with token ids──► scheduler
    scheduler ──StepOutput──► detokenizer ──Deltas──► http
    http ──BranchRun, BranchOp──► tokenizer ──the same, with token ids──► scheduler
    scheduler ──the same again──► tokenizer        if the branch ends in text that has no tokens yet
    http ──Control──► scheduler ──ControlReply──► http
    http ──Heartbeat──► tokenizer ──► scheduler ──► detokenizer   each ──the same──► http
    detokenizer ──StopMatched, Settled──► scheduler   every child ──Ready──► http

Token ids are sent as bytes (int32, little-endian), never as lists. Request ids are integers that the server gives.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .errors import InvalidRequest
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True):
    """Base of the tagged messages; the tag is the class name."""


# -- to the scheduler --------------------------------------------------------------------------------------------------


class Generate(Message):
    """http → tokenizer → scheduler (and into `EngineCore.add`): one prompt, sampled ``len(ids)`` times.

    Sample i is engine request ``ids[i]`` with seed ``params.seed + i``. The prompt is ``text`` or ``tokens``; the
    tokenizer replaces the text by its tokens, and character positions in ``breakpoints`` by token positions.
    """

    ids: list[int]
    params: SamplingParams
    text: str | None = None
    tokens: bytes = b""  # int32
    namespace: tuple[str, str] = ("", "")  # (owner, salt): owner from the API key, salt from the request
    priority: int = 0  # larger is more urgent
    stream: bool = True  # False: the client reads the whole answer at once, so deltas may be few and large
    echo_tokens: bool = False  # return the prompt's token ids in the first delta
    add_special_tokens: bool = True  # to ``text``; a chat template has written its own
    # (position, seconds): prefixes to keep cached after the request. Characters of a text, else tokens; -1: its end
    breakpoints: list[tuple[int, float]] = []
    shorten: bool = False  # lower max_tokens to what the context leaves, instead of refusing
    no_cache: bool = False  # its namespace is its own, and its pages are freed when it ends
    more: int = 0  # prompts of the same HTTP request that follow at once: all are tokenized before one is forwarded


class Abort(Message):
    """http → tokenizer → scheduler: end a request. If it has not finished, its `Finished` has reason ``abort``."""

    id: int


class StopMatched(Message):
    """detokenizer → scheduler: a stop string matched. The client's terminal delta has been sent already."""

    id: int


class Settled(Message):
    """detokenizer → scheduler: how much of a request's output its branch keeps, so that it ends where the text ends."""

    id: int
    kept: int  # output tokens
    rest: str = ""  # text after them: the part of a token before a stop string


class Refusal(msgspec.Struct, array_like=True, omit_defaults=True):
    """Why a request cannot be served: an `InvalidRequest` between processes. Status 500: the engine's own failure."""

    path: str | None
    problem: str
    status: int = 400
    others: tuple[str, ...] = ()
    value: Any = None
    limit: Any = None
    code: str | None = None

    @classmethod
    def of(cls, error: InvalidRequest) -> Refusal:
        """The message form of ``error``."""
        return cls(error.path, error.problem, error.status, error.others, error.value, error.limit, error.code)

    def error(self) -> InvalidRequest:
        """The error that this message carries."""
        return InvalidRequest(**msgspec.structs.asdict(self))


class Piece(msgspec.Struct, array_like=True, omit_defaults=True):
    """Text or token ids to append to a branch. The tokenizer adds the token ids of a text."""

    text: str | None = None
    tokens: bytes = b""  # int32
    parse_special: bool = False  # whether special tokens may be spelled out in the text
    add_opening: bool = True  # add the tokenizer's opening (<bos>) if the text begins its branch
    before: str = ""  # text at the branch's end that has no tokens yet; its tokens are included in ``tokens``
    first: bytes | None = None  # int32: the ids to use if the text begins its branch; None: ``tokens``
    left: int = 0  # how many of ``tokens`` belong to ``before`` alone

    @property
    def empty(self) -> bool:
        """Whether there is nothing to append."""
        return not (self.text or self.tokens or self.before)


class BranchOp(Message):
    """http → tokenizer → scheduler: create, change, read or delete a branch. Answered by a `ControlReply` of its id."""

    id: int
    what: Literal["create", "fork", "extend", "get", "delete"]
    namespace: tuple[str, str]  # (owner, salt): an owner sees its own branches only; the salt is for create
    branch: str = ""  # id; for create: of its parent
    piece: Piece | None = None
    n: int = 1  # fork: how many branches
    ttl: float | None = None  # seconds
    tokens: bool = False  # get: return the token ids too
    refusal: Refusal | None = None  # set by the tokenizer if it cannot tokenize the piece
    again: bool = False  # the scheduler has sent it back, to be tokenized together with the branch's last text


class BranchRun(Message):
    """http → tokenizer → scheduler: generate on a branch, or score ``continuations`` of it.

    ``ids`` are engine requests: one a sample, or one a continuation. ``unconditional``: two a continuation, first all
    that follow the branch, then all without it.
    """

    ids: list[int]
    branch: str
    namespace: tuple[str, str]
    params: SamplingParams
    piece: Piece | None = None  # appended first
    continuations: list[Piece] | None = None
    unconditional: bool = False
    opening: bytes = b""  # int32: the tokenizer's opening, which unconditional continuations follow
    priority: int = 0
    echo_tokens: bool = False
    stream: bool = True
    refusal: Refusal | None = None
    again: bool = False


ControlWhat = Literal[
    "flush_cache",
    "tree",
    "watch",
    "node",
    "info",
    "check",
    "branches",
    "start_profile",
    "stop_profile",
    "cache_stats",
    "cache_explain",
    "cache_pin",
    "cache_unpin",
    "cache_evict",
    "cache_hottest",
    "cache_disk_list",
    "cache_disk_prune",
    "cache_disk_verify",
    "cache_disk_save",
    "cache_disk_load",
    "cache_disk_job",  # whether one of the last three is done, and what came of it
    "kv_events",
]


class Control(Message):
    """http → scheduler. Answered by one `ControlReply` with the same id."""

    id: int
    what: ControlWhat
    argument: Any = None


class Limits(Message):
    """http → tokenizer, once the scheduler is ready: the limits of a prompt."""

    vocab_size: int  # token ids are 0 .. vocab_size - 1
    max_model_len: int  # tokens, prompt and completion together
    pool_tokens: int  # tokens the whole KV pool holds


class Heartbeat(Message):
    """http → tokenizer → scheduler → detokenizer. Each also reports to http that the heartbeat has ``passed`` it."""

    number: int
    passed: Literal["tokenizer", "scheduler", "detokenizer"] | None = None


class Shutdown(Message):
    """http → tokenizer → scheduler → detokenizer: finish what is in flight, then exit with code 0."""


# -- from the scheduler ------------------------------------------------------------------------------------------------


class CacheReport(msgspec.Struct, array_like=True):
    """Cache reuse of one request."""

    hit_tokens: int
    reason: str  # `radix.explain.Reason`
    diverged_at: int | None = None  # token index, for ``diverged``
    refilled: int = 0  # tokens of its branch that were evicted and are computed again
    write_tokens: int = 0  # prompt tokens that it computed and left in the cache
    host_tokens: int = 0  # of hit_tokens, those that came from the host's memory
    disk_tokens: int = 0  # and from the disk
    tier_reason: str = ""  # why more of the lower tiers' prefix was not used: late | failed | full | slower
    pinned_tokens: int = 0  # the longest prefix that its breakpoints pin; known at the end
    cached_logprobs: int = 0  # of the prompt's logprobs, those from the cache

    def tiers(self) -> dict[str, Any]:
        """Where the reused tokens came from, and why not more came from lower memory tiers, as fields of an answer;
        empty if no lower tier took part."""
        if not (self.host_tokens or self.disk_tokens or self.tier_reason):
            return {}
        device = self.hit_tokens - self.host_tokens - self.disk_tokens
        facts: dict[str, Any] = {"device": device, "host": self.host_tokens, "disk": self.disk_tokens}
        if self.tier_reason:
            facts["not_more"] = self.tier_reason
        return {"tiers": facts}


class RequestStarted(Message):
    """The scheduler's first message about a request: the detokenizer's initial state. Precedes its first token."""

    id: int
    prompt_tokens: int
    tail: bytes  # the last few prompt tokens, to prime incremental decoding
    params: SamplingParams
    prompt: bytes | None = None  # int32: the prompt, if the request needs it or prompt logprobs
    stream: bool = True  # False: a delta for the first token, then few and large ones
    settle: bool = False  # its branch keeps its output: the detokenizer sends `Settled` at its end


class LogprobRows(Message):
    """`TokenLogprobs` of n tokens as bytes: float32 [n], int32 [n], int32 [n, k], float32 [n, k]."""

    k: int
    chosen: bytes
    ranks: bytes
    top_ids: bytes
    top: bytes


class PromptLogprobs(Message):
    """Logprobs of prompt tokens from position ``start`` on. A request may have several of them, in order."""

    id: int
    start: int
    rows: LogprobRows


class Finished(Message):
    """The scheduler's last message about a request; there is exactly one."""

    id: int
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache: CacheReport | None = None
    matched: int | None = None  # the stop token id, for ``stop``
    error: Refusal | None = None
    retractions: int = 0
    jumped_tokens: int | None = None  # completion tokens that a grammar forced: no forward pass each
    queue_seconds: float = 0.0  # from arrival at the scheduler to the first scheduled chunk


class StepOutput(Message):
    """The results of one step, or a part of them, to be read in this order: started, tokens, finished.

    ``tokens[i]`` belongs to request ``ids[i]``. A request has several in a row if its grammar forces them. A stop token
    that ends a request is included.
    """

    started: list[RequestStarted] = []
    ids: bytes = b""  # int64 [n]
    tokens: bytes = b""  # int32 [n]
    logprobs: dict[int, LogprobRows] = {}  # by request id, n = 1: such requests get one token a step
    prompt_logprobs: list[PromptLogprobs] = []
    cache: dict[int, CacheReport] = {}  # by request id: those whose first chunk was scheduled
    queue_seconds: dict[int, float] = {}  # by request id: the same, how long it waited
    finished: list[Finished] = []

    def __bool__(self) -> bool:
        """Whether there is anything in it."""
        return bool(self.started or self.ids or self.finished or self.cache or self.prompt_logprobs)


class Delta(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """detokenizer → http: the new output of one request. ``finish`` is set exactly once, on the last delta.

    A stream has one delta a token, so they must be cheap: no empty lists, and not tracked by the garbage collector.
    """

    id: int
    text: str = ""
    tokens: bytes = b""  # int32
    logprobs: list[LogprobRows] | None = None  # one a token
    prompt: bytes | None = None
    prompt_logprobs: list[PromptLogprobs] | None = None
    prompt_tokens: int = 0
    cache: CacheReport | None = None
    finish: Finished | None = None
    matched_stop: str | None = None  # the stop string, when one matched
    settled: Settled | None = None  # with ``finish``, of a request on a branch


class Deltas(Message):
    """detokenizer → http: the deltas of one batch of step outputs."""

    items: list[Delta]


class Stats(Message):
    """scheduler → http, a few times a second while there is work and once when it ends. Counters are totals."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # evictable: in the tree and not leased
    page_size: int = 0
    kv_token_bytes: int = 0  # keys and values of one token in every layer, on one rank; 0 without a model
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0  # prompt tokens that went through a forward pass
    generated_tokens: int = 0
    jumped_tokens: int = 0  # of them, without a forward pass of their own
    kv_bytes: int = 0  # that attention would have read, had each request read its own
    kv_bytes_saved: int = 0  # of them, by reading shared prefixes once
    evicted_pages: int = 0
    retractions: int = 0
    finished: int = 0
    branches: int = 0
    branches_holding: int = 0  # branches that keep pages from eviction
    branch_holds_lost: int = 0  # holds given up under memory pressure
    host_pages_total: int = 0
    host_pages_cached: int = 0
    disk_pages_total: int = 0
    disk_pages_cached: int = 0
    host_tokens: int = 0  # of cached_tokens, those that came from the host
    disk_tokens: int = 0  # and from the disk
    tier_failures: int = 0  # copies between tiers that did not arrive whole
    tier_late: int = 0  # waits for a copy that were given up
    pins: int = 0
    pages_pinned: int = 0


class ControlReply(Message):
    """scheduler → http: the answer to a `Control` or a `BranchOp`."""

    id: int
    ok: bool
    value: Any = None  # JSON-able
    error: Refusal | None = None


class Progress(Message):
    """child → http: progress of loading, ``done`` of ``total`` bytes, for display."""

    role: str
    stage: str
    done: int
    total: int


class Ready(Message):
    """child → http: it is ready. The scheduler's ``info`` has the model's limits and the memory plan."""

    role: Literal["tokenizer", "scheduler", "detokenizer"]
    info: dict[str, Any] = {}


class Failed(Message):
    """child → http: it cannot start; ``error`` is one line for the person who started the server."""

    role: str
    error: str
