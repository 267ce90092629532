"""Values are counted in a body's bytes: against those a parser makes, wherever a slice ends, and never too few."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from branchwise.runtime.chat import json_bounds
from branchwise.runtime.chat.json_bounds import Values, count_values, deeper_than, deeper_than_now


def made(value: Any) -> tuple[int, int]:
    """What a parser makes of it, the text's value itself left out: (all with names, strings and lists and objects).
    Of the first, lists and objects are two."""
    if isinstance(value, dict):
        inside = [one for item in value.items() for one in item]
    elif isinstance(value, list):
        inside = value
    else:
        return 0, 0
    below = [made(one) for one in inside]
    large = sum(isinstance(one, (str, list, dict)) for one in inside)
    return 1 + len(inside) + sum(one[0] for one in below), large + sum(one[1] for one in below)


def depth(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def empties(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return (not value) + sum(map(empties, value.values() if isinstance(value, dict) else value))


class Anything:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        pieces = ["\\", '"', ",", ":", "[", "{", "]", "}", "a", "語", "\n", "\x00", "😀", "\\\\", '\\"']
        return "".join(self.random.choices(pieces, k=self.random.randrange(12)))

    def value(self, depth: int = 4) -> Any:
        kind = self.random.randrange(7 if depth else 5)
        if kind < 5:
            return (self.text(), 1, -2.5, None, True)[kind]
        count = self.random.randrange(5)
        if kind == 5:
            return [self.value(depth - 1) for _ in range(count)]
        return {self.text(): self.value(depth - 1) for _ in range(count)}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1 << 18])
def test_as_many_as_a_parser_makes_wherever_a_slice_ends(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_bounds, "SLICE", size)
    for seed in range(400 if size < 64 else 3000):
        value = {"a": Anything(seed).value(), "b": Anything(-seed).value()}
        for escaped in (True, False):
            text = json.dumps(value, ensure_ascii=escaped, indent=seed % 3 or None).encode()
            found = asyncio.run(count_values(text, 0))
            count, large = made(value)
            assert found == Values(count + empties(value), large + 1, text.count(b"\\")), text
            for most in range(8):
                assert deeper_than_now(text, most) == (depth(value) > most), (text, most)
            assert asyncio.run(deeper_than(text, depth(value) - 1))
            assert not asyncio.run(deeper_than(text, depth(value)))


def test_what_stands_in_strings_is_not_counted() -> None:
    prose = 'if (a[0]) { f({b, c: d}); } // \\ " said: yes, no\n' * 50_000
    text = json.dumps({"messages": [{"role": "user", "content": prose}]}).encode()
    assert asyncio.run(count_values(text, 1000)).all == 10
    rough = asyncio.run(count_values(text, 10**7))
    assert 10 < rough.all <= 10**7, "not looked at any closer"


@pytest.mark.parametrize("end", [b"", b"\\", b'"', b"\xff", b'\\"', b"]", b'"\\'])
def test_text_that_is_no_json_hides_none(end: bytes) -> None:
    """Up to where it goes wrong a parser makes them all."""
    for odd in (b"\\", b'\\"', b"\xff", b""):
        text = b"[" + b"{}," * 1000 + odd + b'"' + b"{}," * 50 + end
        assert asyncio.run(count_values(text, 10)).all >= 3000


async def test_others_have_their_turn_between_slices(turns_during: Any) -> None:
    slices = 20
    counted = count_values(b"," * (slices * json_bounds.SLICE), 0)
    assert await turns_during(counted) >= 2 * slices, "it is looked at twice"
