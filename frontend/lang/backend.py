"""Who computes: the one protocol between the language and an engine, a server, or anybody else's server.

A handle is one branch of a prompt as the backend keeps it. What goes into it are pieces: token ids where the backend
takes and gives them (``codec`` is set), else text, else whole messages (a server that only chats).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Union

from ...runtime.sampling_params import SamplingParams
from .codec import TAIL, Codec, Run
from .errors import BackendError

Piece = Union[list[int], str, "Message"]
OnDelta = Callable[[str], None]


@dataclass(frozen=True)
class Message:
    role: str
    content: str


@dataclass(frozen=True)
class Capabilities:
    """``constraints``: those it knows; None: it says no itself. ``prefill``: it can read a prompt and stop."""

    branches: bool = False
    constraints: frozenset[str] | None = frozenset()
    score: bool = True
    prefill: bool = False


@dataclass
class Usage:
    """What a backend has been asked since it was opened.

    ``sent_tokens``: those that travelled (of text, a quarter of its characters). ``computed_tokens``: prompt tokens
    that were not in the cache."""

    requests: int = 0
    prompt_tokens: int = 0
    sent_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    bytes_sent: int = 0

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens

    def count(self, prompt: int, cached: int, completion: int) -> None:
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completion

    def since(self, before: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) - getattr(before, name) for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class GenerationRequest:
    """One generation. ``options``: what the program says of it, in `SamplingParams`' names; the rest is for the backend
    to choose. ``tools``: where messages are sent; elsewhere the chat template has written them."""

    options: Mapping[str, Any]
    constraint: Mapping[str, str] = field(default_factory=dict)
    text_in_logprobs: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def params(self) -> SamplingParams:
        """With `SamplingParams`' own values for what is unsaid: for counts, not for how tokens are drawn."""
        return SamplingParams(**self.options)

    def sample(self, i: int) -> GenerationRequest:
        """Sample ``i`` of ``n`` by itself."""
        one = self.params.sample(i)
        return replace(self, options={**self.options, "n": one.n, "seed": one.seed})


@dataclass
class Completion:
    """One sample. ``meta`` is SGLang's ``meta_info``; ``settled``: the text of the handle after it, token-exact."""

    text: str
    meta: dict[str, Any]
    ids: list[int] | None = None  # the tokens that stay in the state: they read ``text``


class Backend(Protocol):
    """Every method may raise `BackendError`. A handle is used by one task at a time; its ``length`` is that of its
    prompt, in tokens, characters or messages."""

    name: str  # what errors call it
    capabilities: Capabilities
    usage: Usage

    async def codec(self) -> Codec | None:
        """The model's tokenizer; None: this backend takes and gives text."""
        ...

    async def create(self) -> Any:
        """A handle of the empty prompt."""
        ...

    async def fork(self, handle: Any, n: int) -> list[Any]: ...

    async def extend(self, handle: Any, piece: Piece) -> None: ...

    async def generate(self, handle: Any, ask: GenerationRequest, on_delta: OnDelta | None = None) -> list[Completion]:
        """``ask.params.n`` samples; the first one's text stays in the handle. ``on_delta`` gets it as it comes."""
        ...

    async def score(self, handle: Any, continuations: Sequence[Piece]) -> list[list[tuple[int | str, float]]]:
        """Each continuation's tokens with their logprobs, after the handle's prompt, which stays as it is.

        For text, the first token is the one that holds the continuation's first character.
        """
        ...

    async def close(self, handle: Any) -> None:
        """Idempotent."""
        ...

    async def flush_cache(self) -> None: ...


class SharedTokens:
    """A prompt that only grows, and is shared when it forks: a child begins with its parent's pieces, not copies."""

    __slots__ = ("_parent", "_pieces", "length")
    length: int  # of all pieces together

    def __init__(self, parent: SharedTokens | None = None) -> None:
        self._parent = parent
        self._pieces: list[Any] = []
        self.length = 0 if parent is None else parent.length

    def extend(self, items: Sequence[Any]) -> None:
        if items:
            self._pieces.append(items)
            self.length += len(items)

    def fork(self) -> SharedTokens:
        """A child. Both see what is here now; neither sees what the other adds."""
        if self._pieces:
            below = SharedTokens(self._parent)
            below._pieces, below.length = self._pieces, self.length
            self._parent, self._pieces = below, []
        return SharedTokens(self._parent)

    def pieces(self) -> list[Any]:
        chain = [self]
        while (parent := chain[-1]._parent) is not None:
            chain.append(parent)
        return [piece for rope in reversed(chain) for piece in rope._pieces]

    def tokens(self) -> list[Any]:
        return [item for piece in self.pieces() for item in piece]

    def text(self) -> str:
        return "".join(self.pieces())

    def tail(self) -> list[Any]:
        """The last few tokens."""
        found: list[Any] = []
        rope: SharedTokens | None = self
        while rope is not None and len(found) < TAIL:
            for piece in reversed(rope._pieces):
                found[:0] = piece[-TAIL:]
                if len(found) >= TAIL:
                    break
            rope = rope._parent
        return found[-TAIL:]


def settle(codec: Codec, tail: Sequence[int], ids: list[int], text: str, finish: Mapping[str, Any]) -> list[int]:
    """The tokens of an answer that stay in a state: without the stop token, cut where a stop string cut the text."""
    if finish.get("type") != "stop":
        return ids
    matched = finish.get("matched")
    if isinstance(matched, int):
        return ids[:-1] if ids and ids[-1] == matched else ids
    if not isinstance(matched, str):
        return ids
    whole, rest = codec.kept(ids, text, tail)
    return whole + codec.encode([Run(rest)])


def check_constraint(backend: Backend, constraint: Mapping[str, str]) -> None:
    """Raises `BackendError` naming the backend and what it cannot do."""
    known = backend.capabilities.constraints
    if known is not None:
        for kind in constraint:
            if kind not in known:
                raise BackendError(f"{backend.name} cannot constrain decoding by {kind}")


def check_score(backend: Backend) -> None:
    if not backend.capabilities.score:
        raise BackendError(f"{backend.name} cannot score given text: select and choices need logprobs of the prompt")
