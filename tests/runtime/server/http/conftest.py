"""An application whose engine is a list of what was sent to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig
from branchwise.runtime.messages import Limits, Message
from branchwise.runtime.server.http.engine_client import EngineClient
from branchwise.runtime.server.http.plumbing.auth import Namespaces
from branchwise.runtime.server.http.plumbing.metrics import Metrics
from branchwise.runtime.server.http.state import AppState
from branchwise.runtime.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    checkpoints.write_tokenizer(folder)
    return Tokenizer.load(Path(folder))


@pytest.fixture
def sent() -> list[Message]:
    """What the client has sent to the tokenizer and the scheduler, in order."""
    return []


@pytest.fixture
def client(sent: list[Message]) -> EngineClient:
    client = EngineClient(sent.extend, sent.extend, max_requests=8, metrics=Metrics())
    client.ready(Limits(vocab_size=400, max_model_len=512, pool_tokens=1024))
    sent.clear()
    return client


@pytest.fixture
def make_state(client: EngineClient, tokenizer: Tokenizer) -> Callable[..., AppState]:
    def make(**settings: Any) -> AppState:
        config = ServerConfig(engine=EngineConfig(), **settings)
        state = AppState(config, client, Metrics(), Namespaces(config.api_key), "model")
        state.tokenizer = tokenizer
        return state

    return make
