"""The state that the routes of one server share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from ...config import ServerConfig
from ...tokenizer.tokenizer import Tokenizer
from ..fair_lock import FairLock
from ..heartbeat import HeartbeatMonitor
from .engine_client import EngineClient
from .plumbing.auth import Namespaces
from .plumbing.errors import ModelNotFound
from .plumbing.metrics import Metrics


@dataclass(slots=True)
class AppState:
    """``tokenizer`` raises `Overloaded` while the model is loading; ``preferred`` is set once the engine is ready."""

    config: ServerConfig
    client: EngineClient
    metrics: Metrics
    namespaces: Namespaces
    model_name: str
    heartbeat: HeartbeatMonitor | None = None
    _tokenizer: Tokenizer | None = None
    preferred: Mapping[str, float] = field(default_factory=dict)  # the model's `sampling_defaults`
    # Long texts are tokenized in a thread, one at a time: several would take the CPU that streams need.
    long_texts: FairLock = field(default_factory=FairLock)
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds

    @property
    def status(self) -> str:
        """The client's state; ``stalled`` for ``ready`` while a process of the engine does not answer."""
        stalled = self.heartbeat is not None and self.heartbeat.stalled is not None
        return "stalled" if stalled and self.client.state == "ready" else self.client.state

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self.client.unavailable()
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def check_model(self, name: str | None) -> None:
        """A request may leave the model out; another model's name is a 404."""
        if name is not None and name not in (self.model_name, self.config.engine.model):
            raise ModelNotFound(name, self.model_name)
