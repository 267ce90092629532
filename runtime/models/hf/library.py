"""transformers, an optional dependency: import, version, and the attention function registered with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from packaging.version import Version
from torch import Tensor

from ...errors import LoadError

logger = logging.getLogger(__name__)

EXTRA = "pip install 'transformers>=5.0'"
OLDEST = "5.0"  # its experts, masks and weight conversions are interfaces
SERVE, TRACE = "branchwise", "branchwise_trace"  # names of attention implementations

# One layer's attention: q ``[1, heads, T, D]``, k and v ``[1, kv_heads, T, D]``, the mask, and the keyword arguments
# that the model passes. Returns ``[1, T, heads, D]``.
Attend = Callable[[Tensor, Tensor, Tensor, Any, Mapping[str, Any]], Tensor]

_attend: ContextVar[Attend] = ContextVar("attend")
_registration, _building = threading.Lock(), threading.Lock()


def transformers_version() -> str | None:
    """The installed version; None without transformers."""
    try:
        return metadata.version("transformers") if find_spec("transformers") is not None else None
    except metadata.PackageNotFoundError:
        return None


def load_transformers() -> Any:
    """The module, with our attention registered. Raises `LoadError` if it is missing or too old."""
    version = transformers_version()
    if version is None:
        raise LoadError(f"--model-impl transformers: transformers is not installed: {EXTRA}")
    if Version(version) < Version(OLDEST):
        raise LoadError(f"--model-impl transformers needs transformers {OLDEST} or newer, not {version}: {EXTRA}")
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    with _registration:
        if SERVE not in AttentionInterface.valid_keys(AttentionInterface()):
            AttentionInterface.register(SERVE, _attention)
            AttentionInterface.register(TRACE, _attention)
            # SERVE has no mask function: transformers then builds no mask, which would wait for the device.
            AttentionMaskInterface.register(TRACE, _mask_function)
    return transformers


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """While inside, models of this thread attend with ``attend``."""
    token = _attend.set(attend)
    try:
        yield
    finally:
        _attend.reset(token)


@contextmanager
def building(transformers: Any) -> Iterator[None]:
    """While inside, one thread builds a model: transformers replaces functions of its classes meanwhile. Without its
    warnings and progress bars: we say what matters in our own words."""
    log = transformers.logging
    with _building:
        verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
        log.set_verbosity_error()
        log.disable_progress_bar()
        try:
            yield
        finally:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **arguments: Any
) -> tuple[Tensor, None]:
    """The function behind `AttentionInterface`."""
    return _attend.get()(query, key, value, attention_mask, arguments), None


def _mask_function(
    batch_size: int, q_length: int, kv_length: int, *, mask_function: Any = None, **_: Any
) -> MaskFunction:
    """The function behind `AttentionMaskInterface`: keeps what would compute the mask."""
    return MaskFunction(mask_function)


class MaskFunction:
    """Stands for a mask while a model is traced.

    Args:
        sees: (batch, head, query position, key position) to whether the query sees the key; tensors broadcast.
    """

    ndim = 4  # as the mask of every other implementation
    shape = (1, 1, 1, 1)

    def __init__(self, sees: Callable[..., Any]) -> None:
        self.sees = sees
