"""The cache fields of a request: its part of the cache, what to keep of its prompt, and for how long."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from ....errors import InvalidRequest, shown
from ..state import AppState
from .prompts import check_label

MAX_BREAKPOINTS = 4  # of one prompt, as OpenAI and Anthropic have it
DEFAULT_TTL = 1800.0  # seconds: OpenAI's
MODES = ("auto", "implicit", "explicit", "off")
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
# OpenAI's and Anthropic's, which clients send by default: lowered to the server's limit, where others are refused.
STANDARD_TTLS = (None, "5m", "30m", "1h", 300.0)
_END = -1  # the position that means the end of the prompt


class PromptCacheOptions(BaseModel):
    """``auto`` (OpenAI's ``implicit``): the prompt is cached until it is evicted, with a ``ttl`` at least that long.
    ``explicit``: the ttl applies to breakpoints only. ``off``: the request neither reads nor fills the cache."""

    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True)
    mode: str | None = None
    ttl: str | float | int | None = Field(None, description="Seconds, or a number with s, m, h or d: 30m.")


_NO_OPTIONS = PromptCacheOptions(ttl=None)


class Partition(BaseModel):
    """A base of request models: the part of the caller's cache."""

    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True)
    cache_salt: str | None = None
    extra_key: str | None = Field(None, description="SGLang's other name for cache_salt.")
    prompt_cache_key: str | None = Field(None, description="A part of the caller's cache, isolated from the others.")


class CacheFields(Partition):
    """A base of request models."""

    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_breakpoint: Any = Field(
        None,
        description="Keep the prompt's beginning cached: true, or {ttl, at}, or up to 4 of them. at: characters of a "
        "text, tokens of token ids; null: to its end.",
    )


def namespace_of(state: AppState, body: Partition, within: str = "") -> tuple[str, str]:
    """The namespace that a request names. ``within``: the path of the body, with a dot. Raises `InvalidRequest`."""
    labels = {name: getattr(body, name) for name in Partition.model_fields}
    for name, label in labels.items():
        check_label(label, f"{within}{name}")
    return state.namespaces.of(*labels.values())


def caching(
    state: AppState, body: CacheFields, *, marks: Sequence[tuple[int, str | float | None]] = ()
) -> dict[str, Any]:
    """``namespace``, ``breakpoints`` and ``no_cache`` of a `Generate`, from a request's fields.

    ``marks``: breakpoints within a rendered conversation, (position in characters, ttl). Of more than four the last
    four count, as in OpenAI's API. Raises `InvalidRequest`.
    """
    namespace = namespace_of(state, body)
    options = body.prompt_cache_options or _NO_OPTIONS
    mode = options.mode or "auto"
    if mode not in MODES:
        raise InvalidRequest("prompt_cache_options.mode", f"must be one of {', '.join(MODES)}, got {shown(mode)}")
    longest = state.config.engine.max_pin_ttl
    usual = min(DEFAULT_TTL, longest)
    if options.ttl is not None:
        usual = seconds(options.ttl, longest, "prompt_cache_options.ttl")
    found = [(at, ttl, math.inf if ttl in STANDARD_TTLS else longest) for at, ttl in marks]
    found += [(at, ttl, longest) for at, ttl in _asked(body.prompt_cache_breakpoint)]
    breakpoints = [
        (at, usual if ttl is None else min(seconds(ttl, most, "prompt_cache_breakpoint.ttl"), longest))
        for at, ttl, most in found
    ]
    if mode == "off":
        if breakpoints or options.ttl is not None:
            raise InvalidRequest("prompt_cache_options.mode", "off cannot be combined with a breakpoint or a ttl")
        owner, _ = state.namespaces.of(None)
        return {"namespace": (owner, f"private-{secrets.token_hex(16)}"), "no_cache": True}
    if options.ttl is not None and mode != "explicit":
        breakpoints.append((_END, usual))
    return {
        "namespace": namespace,
        "breakpoints": breakpoints[-MAX_BREAKPOINTS:],
    }


def seconds(ttl: Any, longest: float, field: str, flag: str = "--max-pin-ttl") -> float:
    """Parse ``30``, ``"30s"``, ``"5m"``, ``"1h"`` or ``"1d"``. ``flag``: sets the bound ``longest``."""
    value = -1.0
    if isinstance(ttl, str):
        match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", ttl)
        value = float(match[1]) * _UNITS[match[2]] if match else -1.0
    elif isinstance(ttl, (int, float)) and not isinstance(ttl, bool):
        value = float(ttl)
    if not 0 < value <= longest:
        raise InvalidRequest(
            field,
            f"must be more than 0 and at most {longest:g} seconds ({flag}), such as 300 or '5m', got {shown(ttl)}",
        )
    return value


def _asked(value: Any) -> list[tuple[int, str | float | None]]:
    field = "prompt_cache_breakpoint"
    if value is None or value is False:
        return []
    entries = value if isinstance(value, list) else [value]
    if len(entries) > MAX_BREAKPOINTS:
        raise InvalidRequest(field, f"must be at most {MAX_BREAKPOINTS}, got {len(entries)}")
    found: list[tuple[int, str | float | None]] = []
    for entry in entries:
        if entry is True:
            found.append((_END, None))
            continue
        if not isinstance(entry, dict):
            raise InvalidRequest(field, f"must be true or an object with ttl and at, got {type(entry).__name__}")
        at = entry.get("at")
        if at is None:
            at = _END
        elif not isinstance(at, int) or isinstance(at, bool) or not 0 < at < 2**31:
            raise InvalidRequest(f"{field}.at", f"must be a position from 1 on, got {shown(at)}")
        found.append((at, entry.get("ttl")))
    return found
