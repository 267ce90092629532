"""The stop-string matcher on its own, against its definition."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from branchwise.runtime.tokenizer.stop_strings import StopMatcher


def first_to_complete(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """By definition: the stop string that ends first; of several, the longest."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


letters = st.text(alphabet="ab", max_size=30)


@given(
    pieces=st.lists(letters, max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=6), min_size=1, max_size=4),
    include=st.booleans(),
)
@settings(max_examples=600, deadline=None)
def test_stop_strings_by_definition(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(stops, include)
    text, shown = "".join(pieces), ""
    for i, piece in enumerate(pieces):
        shown += matcher.push(piece)
        so_far = "".join(pieces[: i + 1])
        if first_to_complete(so_far, stops) is None:
            # as much as can be shown: held back is the longest suffix that begins a stop string, no more
            held = max(
                (n for n in range(len(so_far) + 1) for stop in stops if n and stop.startswith(so_far[-n:])), default=0
            )
            assert shown == so_far[: len(so_far) - held]
    shown += matcher.flush()
    found = first_to_complete(text, stops)
    assert matcher.matched == (found[1] if found else None)
    if found is None:
        assert shown == text
    else:
        assert shown == text[: found[0] if include else found[0] - len(found[1])]
        assert matcher.push("more") == "" and matcher.flush() == ""


def test_hostile_stop_strings_cost_little() -> None:
    stops = ["a" * (500 + i) + "b" for i in range(64)]
    matcher = StopMatcher(stops, False)
    began = time.thread_time()
    shown = "".join(matcher.push("aaaa") for _ in range(1000)) + matcher.push("c")
    assert shown == "a" * 4000 + "c"
    assert time.thread_time() - began < 5.0
