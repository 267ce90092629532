"""Where the reuse of recent requests ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from branchwise.runtime.messages import CacheReport
from branchwise.runtime.scheduler.stops import AROUND, KEPT, Stops

NAMESPACE = ("owner", "")


def request(id: int, prompt: list[int], hit: int, *, no_cache: bool = False, namespace: Any = NAMESPACE) -> Any:
    report = CacheReport(hit_tokens=hit, reason="diverged")
    return SimpleNamespace(
        id=id, prompt=np.array(prompt, np.int32), namespace=namespace, cache=report, no_cache=no_cache
    )


def found(stops: Stops, path: list[int], start: int = 0, namespace: Any = NAMESPACE) -> list[int]:
    return [stop.request for stop in stops.within(namespace, np.array(path, np.int32), start)]


def test_a_stop_belongs_to_the_node_that_it_is_in() -> None:
    stops = Stops()
    stops.note(request(1, [1, 2, 3, 4, 9, 9], hit=4))
    stops.note(request(2, [1, 2, 3, 4, 7], hit=4))
    path = [1, 2, 3, 4, 5, 6]
    assert found(stops, path) == [2, 1], "the latest first"
    assert found(stops, path, start=3) == [2, 1] and found(stops, path, start=4) == []
    assert found(stops, [1, 2, 3]) == [], "it went on beyond this node"
    assert found(stops, [1, 2, 3, 4]) == [2, 1], "at its end"
    assert found(stops, [1, 2, 8, 4, 5]) == [], "another prefix of the same length"
    assert found(stops, path, namespace=("other", "")) == []


def test_what_the_request_wrote_itself_is_no_stop() -> None:
    stops = Stops()
    stops.note(request(1, [1, 2, 3, 9, 9], hit=3))
    assert found(stops, [1, 2, 3, 9]) == [] and found(stops, [1, 2, 3, 9, 9, 7]) == []
    assert found(stops, [1, 2, 3, 9, 8]) == [1]


def test_it_keeps_a_bounded_number_of_bounded_texts() -> None:
    stops = Stops()
    long = list(range(1, 1000))
    for i in range(KEPT + 10):
        stops.note(request(i, long, hit=500))
    kept = list(stops.within(NAMESPACE, np.array([*long[:500], 7], np.int32), 0))
    assert len(kept) == KEPT and kept[-1].request == 10
    assert len(kept[0].before) == len(kept[0].after) == AROUND
    assert kept[0].after.base is None, "a view would keep the whole prompt"


def test_requests_without_the_cache_are_left_out() -> None:
    stops = Stops()
    stops.note(request(1, [1, 2, 3], hit=2, no_cache=True))
    assert found(stops, [1, 2, 9]) == []
