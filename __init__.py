"""Branchwise: a runtime for LLM programs that branch. Every shared prefix is computed once.

Public names resolve lazily (PEP 562), so ``import branchwise`` costs milliseconds and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LANGUAGE = {
    ".frontend.errors": "BackendError",
    ".frontend.lang.backends": "OpenAI RuntimeEndpoint connect default_backend flush_cache get_server_info "
    "set_default_backend",
    ".frontend.lang.choices": "greedy_token_selection token_length_normalized unconditional_likelihood_normalized",
    ".frontend.lang.errors": "ProgramError",
    ".frontend.lang.expressions": "assistant assistant_begin assistant_end gen gen_int gen_string select special "
    "system system_begin system_end user user_begin user_end",
    ".frontend.lang.function": "Function function",
    ".frontend.lang.search": "best_of search",
    ".frontend.lang.state": "AsyncState Group State",
    ".frontend.lang.tools": "tool_loop",
}
_PUBLIC = {
    **{name: module for module, names in _LANGUAGE.items() for name in names.split()},
    "AsyncEngine": ".runtime.engine.async_engine",
    "Engine": ".runtime.engine.engine",
    "EngineConfig": ".runtime.config",
    "RequestOutput": ".runtime.engine.request_output",
    "Server": ".runtime.server.server",
    "ServerConfig": ".runtime.config",
    **dict.fromkeys(("BranchwiseError", "EngineDead", "InvalidRequest", "LoadError"), ".runtime.errors"),
    "SamplingParams": ".runtime.sampling_params",
}

if TYPE_CHECKING:
    from .frontend.errors import BackendError as BackendError
    from .frontend.lang.backends import OpenAI as OpenAI
    from .frontend.lang.backends import RuntimeEndpoint as RuntimeEndpoint
    from .frontend.lang.backends import connect as connect
    from .frontend.lang.backends import default_backend as default_backend
    from .frontend.lang.backends import flush_cache as flush_cache
    from .frontend.lang.backends import get_server_info as get_server_info
    from .frontend.lang.backends import set_default_backend as set_default_backend
    from .frontend.lang.choices import greedy_token_selection as greedy_token_selection
    from .frontend.lang.choices import token_length_normalized as token_length_normalized
    from .frontend.lang.choices import unconditional_likelihood_normalized as unconditional_likelihood_normalized
    from .frontend.lang.errors import ProgramError as ProgramError
    from .frontend.lang.expressions import assistant as assistant
    from .frontend.lang.expressions import assistant_begin as assistant_begin
    from .frontend.lang.expressions import assistant_end as assistant_end
    from .frontend.lang.expressions import gen as gen
    from .frontend.lang.expressions import gen_int as gen_int
    from .frontend.lang.expressions import gen_string as gen_string
    from .frontend.lang.expressions import select as select
    from .frontend.lang.expressions import special as special
    from .frontend.lang.expressions import system as system
    from .frontend.lang.expressions import system_begin as system_begin
    from .frontend.lang.expressions import system_end as system_end
    from .frontend.lang.expressions import user as user
    from .frontend.lang.expressions import user_begin as user_begin
    from .frontend.lang.expressions import user_end as user_end
    from .frontend.lang.function import Function as Function
    from .frontend.lang.function import function as function
    from .frontend.lang.search import best_of as best_of
    from .frontend.lang.search import search as search
    from .frontend.lang.state import AsyncState as AsyncState
    from .frontend.lang.state import Group as Group
    from .frontend.lang.state import State as State
    from .frontend.lang.tools import tool_loop as tool_loop
    from .runtime.config import EngineConfig as EngineConfig
    from .runtime.config import ServerConfig as ServerConfig
    from .runtime.engine.async_engine import AsyncEngine as AsyncEngine
    from .runtime.engine.engine import Engine as Engine
    from .runtime.engine.request_output import RequestOutput as RequestOutput
    from .runtime.errors import BranchwiseError as BranchwiseError
    from .runtime.errors import EngineDead as EngineDead
    from .runtime.errors import InvalidRequest as InvalidRequest
    from .runtime.errors import LoadError as LoadError
    from .runtime.sampling_params import SamplingParams as SamplingParams
    from .runtime.server.server import Server as Server

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
