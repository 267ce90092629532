"""Offsets and texts of OpenAI's legacy logprobs."""

from __future__ import annotations

import pytest

from branchwise.runtime.logprobs import TokenLogprob
from branchwise.runtime.server.http.openai.legacy_logprobs import LegacyLogprobs, TokenTexts
from branchwise.runtime.tokenizer.tokenizer import Tokenizer

TEXT = "The café — 東京 🌳"


def rows(ids: list[int]) -> list[TokenLogprob | None]:
    return [TokenLogprob(token, -1.0, [(token, -1.0), (token + 1, -2.0)], 1) for token in ids]


def test_offsets_point_into_the_text(tokenizer: Tokenizer) -> None:
    """Also where a character is several tokens: an offset is that of the character the token begins or continues."""
    ids = tokenizer.encode(TEXT).tolist()
    described = LegacyLogprobs(TokenTexts(tokenizer), skip_special_tokens=True).add(ids, [None, *rows(ids)[1:]])
    assert described["tokens"][0] == "<|begin|>"
    assert described["token_logprobs"][:2] == [None, -1.0]
    assert described["top_logprobs"][0] is None
    assert described["text_offset"][:2] == [0, 0]
    assert any(text.startswith("bytes:\\x") for text in described["tokens"]), "the text must split a character"
    for text, offset in zip(described["tokens"][1:], described["text_offset"][1:], strict=True):
        if not text.startswith("bytes:"):
            assert TEXT[offset : offset + len(text)] == text
    assert described["text_offset"] == sorted(described["text_offset"])


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_count_where_they_are_spelled_out(tokenizer: Tokenizer, skip: bool) -> None:
    """An echoed text has those its sender wrote, and not the one the tokenizer put before it."""
    text = "<|end|>Hi<|begin|> there"
    ids = tokenizer.encode(text).tolist()
    described = LegacyLogprobs(TokenTexts(tokenizer), skip_special_tokens=skip).add(ids, rows(ids), text)
    assert described["tokens"][:3] == ["<|begin|>", "<|end|>", "H"]
    assert described["text_offset"][:2] == [0, 0]
    for token, offset in list(zip(described["tokens"], described["text_offset"], strict=True))[1:]:
        assert text[offset:].startswith(token)


def test_pieces_join(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    whole = LegacyLogprobs(TokenTexts(tokenizer), True).add(ids, rows(ids))
    pieces = LegacyLogprobs(TokenTexts(tokenizer), True)
    parts = [pieces.add([token], rows([token])) for token in ids]
    assert {name: [value for part in parts for value in part[name]] for name in whole} == whole


def test_the_chosen_token_is_always_among_the_top(tokenizer: Tokenizer) -> None:
    chosen, better, best = tokenizer.encode("a b c", add_special_tokens=False).tolist()[:3]
    row = TokenLogprob(chosen, -5.0, [(best, -0.1), (better, -0.2)], 3)
    [top] = LegacyLogprobs(TokenTexts(tokenizer), True).add([chosen], [row])["top_logprobs"]
    assert list(top.values()) == [-0.1, -0.2, -5.0]
