"""The protocol between the language and a backend: an engine in this process, a Branchwise server, or any other.

A handle is one branch's prompt as the backend keeps it. It is extended by pieces: token ids if the backend takes and
returns tokens (`Backend.codec` is not None), otherwise text, or whole turns for a server that only chats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Protocol, Union

from ...runtime.sampling_params import SamplingParams
from ..client import Traffic
from ..errors import BackendError
from .codec import Codec

Piece = Union[list[int], str, "Turn"]
OnDelta = Callable[[str], None]  # called with each piece of text as it is generated
TokenScores = list[tuple[int | str, float]]  # tokens (their ids, or their text) with their logprobs


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation, for a server that only chats."""

    role: str
    content: str


@dataclass(frozen=True)
class Capabilities:
    """``constraints``: the kinds it can enforce; None: it checks them itself. ``prefill``: it can compute a prompt
    without generating. ``branches``: it keeps prompts, so its handles must be closed."""

    branches: bool = False
    constraints: frozenset[str] | None = frozenset()
    score: bool = True
    prefill: bool = False


@dataclass
class Usage(Traffic):
    """Totals since the backend was opened.

    ``sent_tokens``: prompt tokens transferred; of text, a quarter of its characters.
    """

    prompt_tokens: int = 0
    sent_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that were not in the cache."""
        return self.prompt_tokens - self.cached_tokens

    def count(self, prompt: int, cached: int, completion: int) -> None:
        self.prompt_tokens += prompt
        self.cached_tokens += cached
        self.completion_tokens += completion

    def since(self, before: Usage) -> Usage:
        return Usage(**{one.name: getattr(self, one.name) - getattr(before, one.name) for one in fields(self)})


@dataclass(frozen=True)
class GenerationRequest:
    """One generation. ``options``: what the program sets, in `SamplingParams`' names; the backend chooses the rest.
    ``tools``: for a server of chat messages; elsewhere the chat template has written them into the prompt."""

    options: Mapping[str, Any]
    constraint: Mapping[str, str] = field(default_factory=dict)
    text_in_logprobs: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

    @cached_property
    def params(self) -> SamplingParams:
        """The options over `SamplingParams`' own defaults, which are not the model's."""
        return SamplingParams(**self.options)

    def sample(self, i: int) -> GenerationRequest:
        """Sample ``i`` of ``n`` as a request of its own."""
        one = self.params.sample(i)
        return replace(self, options={**self.options, "n": one.n, "seed": one.seed})


@dataclass
class Completion:
    """One sample. ``meta`` has the form of SGLang's ``meta_info``. ``ids``: the tokens of ``text``, None for text
    backends."""

    text: str
    meta: dict[str, Any]
    ids: list[int] | None = None


class Backend(Protocol):
    """Any method may raise `BackendError`. One task at a time uses a handle. A handle's ``length`` is that of its
    prompt: in tokens, characters or turns."""

    name: str  # in error messages
    capabilities: Capabilities
    usage: Usage

    async def codec(self) -> Codec | None:
        """The model's tokenizer; None: this backend takes and returns text."""
        ...

    async def create(self) -> Any:
        """A handle of the empty prompt."""
        ...

    async def fork(self, handle: Any, n: int) -> list[Any]: ...

    async def extend(self, handle: Any, piece: Piece) -> None: ...

    async def generate(
        self, handle: Any, request: GenerationRequest, on_delta: OnDelta | None = None
    ) -> list[Completion]:
        """``request.params.n`` samples; the first is appended to the handle's prompt and passed to ``on_delta``."""
        ...

    async def score(self, handle: Any, continuations: Sequence[Piece]) -> list[TokenScores]:
        """The scores of each continuation's tokens after the handle's prompt, which stays as it is.

        For text, the first token is the one that contains the continuation's first character.
        """
        ...

    async def close(self, handle: Any) -> None:
        """Idempotent."""
        ...

    async def flush_cache(self) -> None: ...


def check_constraint(backend: Backend, constraint: Mapping[str, str]) -> None:
    """Raises `BackendError` naming the backend and the kind of constraint it cannot enforce."""
    known = backend.capabilities.constraints
    if known is not None:
        for kind in constraint:
            if kind not in known:
                raise BackendError(f"{backend.name} cannot constrain decoding by {kind}")


def check_score(backend: Backend) -> None:
    """Raises `BackendError` if the backend cannot score given text."""
    if not backend.capabilities.score:
        raise BackendError(f"{backend.name} cannot score given text: select and choices need logprobs of the prompt")
