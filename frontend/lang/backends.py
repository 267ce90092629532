"""Choosing a backend: an engine, the address of a server, or the default one."""

from __future__ import annotations

import os
import weakref
from typing import Any
from urllib.parse import urlsplit

from ..client import TIMEOUT, Client, first_model
from ..errors import BackendError
from ..loop import run_blocking
from .backend import Backend
from .branches import BranchBackend
from .engine import EngineBackend
from .openai import OpenAIBackend
from .server import ServerBackend

_default: Backend | None = None
_engines: weakref.WeakKeyDictionary[Any, EngineBackend] = weakref.WeakKeyDictionary()


def connect(
    url: str,
    api_key: str | None = None,
    *,
    model: str | None = None,
    branches: bool | None = None,
    cache_salt: str | None = None,
    timeout: float = TIMEOUT,
) -> Backend:
    """The server at ``url``: a Branchwise server if it answers as one, otherwise any OpenAI-compatible server.

    ``model``: which model of an OpenAI-compatible server; by default its first. ``branches``: keep prompts on the
    server as branches (True) or send them whole each time (False); by default as the server supports. ``timeout``:
    seconds without a byte from the server. Raises `BackendError` if the server cannot be reached or refuses the key.
    """
    api_key = api_key or os.environ.get("BRANCHWISE_API_KEY") or None
    client = Client(url, api_key, timeout=30.0, key_source="api_key= or BRANCHWISE_API_KEY")
    try:
        facts = client.get("/get_server_info")
    except BackendError as error:
        if error.status in (0, 401, 503):
            raise
        facts = {}
    if not (isinstance(facts, dict) and isinstance(facts.get("engine"), dict) and "page_size" in facts["engine"]):
        if branches or cache_salt is not None:
            raise BackendError(f"{client.url} is not a Branchwise server: it has no branches and no cache_salt")
        return OpenAIBackend(client.url, model or first_model(client), api_key=api_key, timeout=timeout)
    can_branch = facts.get("config", {}).get("engine", {}).get("max_branches", 0) > 0
    if branches and not can_branch:
        raise BackendError(f"{client.url} keeps no branches (--max-branches 0): leave branches= out")
    kind = BranchBackend if can_branch and branches is not False else ServerBackend
    return kind(client.url, api_key=api_key, timeout=timeout, cache_salt=cache_salt)


def RuntimeEndpoint(
    base_url: str, api_key: str | None = None, verify: Any = None, chat_template_name: str | None = None
) -> Backend:
    """SGLang's name for `connect`. The chat template is the model's own."""
    if verify is not None or chat_template_name is not None:
        raise ValueError("verify and chat_template_name are not supported: leave them out")
    return connect(base_url, api_key)


def OpenAI(
    model: str, api_key: str | None = None, *, base_url: str = "https://api.openai.com", chat: bool | None = None
) -> OpenAIBackend:
    """A model of an OpenAI-compatible server. ``chat``: it has no text completions; True by default for openai.com."""
    key = api_key or os.environ.get("OPENAI_API_KEY")
    url = base_url.rstrip("/").removesuffix("/v1").rstrip("/")
    only_chats = (urlsplit(url).hostname or "").endswith("openai.com") if chat is None else chat
    return OpenAIBackend(url, model, api_key=key, chat=only_chats)


def as_backend(given: Any) -> Backend:
    """The backend of an engine or of an address; a backend is returned as it is."""
    if isinstance(given, str):
        return connect(given)
    if hasattr(given, "agenerate"):
        if given not in _engines:
            _engines[given] = EngineBackend(given)
        return _engines[given]
    if hasattr(given, "generate") and hasattr(given, "capabilities"):
        return given
    raise TypeError(f"a backend is an Engine, a server's address or what connect() returns, not {type(given).__name__}")


def set_default_backend(backend: Any) -> None:
    """Sets what programs without ``backend=`` run on: an `Engine`, an address, or what `connect` returned."""
    global _default
    _default = None if backend is None else as_backend(backend)


def default_backend() -> Backend:
    if _default is None:
        raise BackendError("no backend: give backend=, or call set_default_backend(...) first")
    return _default


def flush_cache(backend: Any = None) -> None:
    """Empties the backend's cache, except what running requests use. Blocks."""
    run_blocking(resolve(backend).flush_cache())


def get_server_info(backend: Any = None) -> Any:
    """The server's configuration, limits and counters. Blocks."""
    chosen = resolve(backend)
    if not isinstance(chosen, ServerBackend):
        raise BackendError(f"{chosen.name} is not a Branchwise server")
    return run_blocking(chosen.http.get("/get_server_info"))


def resolve(given: Any) -> Backend:
    """`as_backend`; None: the default one."""
    return default_backend() if given is None else as_backend(given)
