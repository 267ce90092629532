"""The runtime names a request's fields as the wire does; people at a terminal know flags."""

from __future__ import annotations

import re

_FLAGS = {
    "max_new_tokens": "--max-tokens",
    "max_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "sampling_seed": "--seed",
    "seed": "--seed",
    "stop": "--stop",
    "text": "prompt",
    "input_ids": "prompt",
}
# Ordinary English words are names of fields only where a message begins with them.
_ANYWHERE = "max_new_tokens|max_tokens|top_p|top_k|sampling_seed|input_ids"
_FIELD = re.compile(
    rf"(?:(?:^|(?<=: ))(?:sampling_params(?:\[\d+\])?\.)?(?P<first>{'|'.join(_FLAGS)})"
    rf"|(?<![-\w.])(?:sampling_params(?:\[\d+\])?\.)?(?P<later>{_ANYWHERE}))(?:\[(?P<index>\d+)\])?(?![-\w])"
)


def in_flags(message: str) -> str:
    """``message`` with the names of fields as flags: ``text[1] has 9 tokens`` is ``prompt 2 has 9 tokens``."""

    def said(match: re.Match[str]) -> str:
        flag = _FLAGS[match["first"] or match["later"]]
        return flag if match["index"] is None else f"{flag} {int(match['index']) + 1}"

    return _FIELD.sub(said, message)
