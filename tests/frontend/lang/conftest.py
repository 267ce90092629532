"""Backends for the language's tests: the shipped model in process, an engine without a model, and one that records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from branchwise import Engine
from branchwise.frontend.errors import BackendError
from branchwise.frontend.lang.backend import Capabilities, Completion, GenerationRequest, Piece, Usage
from branchwise.frontend.lang.backends import set_default_backend
from branchwise.frontend.lang.engine import EngineBackend
from branchwise.frontend.lang.openai import TextPrompt
from branchwise.runtime.config import EngineConfig
from branchwise.runtime.engine.core import EngineCore
from branchwise.runtime.executor.null import NullExecutor
from branchwise.runtime.models.folder import SHIPPED
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(SHIPPED)


@pytest.fixture(scope="session")
def shipped() -> Iterator[Engine]:
    """The model that ships, in this process, in float32 as the servers."""
    with Engine(kv_cache_tokens=32768, max_num_seqs=64, dtype="float32") as engine:
        yield engine
        engine.check()


@pytest.fixture
def engine(shipped: Engine) -> Iterator[EngineBackend]:
    """The default backend of the test: the shipped model, with nothing remembered."""
    shipped.flush_cache()
    backend = EngineBackend(shipped)
    set_default_backend(backend)
    yield backend
    set_default_backend(None)


@pytest.fixture
def null_engine(tokenizer: Tokenizer) -> Iterator[Engine]:
    """Everything but a model: tokens are a hash of their position."""
    config = EngineConfig(model=str(SHIPPED), max_num_seqs=512, max_num_batched_tokens=8192)
    core = EngineCore(config, NullExecutor(16384, 16, tokenizer.vocab_size), (), 4352)
    with Engine.from_core(core, tokenizer) as running:
        yield running
        running.check()


class Echo:
    """A backend that takes text, and whose model answers what a function of the prompt says. It keeps what it is asked.

    An answer that is an exception is raised.
    """

    def __init__(self, answer: Callable[[str], str | Exception], **capabilities: Any) -> None:
        self.name = "the echo"
        self.usage = Usage()
        self.capabilities = Capabilities(**{"score": False, **capabilities})
        self.answer = answer
        self.prompts: list[str] = []
        self.asked: list[GenerationRequest] = []

    async def codec(self) -> None:
        return None

    async def create(self) -> TextPrompt:
        return TextPrompt()

    async def fork(self, handle: TextPrompt, n: int) -> list[TextPrompt]:
        return [handle.fork() for _ in range(n)]

    async def extend(self, handle: TextPrompt, piece: Piece) -> None:
        handle.extend(piece)

    async def generate(self, handle: TextPrompt, request: GenerationRequest, on_delta: Any = None) -> list[Completion]:
        self.prompts.append(handle.text)
        self.asked.append(request)
        said = self.answer(handle.text)
        if isinstance(said, Exception):
            raise said
        meta = {"finish_reason": {"type": "stop", "matched": None}, "seed": request.params.seed}
        if request.params.max_tokens:
            handle.extend(said)
        if on_delta is not None:
            for letter in said:
                on_delta(letter)
        return [Completion(said, dict(meta)) for _ in range(request.params.n)]

    async def score(self, handle: TextPrompt, continuations: Sequence[Piece]) -> Any:
        raise BackendError("never asked")

    async def close(self, handle: TextPrompt) -> None:
        pass

    async def flush_cache(self) -> None:
        pass


@pytest.fixture
def echo() -> type[Echo]:
    return Echo
