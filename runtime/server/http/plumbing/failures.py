"""The ways in which routes fail, for the OpenAPI document: each with bodies that a server has sent."""

from __future__ import annotations

from typing import NamedTuple


class Example(NamedTuple):
    """A body: its name in the document, and its fields."""

    name: str
    message: str
    param: str | None = None
    code: str | None = None


class Failure:
    """One way to fail. ``name``: of the response component."""

    def __init__(self, name: str, status: int, about: str, *examples: Example) -> None:
        self.name, self.status, self.about, self.examples = name, status, about, examples


INVALID = Failure(
    "Invalid",
    400,
    "The request cannot be served as sent. `param` names the field, `message` the limit.",
    Example(
        "a value out of range", "temperature must be at least 0.0 and at most 100.0, got -1.0", param="temperature"
    ),
    Example(
        "too long",
        "max_tokens 5000 + prompt 1 = 5001 tokens, more than the 4352 tokens of the model's context; lower "
        "it or raise --max-model-len",
        param="max_tokens",
    ),
    Example("known, and not built", "suffix is not supported by this server", param="suffix"),
    Example("no body", "the body is empty: it must be a JSON object"),
)
NO_KEY = Failure(
    "NoKey",
    401,
    "The server needs a key, and the request has none that it knows.",
    Example("no key", "a valid API key is needed: send Authorization: Bearer KEY or x-api-key: KEY"),
)
NOT_ADMIN = Failure(
    "NotAdmin",
    403,
    "The route acts on what all keys share, and the key is not the operator's.",
    Example("not the operator", "this route needs the admin key (--admin-api-key)"),
)
NO_MODEL = Failure(
    "NoModel",
    404,
    "The request names another model. It may leave the model out.",
    Example(
        "another model",
        "model 'gpt-4o' does not exist; this server serves 'branchwise'",
        param="model",
        code="model_not_found",
    ),
)
NO_BRANCH = Failure(
    "NoBranch",
    404,
    "No branch of this key has the id.",
    Example("never was", "branch bnobody does not exist", param="branch"),
)
NO_NODE = Failure(
    "NoNode",
    404,
    "The path leads to no node of the caller's tree.",
    Example("no node", "path leads to no node of the tree: it has grown or was evicted", param="path"),
)
NO_PIN = Failure(
    "NoPin",
    404,
    "No pin of this key has the id.",
    Example("no pin", "id pin-nobody is not a pin: it has expired or never existed", param="id"),
)
BRANCH_BUSY = Failure(
    "BranchBusy",
    409,
    "The branch is generating. It can be read, deleted, and waited for.",
    Example(
        "generating",
        "branch bsBRnzyioPmx9Gzbmy30adIiDejaqpvV9 is generating: wait for its answer, fork it before it "
        "generates, or delete it",
        param="branch",
    ),
)
NOT_CACHED = Failure(
    "NotCached",
    409,
    "Nothing of the prompt is in the cache.",
    Example(
        "nothing to pin",
        "none of these 17 tokens is cached, so there is nothing to pin (warm: true computes them)",
        code="not_cached",
    ),
)
RECORDING = Failure(
    "Recording", 409, "A recording is under way, or none is.", Example("nothing to stop", "no recording is under way")
)
BRANCH_GONE = Failure(
    "BranchGone",
    410,
    "The branch has ended: create it again.",
    Example("gone", "branch bsBRnzyioPmx9Gzbmy30adIiDejaqpvV9 has expired or was deleted", param="branch"),
)
TOO_LARGE = Failure(
    "TooLarge",
    413,
    "The body has more bytes than `--max-body-bytes`.",
    Example("too large", "the request body must be at most 16777216 bytes"),
)
COMPRESSED = Failure(
    "Compressed",
    415,
    "The body is compressed.",
    Example("compressed", "Content-Encoding gzip is not supported: send the body as it is"),
)
TOO_MANY_BRANCHES = Failure(
    "TooManyBranches",
    429,
    "As many branches exist as `--max-branches` allows, or as many of the key as `--max-branches-per-key` allows.",
    Example(
        "too many branches",
        "there are 4096 branches, and 1 more would exceed the limit of 4096 (--max-branches); delete some, "
        "or try again when others have expired",
    ),
)
KEY_QUEUE = Failure(
    "KeyQueue",
    429,
    "The key has as many unfinished requests as `--max-queued-per-key` allows.",
    Example(
        "its share of the queue",
        "this key has 2 unfinished requests and 2 more would pass its limit of 3 (--max-queued-per-key); try "
        "again later",
        code="rate_limit_exceeded",
    ),
)
PIN_QUOTA = Failure(
    "PinQuota",
    429,
    "Pins and breakpoints may hold a bounded share of the cache.",
    Example(
        "no room for a pin",
        "16 more tokens to pin, and there is room for 0 of the 131072 one key may pin (--max-pinned-share, "
        "--pinned-share-per-key); unpin some, or try again when others have expired",
        code="pin_quota",
    ),
)
ENGINE_FAILED = Failure(
    "EngineFailed",
    500,
    "Not the request's fault. With `engine_dead` the server is going down.",
    Example("a process has died", "the engine has stopped; the server is going down", code="engine_dead"),
)
UNAVAILABLE = Failure(
    "Unavailable",
    503,
    "The server is loading, shutting down, or full (`--max-queued-requests`, `--max-total-body-bytes`).",
    Example("loading", "the model is still loading"),
    Example("full", "4096 requests are queued and 1 more would pass the limit of 4096; try again later"),
    Example("shutting down", "the server is shutting down"),
)
TIMED_OUT = Failure(
    "TimedOut",
    504,
    "The request took longer than `--request-timeout`; in a stream this is the last event.",
    Example(
        "out of time",
        "the request did not finish within the 60 s it may take (--request-timeout)",
        code="request_timeout",
    ),
)
