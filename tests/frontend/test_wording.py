"""Errors of a request are said in the words of the command line."""

from __future__ import annotations

import pytest

from branchwise.frontend.cli.wording import in_flags


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        ("temperature must be at least 0, got -1", "--temperature must be at least 0, got -1"),
        ("http://h:1 answered 400: sampling_params.top_p must be", "http://h:1 answered 400: --top-p must be"),
        ("sampling_params[1].stop must be", "--stop must be"),
        ("text[1] has 9 tokens, more than the 8", "prompt 2 has 9 tokens, more than the 8"),
        (
            "text 90 + max_new_tokens 20 = 110 tokens; lower max_new_tokens or raise --max-model-len",
            "prompt 90 + --max-tokens 20 = 110 tokens; lower --max-tokens or raise --max-model-len",
        ),
        ("text 2 + sampling_params.max_new_tokens 5 = 7", "prompt 2 + --max-tokens 5 = 7"),
        ("sampling_seed must be an integer", "--seed must be an integer"),
        ("prompt must not be empty", "prompt must not be empty"),
        ("the temperature of the text may stop", "the temperature of the text may stop"),
        ("--max-tokens and text-2 stay", "--max-tokens and text-2 stay"),
    ],
)
def test_fields_become_flags(wire: str, said: str) -> None:
    assert in_flags(wire) == said
