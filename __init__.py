"""Branchwise: a runtime for LLM programs that branch. Every shared prefix is computed once.

Public names resolve lazily (PEP 562), so ``import branchwise`` costs milliseconds and needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AsyncEngine": ".runtime.engine",
    "Engine": ".runtime.engine",
    "EngineConfig": ".runtime.config",
    "RequestOutput": ".runtime.engine",
    "SamplingParams": ".runtime.sampling_params",
}

if TYPE_CHECKING:
    from .runtime.config import EngineConfig as EngineConfig
    from .runtime.engine import AsyncEngine as AsyncEngine
    from .runtime.engine import Engine as Engine
    from .runtime.engine import RequestOutput as RequestOutput
    from .runtime.sampling_params import SamplingParams as SamplingParams

__all__ = ["AsyncEngine", "Engine", "EngineConfig", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
