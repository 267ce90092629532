"""Branches whose client left before it had their ids: the server deletes them, as nobody else could."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

BODIES: dict[str, dict[str, Any]] = {
    "/branches": {"text": "a prompt"},
    "/branches/{trunk}/fork": {"n": 5},
    "/branches/batch": {
        "ops": [
            {"op": "create", "text": "another"},
            {"op": "fork", "id": "{trunk}", "n": 2},
            {"op": "extend", "id": "{trunk}", "text": " and more"},
            {"op": "fork", "id": "unknown"},
        ]
    },
}


KEPT = {"/branches": 1, "/branches/{trunk}/fork": 5, "/branches/batch": 3}


@pytest.mark.parametrize("path", BODIES)
def test_what_a_lost_client_made_is_deleted(start_server: Any, path: str) -> None:
    server = start_server()
    trunk = server.http.post("/branches", json={"text": "a trunk"}).json()["id"]
    url = f"{server.url}{path.format(trunk=trunk)}"
    body = json.loads(json.dumps(BODIES[path]).replace("{trunk}", trunk))
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(files.iterdir()))
    with server.stopped("scheduler"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, timeout=httpx.Timeout(60, read=0.5))
        server.until(lambda: len(list(files.iterdir())) <= before)  # the server has closed the connection
    assert server.http.get(f"/branches/{trunk}").status_code == 200  # a later operation: those before it are done
    server.until(lambda: server.http.get("/branches").json()["branches"] == 1)
    assert server.http.get(f"/branches/{trunk}").status_code == 200
    assert server.http.post(url, json=body).status_code == 200  # a client that stays has what it made
    assert server.http.get("/branches").json()["branches"] == 1 + KEPT[path]
    assert server.stop() == 0
