"""A server with a disk cache: killed, restarted, and asked again."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from branchwise.runtime.config import EngineConfig, ServerConfig

PROMPT = [(7 * i + i * i) % 60 + 3 for i in range(90)]


def config(model: Path, folder: Path) -> ServerConfig:
    engine = EngineConfig(model=str(model), device="cpu", max_model_len=256, host_cache="4MiB", disk_cache=str(folder))
    return ServerConfig(engine=engine, port=0, api_key="key")


def ask(server: Any, **more: Any) -> dict[str, Any]:
    body = {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}}
    answer = server.http.post("/generate", json=body | more)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_restarted_server_answers_from_the_disk(
    start_server: Any, checkpoint: Callable[[str], Path], tmp_path: Path, end: str
) -> None:
    """A prompt that was asked twice is on the disk soon. The key's namespace is the same after the restart."""
    with start_server(config(checkpoint("llama-gqa"), tmp_path)) as server:
        first, second = ask(server), ask(server)
        assert second["meta_info"]["cache"]["hit_tokens"] == 89 and "tiers" not in second["meta_info"]["cache"]
        ask(server, cache_salt="a secret")
        ask(server, cache_salt="a secret")
        server.until(lambda: server.metrics()["disk_cache_pages_cached"] >= 5)
        if end == "killed":
            for pid in [server.process.pid, *server.pids.values()]:
                with contextlib.suppress(ProcessLookupError):  # children end when their parent has
                    os.kill(pid, signal.SIGKILL)
            server.process.wait()
            server.stop = lambda: 0
        else:
            check_operator_routes(server)
    with start_server(config(checkpoint("llama-gqa"), tmp_path)) as server:
        explained = server.http.post("/cache/explain", json={"prompt": PROMPT}).json()
        assert explained["hit_tokens"] == 0 and explained["reason"] == "tier"
        assert explained["tiers"]["disk"] >= 80
        again = ask(server)
        assert again["text"] == first["text"]
        cache = again["meta_info"]["cache"]
        assert cache["tiers"]["disk"] == cache["hit_tokens"] >= 80
        salted = ask(server, cache_salt="a secret")["meta_info"]["cache"]
        assert salted["hit_tokens"] == 0, "salts never leave memory"
        server.idle()  # statistics come by another way than answers
        assert server.metrics()["disk_cached_tokens_total"] >= 80


def check_operator_routes(server: Any) -> None:
    """A prompt is saved, pruned and loaded; what cannot be done is refused with the reason."""
    post = server.http.post
    saved = post("/cache/save", json={"input_ids": PROMPT, "file": "system.cache"}).json()
    assert saved == {"file": "system.cache", "tokens": 80, "pages": 5}
    listed = server.http.get("/cache/list").json()
    assert [each["file"] for each in listed["files"]] == ["system.cache"]
    assert listed["tiers"]["disk"]["cached"] >= 5
    assert post("/cache/verify").json()["damaged_pages"] == 0
    assert post("/cache/prune", json={"size": "0"}).json()["pages"] == 0
    assert post("/cache/load", json={"file": "system.cache"}).json() == {"pages": 5, "added_pages": 5}
    for path, body, problem in (
        ("/cache/load", {"file": "../system.cache"}, "file must be a name"),
        ("/cache/load", {"file": "another"}, "there is no file another"),
        ("/cache/save", {"input_ids": PROMPT[::-1], "file": "x"}, "prompt is not cached to its end"),
        ("/cache/save", {"input_ids": PROMPT[:5], "file": "x"}, "prompt must have at least one page"),
        ("/cache/prune", {"size": "much"}, "size must be a size"),
    ):
        answer = post(path, json=body)
        assert answer.status_code == 400 and problem in answer.json()["error"]["message"], answer.text
