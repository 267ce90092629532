"""Everything the processes say to each other: msgspec tagged structs in msgpack, one batch a frame.

    http ──Generate, Abort──► tokenizer ──the same, with token ids──► scheduler
    scheduler ──StepOutput──► detokenizer ──Deltas──► http
    http ──BranchRun, BranchOp──► tokenizer ──the same, with token ids──► scheduler
    scheduler ──the same once more──► tokenizer    where a branch ends in text that has no tokens yet
    http ──Control──► scheduler ──ControlReply──► http
    detokenizer ──StopMatched, Settled──► scheduler   every child ──Ready──► http

Token ids travel as bytes (int32, little-endian), never as lists. Request ids are the server's own integers.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from .errors import InvalidRequest
from .sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


class Message(msgspec.Struct, tag=True, array_like=True, omit_defaults=True):
    """Base: the tag is the class name."""


# -- towards the scheduler ---------------------------------------------------------------------------------------------


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
    stream: bool = True  # False: only the whole answer is of use, so deltas may be few and large
    echo_tokens: bool = False  # return the prompt's token ids in the first delta
    add_special_tokens: bool = True  # to ``text``; a chat template has written its own
    # (position, seconds): prefixes to keep cached after the request. Characters of a text, else tokens; -1: its end
    breakpoints: list[tuple[int, float]] = []
    no_cache: bool = False  # shares nothing: its namespace is its own and is forgotten with it


class Abort(Message):
    """The client left. Idempotent; answered by a `Finished` with reason ``abort`` unless it finished before."""

    id: int


class StopMatched(Message):
    """detokenizer → scheduler: a stop string matched and the terminal delta is already on its way to the client."""

    id: int


class Settled(Message):
    """detokenizer → scheduler: what stays in the branch of a request's output, so that it ends where the text ends."""

    id: int
    kept: int  # output tokens
    rest: str = ""  # and text after them: what a stop string left of a token it cut


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
        return cls(error.path, error.problem, error.status, error.others, error.value, error.limit, error.code)

    def error(self) -> InvalidRequest:
        return InvalidRequest(
            self.path,
            self.problem,
            others=self.others,
            value=self.value,
            limit=self.limit,
            status=self.status,
            code=self.code,
        )


class Piece(msgspec.Struct, array_like=True, omit_defaults=True):
    """What is appended to a branch: text or token ids. The tokenizer puts the ids beside the text."""

    text: str | None = None
    tokens: bytes = b""  # int32
    parse_special: bool = False  # whether special tokens may be spelled out in the text
    add_opening: bool = True  # whether a text that begins its branch begins as the tokenizer begins texts (<bos>)
    before: str = ""  # text the branch ends in already, without tokens of its own; its tokens are in ``tokens``
    first: bytes | None = None  # int32: the ids where the text begins its branch; None: the same
    left: int = 0  # how many of ``tokens`` are of ``before`` alone, where the rest of them were given as ids

    @property
    def empty(self) -> bool:
        return not (self.text or self.tokens or self.before)


class BranchOp(Message):
    """http → tokenizer → scheduler: one step in the life of a branch. Answered by one `ControlReply` of the same id."""

    id: int
    what: Literal["create", "fork", "extend", "get", "delete"]
    namespace: tuple[str, str]  # the owner sees their own branches only; the salt is a new branch's
    branch: str = ""  # what it is about; of a new one: its parent
    piece: Piece | None = None
    n: int = 1  # branches to fork off
    ttl: float | None = None  # seconds
    tokens: bool = False  # get: the token ids too
    refusal: Refusal | None = None  # the tokenizer's
    again: bool = False  # sent back to be tokenized together with what the branch ends in


class BranchRun(Message):
    """http → tokenizer → scheduler: generate on a branch, or score ``continuations`` of it.

    One engine request generates; each continuation is one (``unconditional``: two, all those with the branch first).
    """

    ids: list[int]
    branch: str
    namespace: tuple[str, str]
    params: SamplingParams
    piece: Piece | None = None  # appended first
    continuations: list[Piece] | None = None
    unconditional: bool = False
    opening: bytes = b""  # int32: what an unconditional continuation follows
    priority: int = 0
    echo_tokens: bool = False
    stream: bool = True
    refusal: Refusal | None = None
    again: bool = False


ControlWhat = Literal[
    "flush_cache",
    "tree",
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
]


class Control(Message):
    """http → scheduler. Answered by one `ControlReply` with the same id."""

    id: int
    what: ControlWhat
    argument: Any = None


class Limits(Message):
    """http → tokenizer, once the scheduler is ready: what a prompt must fit into."""

    vocab_size: int  # token ids are 0 .. vocab_size - 1
    max_model_len: int  # tokens, prompt and completion together
    pool_tokens: int  # tokens the whole KV pool holds


class Shutdown(Message):
    """Finish what is in flight, then leave with exit code 0."""


# -- away from the scheduler -------------------------------------------------------------------------------------------


class CacheReport(msgspec.Struct, array_like=True):
    """What the tree did for one request."""

    hit_tokens: int
    reason: str  # hit | cold | diverged | evicted | namespace | disabled
    diverged_at: int | None = None  # token index, for ``diverged``
    refilled: int = 0  # tokens a branch had computed before and that are computed again, for they were evicted
    write_tokens: int = 0  # prompt tokens it computed and left in the cache
    pinned_tokens: int = 0  # known at the end: the longest prefix that its breakpoints keep


class RequestStarted(Message):
    """First word of the scheduler about a request: what the detokenizer needs. Precedes its first token."""

    id: int
    prompt_tokens: int
    tail: bytes  # the last few prompt tokens, to prime incremental decoding
    params: SamplingParams
    prompt: bytes | None = None  # the prompt's tokens, if ``echo_tokens`` or prompt logprobs were asked for
    stream: bool = True  # False: a delta for the first token, then few and large ones
    settle: bool = False  # of a branch: its end is followed by a `Settled`


class LogprobRows(Message):
    """`TokenLogprobs` of n tokens as bytes: float32 [n], int32 [n, k], float32 [n, k]."""

    k: int
    chosen: bytes
    top_ids: bytes
    top: bytes


class PromptLogprobs(Message):
    """Logprobs of prompt tokens from position ``start`` on; may come in several pieces, in order."""

    id: int
    start: int
    rows: LogprobRows


class Finished(Message):
    """The scheduler's one terminal message about a request."""

    id: int
    reason: FinishReason
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache: CacheReport | None = None
    matched: int | None = None  # the stop token id, for ``stop``
    error: Refusal | None = None
    retractions: int = 0
    jumped_tokens: int | None = None  # of the completion's, those a grammar left no choice about: passes saved
    queue_seconds: float = 0.0  # from arrival at the scheduler to the first scheduled chunk


class StepOutput(Message):
    """All that one step has to say, in the order it must be read: opened, tokens, finished.

    ``tokens[i]`` is ``ids[i]``'s; of one that its grammar forces to go on in one way, several may follow one another. A
    stop token that ends a request is included.
    """

    opened: list[RequestStarted] = []
    ids: bytes = b""  # int64 [n]
    tokens: bytes = b""  # int32 [n]
    logprobs: dict[int, LogprobRows] = {}  # request id -> n = 1; who asks for them gets one token a step
    prompt_logprobs: list[PromptLogprobs] = []
    cache: dict[int, CacheReport] = {}  # for each request whose first chunk was scheduled in this step
    queue_seconds: dict[int, float] = {}  # and how long each of them had waited for it
    finished: list[Finished] = []


class Delta(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """detokenizer → http: what is new about one request. ``finish`` is set exactly once, on the last one.

    There is one a token and stream, so most must cost nothing: no empty lists, and the collector does not look at them.
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
    items: list[Delta]


class Stats(Message):
    """scheduler → http, a few times a second while there is work and once when it ends. Counters are totals."""

    running: int = 0
    waiting: int = 0
    pages_total: int = 0
    pages_free: int = 0
    pages_cached: int = 0  # tree-owned and not leased: evictable
    page_size: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0  # prompt tokens that went through a forward pass
    generated_tokens: int = 0
    jumped_tokens: int = 0  # of them, those that took no forward pass of their own
    evicted_pages: int = 0
    retractions: int = 0
    finished: int = 0
    branches: int = 0
    branches_holding: int = 0  # those that keep pages from eviction
    branch_holds_lost: int = 0  # to memory pressure
    pins: int = 0
    pages_pinned: int = 0  # that pins keep from eviction


class ControlReply(Message):
    id: int
    ok: bool
    value: Any = None  # JSON-able
    error: Refusal | None = None


class Progress(Message):
    """How far a child's set-up has come, for the person who watches: ``done`` of ``total`` (bytes, of weights)."""

    role: str
    stage: str
    done: int
    total: int


class Ready(Message):
    """A child has set itself up. The scheduler's carries the model's limits and the memory plan."""

    role: Literal["tokenizer", "scheduler", "detokenizer"]
    info: dict[str, Any] = {}


class Failed(Message):
    """A child could not set itself up: one line for the person who started the server."""

    role: str
    error: str
