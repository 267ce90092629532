"""The reason why a prompt leaves what is cached."""

from __future__ import annotations

import pytest

from branchwise.runtime.chat.breaks import breaks


@pytest.mark.parametrize(
    ("prompt", "cached", "reason"),
    [
        ("The sum is 4.", None, None),
        ("The sum is 4.", "", None),
        ("The sum", "The sum is 4", "tokenization"),
        ("4.<|im_end|>", "<think>\nTwo and two", "thinking"),
        ("<think>\nThree", "<think>\nTwo", "text"),
        ('{"a":1}', '{"a": 1}', "text"),
        ("", "The sum", "text"),
    ],
)
def test_the_reason_is_named(prompt: str, cached: str | None, reason: str | None) -> None:
    assert breaks(prompt, cached) == reason
