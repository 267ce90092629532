"""What breaks reuse where a conversation is rendered again: a name for the usual reasons."""

from __future__ import annotations

from typing import Literal

Break = Literal["tokenization", "thinking", "text"]
_THINKING = ("<think>", "[THINK]", "<|channel|>analysis")


def breaks(prompt: str, cached: str | None) -> Break | None:
    """Why a prompt leaves what is cached, from the texts of the next tokens of each; None: nothing cached follows.

    ``tokenization``: the same text in other tokens. A model may write a text in other tokens than the tokenizer does:
    send its output ids back instead of the text. ``thinking``: what is cached goes on with thinking, which templates
    leave out of earlier turns. ``text``: another text, as where a template writes a call's arguments in its own way.
    """
    if not cached:
        return None
    if any(marker in cached and marker not in prompt for marker in _THINKING):
        return "thinking"
    same = min(len(prompt), len(cached))
    return "tokenization" if same and prompt[:same] == cached[:same] else "text"
