"""The commands that talk to a server, against a real one started by `branchwise serve`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import pytest

KEY = {"BRANCHWISE_API_KEY": "the-key"}  # as the server fixture has it
QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart.py"


class Running(Protocol):
    url: str
    output: str


def branchwise(*arguments: str, stdin: str = "", key: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "branchwise", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (KEY if key else {}),
    )


def test_serve_says_what_it_does(server: Running) -> None:
    assert "weights" in server.output and "KV tokens" in server.output and "8,192" in server.output
    assert "2 (K, V) × 4 layers × 2 KV heads × 64 × 4 B" in server.output
    assert f"curl {server.url}/generate" in server.output and "the-key" not in server.output


def test_the_curl_line_works_as_printed(server: Running) -> None:
    line = next(line for line in server.output.splitlines() if "curl" in line)
    done = subprocess.run(["bash", "-c", f"{line} -sS"], capture_output=True, text=True, env=os.environ | KEY)
    assert json.loads(done.stdout)["meta_info"]["completion_tokens"] > 0, done.stderr


def test_generate_and_what_was_cached(server: Running) -> None:
    prompt = "The library is open from nine to six, except on Sundays, and books may be kept for four weeks."
    first = branchwise("generate", "--url", server.url, "--json", "--max-tokens", "4", prompt)
    again = branchwise("generate", "--url", server.url, "--json", "--max-tokens", "4", prompt, f"{prompt} And")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    (cold,), (hit, longer) = json.loads(first.stdout), json.loads(again.stdout)
    assert cold["cached_tokens"] < 16 and hit["cached_tokens"] == hit["prompt_tokens"] - 1
    assert hit["cache_reason"] == "hit" and hit["text"] == cold["text"]
    assert longer["cached_tokens"] == cold["prompt_tokens"] == longer["prompt_tokens"] - 1


def test_generate_prints_for_people(server: Running) -> None:
    done = branchwise("generate", "--url", server.url, "--max-tokens", "2", "hello", "[bold]there[/]")
    assert done.returncode == 0
    assert "hello" in done.stdout and "[bold]there[/]" in done.stdout
    assert done.stderr.count("prompt tokens") == 2


def test_tree_as_text_and_as_json(server: Running) -> None:
    branchwise(
        "generate", "--url", server.url, "--max-tokens", "1", "a tree begins with one trunk and ends in many leaves"
    )
    text = branchwise("tree", server.url)
    assert text.returncode == 0 and "tokens" in text.stdout and "a tree begins" in text.stdout
    dump = json.loads(branchwise("tree", server.url, "--json").stdout)
    assert dump["totals"]["nodes"] >= 1


def test_tree_drawn_for_a_terminal(server: Running) -> None:
    from rich.console import Console

    from branchwise.frontend.cli.tree import draw
    from branchwise.frontend.client import ServerClient

    client = ServerClient(server.url, "the-key")
    client.post(
        "/generate", {"text": "[red]a tree begins[/] with one trunk", "sampling_params": {"max_new_tokens": 20}}
    )
    dump = client.get("/cache/tree")
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(draw(dump))
    shown = console.export_text()
    assert "[red]a tree" in shown and shown.count("tokens  ") == dump["totals"]["nodes"]


def test_chat_keeps_the_conversation(server: Running) -> None:
    typed = "What is a tree?\n\n/reset\nAnd now?\nAnd then?\n/exit\nnever read\n"
    done = branchwise("chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin=typed)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("you >") == 6
    dump = branchwise("tree", server.url, "--json").stdout
    assert "<|im_start|>user" in dump  # the shipped model's own template was used


def test_bench_runs_and_writes_json(server: Running, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--workloads", "fewshot", "--scale", "0.005", "--vocab", "1300", "--out", str(out)]
    done = branchwise("bench", server.url, *options, "--json", "--stream")
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text())
    assert json.loads(done.stdout) == figures
    fewshot = figures["fewshot"]
    assert fewshot["requests"] == 2 and fewshot["failed"] == 0
    assert fewshot["prompt_tokens"] == 2 * (2048 + 64) and fewshot["output_tokens"] == 2 * 32
    assert fewshot["cached_share"] == fewshot["ideal_cached_share"] == pytest.approx(2048 / 4224, abs=1e-4)


def test_bench_fails_when_requests_do(server: Running) -> None:
    options = ["--workloads", "fewshot", "--scale", "0.005", "--vocab", "1300", "--model", "no-such-model"]
    done = branchwise("bench", server.url, *options)
    assert done.returncode == 1 and "no-such-model" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments", [["tree"], ["bench"], ["generate", "hi", "--url"]], ids=["tree", "bench", "generate"]
)
def test_a_missing_key_is_one_line(server: Running, arguments: list[str]) -> None:
    done = branchwise(*arguments, server.url, key=False)
    assert done.returncode == 1
    assert done.stderr.strip() == f"error: {server.url} wants a key: give it with --api-key"


def test_what_the_server_refuses_is_said(server: Running) -> None:
    done = branchwise("generate", "--url", server.url, "--temperature", "-1", "hi")
    assert done.returncode == 1 and "temperature" in done.stderr and "400" in done.stderr


def test_a_taken_port_is_one_line(server: Running) -> None:
    done = branchwise("serve", "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 2 and "already in use" in done.stderr and "Traceback" not in done.stderr


def test_doctor_reports_a_taken_port_and_the_model(server: Running) -> None:
    done = branchwise("doctor", "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 0, done.stdout
    for words in ("python", "torch 2.", "cannot listen on", "mend it: branchwise serve --port", "4.0 KiB"):
        assert words in done.stdout
