"""``usage``: the tokens of a request, and how many were cached. A response header has the same on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ....messages import CacheReport
from ....outputs import Output
from ..engine_client import Batch

CACHE_HEADER = "x-branchwise-cache"  # a request with this header, of any value, gets one in the response

_CACHE_HEADER = CACHE_HEADER.encode()


def usage(outputs: Sequence[Output], n: int) -> dict[str, Any]:
    """OpenAI's ``usage`` over the samples of some prompts, ``n`` of each in a row.

    A prompt counts once however often it was sampled. Its cached tokens are those that none of its samples computed;
    computed tokens were written to the cache, unless that is off.
    """
    prompt = cached = written = completion = 0
    for start in range(0, len(outputs), n):
        samples = outputs[start : start + n]
        hit = min(output.cached_tokens for output in samples)
        prompt += samples[0].prompt_tokens
        cached += hit
        if not any(output.cache is not None and output.cache.reason == "disabled" for output in samples):
            written += samples[0].prompt_tokens - hit
        completion += sum(output.completion_tokens for output in samples)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
    }


def cache_headers(asked: Iterable[tuple[bytes, bytes]], batch: Batch, n: int) -> Mapping[str, str] | None:
    """The response header, if ``asked``, the request's headers, have it: ``hit;prompt=tokens;reason=word[;at=token]``
    for each prompt. Of a prompt's ``n`` samples, in a row, the one with the fewest hit tokens counts."""
    if not any(name == _CACHE_HEADER for name, _ in asked):
        return None
    found: dict[int, tuple[int, CacheReport]] = {}
    for index, delta in batch:
        if delta.cache is None:
            continue
        known = found.get(index // n)
        if known is None or delta.cache.hit_tokens < known[1].hit_tokens:
            found[index // n] = delta.prompt_tokens, delta.cache
    parts = []
    for _, (prompt_tokens, report) in sorted(found.items()):
        at = "" if report.diverged_at is None else f";at={report.diverged_at}"
        parts.append(f"{report.hit_tokens};prompt={prompt_tokens};reason={report.reason}{at}")
    return {CACHE_HEADER: ", ".join(parts)} if parts else None
