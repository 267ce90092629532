"""``branchwise top`` without a server: rates, requests, and servers that send no events."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from branchwise.frontend.cli import top
from branchwise.frontend.cli.top import View, progress
from branchwise.frontend.errors import BackendError

TREE = {"namespaces": [], "omitted": 0, "totals": {"page_size": 16}}
FIGURES = {
    "running": 1,
    "waiting": 2,
    "generated_tokens": 100,
    "cached_tokens": 50,
    "computed_tokens": 10,
    "hit_rate": 0.5,
    "pages_total": 100,
    "pages_free": 50,
    "pages_cached": 25,
    "evicted_pages": 0,
    "retractions": 0,
}
REQUEST = {
    "id": 7,
    "state": "running",
    "prompt_tokens": 1000,
    "hit_tokens": 900,
    "computed": 950,
    "limit": 1900,
    "reason": "diverged",
    "path": [],
}


def snapshot(**figures: int) -> dict[str, Any]:
    return {
        "model": "m",
        "figures": FIGURES | figures,
        "tree": TREE,
        "requests": [REQUEST] * 25,
        "requests_omitted": 5,
    }


def shown(view: View) -> str:
    console = Console(width=140, highlight=False)
    with console.capture() as captured:
        console.print(view.render())
    return captured.get()


def test_rates_are_between_snapshots_and_end_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(top.time, "monotonic", lambda: now[0])
    view = View("http://h")
    assert "waiting for http://h" in shown(view)
    view.add(snapshot())
    assert set(view.rates().values()) == {0.0}
    now[0] += 2
    view.add(snapshot(generated_tokens=300, cached_tokens=150))
    assert view.rates() == {"generated_tokens": 100.0, "cached_tokens": 50.0, "computed_tokens": 0.0}
    text = shown(view)
    assert "100 tokens/s generated" in text and "KV 25.0% in use, 25.0% cached, 50.0% free of 1,600 tokens" in text
    assert text.count("diverged") == top.MAX_REQUESTS and "10 more" in text and "950 of 1,900" in text
    now[0] += 5
    assert set(view.rates().values()) == {0.0}, "no event came: nothing has changed"


def test_a_restarted_server_has_no_negative_rates() -> None:
    view = View("http://h")
    view.add(snapshot())
    view.add(snapshot(generated_tokens=3))
    assert view.rates()["generated_tokens"] == 0.0


def test_a_tenant_sees_no_sums() -> None:
    view = View("http://h")
    view.add({**snapshot(), "figures": None})
    assert "KV" not in shown(view) and "nothing is cached" in shown(view)


def test_a_server_without_the_page_is_asked_for_sums_and_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        url = "http://h"

        def events(self, path: str, body: object) -> Any:
            raise BackendError("answered 404", status=404)
            yield

        def get(self, path: str) -> Any:
            if path == "/get_server_info":
                return {"model": "m", "stats": FIGURES, "cache_hit_rate_60s": 0.5}
            assert path.startswith("/cache/tree?")
            return TREE

    found = top._sample(Server())  # type: ignore[arg-type]
    assert found["figures"]["running"] == 1 and found["requests"] is None
    view = View("http://h")
    view.add(found)
    assert "1 running, 2 waiting" in shown(view)


def test_progress() -> None:
    assert progress(5, 10, width=4) == "██░░ 5 of 10"
    assert progress(20, 10, width=4) == "████ 20 of 10"
