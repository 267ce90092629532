"""Tokenizes text that is appended to a branch. Used by the tokenizer process and by in-process engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from ..chat.conversation import Conversation
from ..chat.openai_messages import openai_turns
from ..chat.prompt import chat_prompt
from ..errors import InvalidRequest
from ..messages import BranchOp, BranchRun, Piece, Refusal
from ..shared_tokens import tokens_from_bytes, tokens_to_bytes
from .tokenizer import Tokenizer


def encode_message(
    tokenizer: Tokenizer, message: BranchOp | BranchRun, check: Callable[[str], None] = lambda text: None
) -> None:
    """Puts token ids beside every text of the message; an error becomes its ``refusal``.

    ``check`` may raise `InvalidRequest` for a text before it is tokenized.
    """
    try:
        if message.piece is not None:
            check(message.piece.text or "")
            message.piece = encode_piece(tokenizer, message.piece)
        if isinstance(message, BranchRun) and message.continuations is not None:
            for continuation in message.continuations:
                check(continuation.text or "")
            message.continuations = [encode_piece(tokenizer, piece) for piece in message.continuations]
            if message.unconditional:
                message.opening = tokens_to_bytes(tokenizer.opening)
    except InvalidRequest as error:
        message.refusal = Refusal.of(error)


def encode_piece(tokenizer: Tokenizer, piece: Piece) -> Piece:
    """The same piece with its tokens. A text is tokenized by itself; what a stop string left of a token (``before``)
    is tokenized together with it, unless only one of the two may hold special tokens."""
    before, text = piece.before, piece.text
    more: list[npt.NDArray[np.int32]] = []
    left = 0
    if text is None:
        more += [tokenizer.encode_more(before)] if before else []
        left = sum(map(len, more))
        more.append(tokens_from_bytes(piece.tokens))
    elif before and piece.parse_special:
        more += [tokenizer.encode_more(before), tokenizer.encode_more(text, parse_special=True)]
    else:
        more.append(tokenizer.encode_more(before + text, piece.parse_special))
    tokens = tokens_to_bytes(np.concatenate(more))
    first: bytes | None = None
    if text and not before:
        opening = tokens_to_bytes(tokenizer.opening) if piece.add_opening else b""
        if tokenizer.begins_with_space:
            first = opening + tokens_to_bytes(tokenizer.encode_first(text, piece.parse_special))
        elif opening:
            first = opening + tokens
    return msgspec.structs.replace(piece, tokens=tokens, first=first, left=left)


def chat_piece(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> Piece:
    """The chat template's text of a conversation. The template may spell out special tokens. Messages may not, so that
    no client can end its own turn and begin another.

    Raises `InvalidRequest`, also where the model has no template or the template refuses the messages.
    """
    text = chat_prompt(tokenizer.required_template, Conversation(turns=openai_turns(messages))).text()
    check_no_special(tokenizer, messages)
    return rendered_piece(text)


def check_no_special(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises `InvalidRequest` naming the message that spells out a special token."""
    for i, message in enumerate(messages):
        for name, value in message.items():
            special = tokenizer.special_in(value if isinstance(value, str) else repr(value))
            if special is not None:
                raise InvalidRequest(
                    f"messages[{i}].{name}",
                    f"spells out the special token {special}; if it is meant to be one, send parse_special: true",
                )


def rendered_piece(text: str) -> Piece:
    """Tokens of text that a chat template wrote, which has its special tokens already."""
    return Piece(text, parse_special=True, add_opening=False)
