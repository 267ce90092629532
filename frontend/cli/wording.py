"""Errors about a request in the command line's terms: flags instead of field names."""

from __future__ import annotations

from ...runtime.errors import BranchwiseError, InvalidRequest
from ..errors import BackendError

_FLAGS = {
    "max_tokens": "--max-tokens",
    "max_new_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "seed": "--seed",
    "sampling_seed": "--seed",
    "stop": "--stop",
}
_NAMES = {
    **_FLAGS,
    **{f"sampling_params{index}.{field}": flag for field, flag in _FLAGS.items() for index in ("", "[]")},
    "text": "prompt",
    "input_ids": "prompt",
}


def in_flags(error: BranchwiseError) -> str:
    """The error's message, with flags for our own names of the fields and for those of ``/generate``."""
    if isinstance(error, BackendError) and error.invalid is not None:
        return str(error).removesuffix(error.reason) + str(error.invalid.renamed(_NAMES))
    return str(error.renamed(_NAMES) if isinstance(error, InvalidRequest) else error)
