"""The prompts that a request would send to the engine, computed without one: for routers, in every dialect."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np

from ..config import ServerConfig
from ..messages import BranchOp, BranchRun, Control, Generate, Limits, Message
from ..models.folder import model_folder
from ..step import Int32
from ..tokenizer.tokenizer import Tokenizer
from .http.app import make_app
from .http.engine_client import EngineClient
from .http.plumbing.auth import Namespaces
from .http.plumbing.metrics import Metrics
from .http.state import AppState
from .startup import model_name

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]

_INLINE = 32_768  # characters that are tokenized on the event loop
_ANY = 2**31 - 1  # a limit that the replica checks


class RequestPrompts(NamedTuple):
    """``prompts``: those that a request would compute, each with its namespace (owner, salt) and tokens. ``id``: of the
    branch or pin that the request names."""

    prompts: list[tuple[tuple[str, str], Int32]]
    id: str | None = None


class _Read(BaseException):
    """Ends a handler before it would send to the engine. Not an `Exception`: error handlers do not catch it."""


_found: ContextVar[list[Message]] = ContextVar("found")


class RequestReader:
    """Runs the server's own application up to the point where it would send to the engine.

    So every route, dialect, key and salt is parsed exactly as in a replica. A request that would be refused yields
    nothing; the replica that receives it answers with the error.
    """

    def __init__(self, config: ServerConfig) -> None:
        """Loads the model's tokenizer. Raises `LoadError`. ``config.namespace_secret`` must be the replicas'."""
        self._tokenizer = Tokenizer.load(model_folder(config.engine.model))
        client = EngineClient(_record, _record, _ANY, Metrics())
        secret = None if config.namespace_secret is None else config.namespace_secret.encode()
        names = Namespaces(config.api_key, secret)
        state = AppState(config, client, Metrics(), names, model_name(config))
        state.tokenizer = self._tokenizer
        client.ready(Limits(self._tokenizer.vocab_size, _ANY, _ANY))
        self._app = make_app(state)

    async def read(self, scope: Scope, body: bytes) -> RequestPrompts:
        """The prompts and namespaces of the request with this ASGI ``scope`` and body."""
        found: list[Message] = []
        token = _found.set(found)
        try:
            await self._app(dict(scope), _receiver(body), _discard)
        except _Read:
            pass
        except Exception:
            logger.debug("a request could not be read for routing", exc_info=True)
        finally:
            _found.reset(token)
        prompts: list[tuple[tuple[str, str], Int32]] = []
        id = None
        for message in found:
            match message:
                case Generate():
                    tokens = await self._tokens(message.text, message.tokens, message.add_special_tokens)
                    prompts.append((message.namespace, tokens))
                case BranchOp() | BranchRun():
                    id = message.branch or id
                    if message.piece is not None and not message.branch:
                        piece = message.piece
                        tokens = await self._tokens(piece.text, piece.tokens, piece.add_opening)
                        prompts.append((message.namespace, tokens))
                case Control():
                    asked = message.argument if isinstance(message.argument, dict) else {}
                    if "tokens" in asked:
                        tokens = await self._tokens(None, asked["tokens"], False)
                        prompts.append((asked["namespace"], tokens))
                    id = asked.get("pin") or id
        return RequestPrompts(prompts, id)

    async def _tokens(self, text: str | None, tokens: bytes, special: bool) -> Int32:
        if text is None:
            return np.frombuffer(tokens, "<i4").astype(np.int32, copy=False)
        if len(text) <= _INLINE:
            return self._tokenizer.encode(text, special)
        return await asyncio.to_thread(self._tokenizer.encode, text, special)


def _record(messages: Sequence[Message]) -> None:
    found = _found.get(None)
    if found is not None:  # else they are about the start
        found.extend(messages)
        raise _Read


def _receiver(body: bytes) -> Callable[[], Awaitable[dict[str, Any]]]:
    sent = False

    async def receive() -> dict[str, Any]:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def _discard(message: MutableMapping[str, Any]) -> None:
    pass
