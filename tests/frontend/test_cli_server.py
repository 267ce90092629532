"""The commands that talk to a server, against a real one started by `branchwise serve`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
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
        timeout=240,
        env=os.environ | (KEY if key else {}),
    )


def test_serve_says_what_it_does(server: Running) -> None:
    assert "weights" in server.output and "KV tokens" in server.output and "8,192" in server.output
    assert re.search(r"2 \(K, V\) × 8 layers × 2 KV heads × 64 × (2 B \(bfloat16|4 B \(float32)\)", server.output)
    assert f"curl {server.url}/v1/chat/completions" in server.output and "the-key" not in server.output


def test_a_server_at_work_says_so_in_its_log() -> None:
    arguments = ["serve", "--port", "0", "--kv-cache-tokens", "8192", "--stats-log-seconds", "0.05"]
    command = [sys.executable, "-m", "branchwise", *arguments]
    wide = os.environ | {"COLUMNS": "200"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=wide)
    assert process.stdout is not None
    url = next(found[1] for line in process.stdout if (found := re.search(r"ready at (http://\S+)", line)))
    body = {"prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": True}
    done = httpx.post(f"{url}/v1/completions", json=body, timeout=240)
    process.terminate()
    _, log = process.communicate(timeout=240)
    assert done.status_code == 200, done.text
    assert re.search(r"1 running, 0 waiting; [\d.,]+ tokens/s generated; prompts [\d.,]+ tokens/s", log), log


def test_a_log_of_json_has_nothing_else_and_a_line_a_request() -> None:
    arguments = ["serve", "--port", "0", "--kv-cache-tokens", "8192", "--log-format", "json", "--log-requests"]
    command = [sys.executable, "-m", "branchwise", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found: list[dict[str, Any]] = []
    for line in process.stderr:
        found.append(json.loads(line))
        if found[-1]["message"].startswith("ready at"):
            break
    url = found[-1]["url"]
    good = branchwise("generate", "--url", url, "--max-tokens", "5", "Once upon a time", key=False)
    bad = branchwise("generate", "--url", url, "--temperature", "-1", "Once upon a time", key=False)
    process.terminate()
    out, log = process.communicate(timeout=240)
    assert (good.returncode, bad.returncode, out) == (0, 1, ""), (good.stderr, bad.stderr, out)
    requests = [each for each in map(json.loads, log.splitlines()) if each.get("path") == "/generate"]
    assert [each["status"] for each in requests] == [200, 400]
    assert requests[0]["prompt_tokens"] > 0 and requests[0]["completion_tokens"] == 5
    assert requests[1]["param"] == "sampling_params.temperature"
    assert "Once upon" not in log


def descendants(pid: int) -> Iterator[int]:
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield child
            yield from descendants(child)


def test_a_log_of_json_is_json_with_two_ranks_and_when_one_is_killed() -> None:
    arguments = ["serve", "--port", "0", "--kv-cache-tokens", "2048", "--device", "cpu", "--log-format", "json"]
    command = [sys.executable, "-m", "branchwise", *arguments, "--tensor-parallel-size", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    found: list[dict[str, Any]] = []
    for line in process.stderr:
        found.append(json.loads(line))
        if found[-1]["message"].startswith("ready at"):
            break
    (rank,) = (pid for pid in descendants(process.pid) if b"rank_worker" in Path(f"/proc/{pid}/cmdline").read_bytes())
    os.kill(rank, signal.SIGKILL)
    out, log = process.communicate(timeout=240)
    assert process.returncode == 1 and out == ""
    said = [json.loads(line) for line in log.splitlines()]
    assert any("rank 1 was killed by signal 9" in each["message"] for each in said), log


def test_a_server_that_cannot_start_says_so_in_json() -> None:
    done = branchwise("serve", "/no/such/folder", "--log-format", "json")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = map(json.loads, done.stderr.splitlines())
    assert line["level"] == "error" and "/no/such/folder: not a folder" in line["message"]


def test_top_shows_the_load_the_requests_and_the_tree(server: Running) -> None:
    done = branchwise("generate", "--url", server.url, "--max-tokens", "3", "A village by the river had a baker")
    assert done.returncode == 0, done.stderr
    shown = branchwise("top", server.url, "--once")
    assert shown.returncode == 0, shown.stderr
    assert f"at {server.url}" in shown.stdout and "running, 0 waiting" in shown.stdout
    assert "KV " in shown.stdout and "no requests at the moment" in shown.stdout and "A village" in shown.stdout
    found = json.loads(branchwise("top", server.url, "--json").stdout)
    assert found["figures"]["generated_tokens"] >= 3 and found["rates"]["generated_tokens"] == 0
    assert found["requests"] == [] and found["tree"]["namespaces"]


def test_the_curl_line_works_as_printed(server: Running) -> None:
    line = next(line for line in server.output.splitlines() if "curl" in line)
    done = subprocess.run(["bash", "-c", f"{line} -sS"], capture_output=True, text=True, env=os.environ | KEY)
    assert json.loads(done.stdout)["usage"]["completion_tokens"] > 0, done.stderr


def test_generate_and_what_was_cached(server: Running) -> None:
    prompt = "The library is open from nine to six, except on Sundays, and books may be kept for four weeks"
    first = branchwise("generate", "--url", server.url, "--json", "--max-tokens", "4", prompt)
    again = branchwise("generate", "--url", server.url, "--json", "--max-tokens", "4", prompt, f"{prompt} And")
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    (cold,), (hit, longer) = json.loads(first.stdout), json.loads(again.stdout)
    assert cold["cached_tokens"] < 16 and hit["cached_tokens"] == hit["prompt_tokens"] - 1
    assert hit["cache_reason"] == "hit" and hit["text"] == cold["text"]
    assert longer["cached_tokens"] == cold["prompt_tokens"] < longer["prompt_tokens"]


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
    assert text.stdout.endswith(" tokens a page\n")
    dump = json.loads(branchwise("tree", server.url, "--json").stdout)
    assert dump["totals"]["nodes"] >= 1
    branchwise("generate", "--url", server.url, "--max-tokens", "1", "another prompt altogether")
    least = json.loads(branchwise("tree", server.url, "--json", "--max-nodes", "1").stdout)
    assert len(least["namespaces"]) == 1 and len(least["namespaces"][0]["children"]) <= 1 < least["totals"]["nodes"]
    assert " more" in branchwise("tree", server.url, "--max-nodes", "1").stdout


def test_an_answer_with_nothing_in_it_names_the_chat_template(server: Running) -> None:
    done = branchwise("generate", "--url", server.url, "Who is Mira?")
    assert done.returncode == 0 and done.stdout.strip() == ""
    assert "chat template" in done.stderr and "branchwise chat" in done.stderr


def test_tree_drawn_for_a_terminal(server: Running) -> None:
    from rich.console import Console

    from branchwise.frontend.cli.tree import draw
    from branchwise.frontend.client import Client

    client = Client(server.url, "the-key")
    client.post(
        "/generate", {"text": "[red]a tree begins[/] with one trunk", "sampling_params": {"max_new_tokens": 20}}
    )
    dump = client.get("/cache/tree")
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(draw(dump))
    shown = console.export_text()
    nodes = re.findall(r"─ [\d,]+ tokens?(?:, \d+ leases?)?(?:, \d+ hits?)?  ['\"]", shown)
    assert "[red]a tree" in shown and len(nodes) == dump["totals"]["nodes"]


def test_chat_keeps_the_conversation(server: Running) -> None:
    typed = "What is a tree?\n\n/reset\nAnd now?\nAnd then?\n/exit\nnever read\n"
    done = branchwise("chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin=typed)
    assert done.returncode == 0, done.stderr
    assert "you >" not in done.stdout and len(done.stdout.strip().splitlines()) >= 3  # no prompts in a pipe
    dump = branchwise("tree", server.url, "--json").stdout
    assert "<|im_start|>user" in dump  # the shipped model's own template was used


def test_chat_outlives_a_turn_that_cannot_be_answered(server: Running) -> None:
    long = "a tree of words " * 2000  # more than the model's 4,352 tokens
    typed = f"What is a tree?\n{long}\n/help\n/nosuch\nAnd then?\n"
    done = branchwise("chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin=typed)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1 and "4,352" in done.stderr and "/reset starts over" in done.stderr
    assert done.stdout.count("/exit") == 2 and "/nosuch" in done.stderr
    plain = branchwise(
        "chat", "--url", server.url, "--max-tokens", "6", "--temperature", "0", stdin="What is a tree?\nAnd then?\n"
    )
    said = [line for line in done.stdout.splitlines() if not line.startswith(("/", "Ctrl-C", '"""'))]
    assert said == plain.stdout.splitlines()  # the turn left nothing behind


def test_chat_asks_for_no_more_than_fits(server: Running) -> None:
    done = branchwise("chat", "--url", server.url, "--max-tokens", "5000", "--seed", "3", stdin="Hello\n/reset\n")
    assert done.returncode == 0 and done.stderr == ""


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
    assert done.returncode == 1 and "{" not in done.stderr
    assert done.stderr.startswith("error: every request of the warm-up failed: HTTP 404: model 'no-such-model'")
    assert len(done.stderr.splitlines()) == 1


def test_bench_asks_the_server_what_it_can_take(server: Running) -> None:
    options = ["--workloads", "best_of_n,fewshot", "--scale", "0.005", "--json"]
    done = branchwise("bench", server.url, *options)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["fewshot"]
    assert "best_of_n: left out, it needs 8,448 tokens a request, the server takes 4,352" in done.stderr
    alone = branchwise("bench", server.url, "--workloads", "best_of_n")
    assert alone.returncode == 1 and "no workload is left" in alone.stderr


@pytest.mark.parametrize(
    "arguments", [["tree"], ["bench"], ["generate", "hi", "--url"]], ids=["tree", "bench", "generate"]
)
def test_a_missing_key_is_one_line(server: Running, arguments: list[str]) -> None:
    done = branchwise(*arguments, server.url, key=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip() == f"error: {server.url} requires an API key: give it with --api-key or BRANCHWISE_API_KEY"
    )


def test_a_wrong_key_is_refused_not_asked_for(server: Running) -> None:
    done = branchwise("tree", server.url, "--api-key", "another")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {server.url} refused this key")


def test_what_the_server_refuses_is_said(server: Running) -> None:
    done = branchwise("generate", "--url", server.url, "--temperature", "-1", "hi")
    assert done.returncode == 1 and "--temperature" in done.stderr and "400" in done.stderr
    long = branchwise("generate", "--url", f"{server.url}/v1", "--max-tokens", "5000", "hi")
    assert long.returncode == 1 and "prompt" in long.stderr and "--max-tokens 5000" in long.stderr
    assert "text" not in long.stderr.replace("context", "") and "max_new_tokens" not in long.stderr


def test_a_taken_port_is_one_line(server: Running) -> None:
    done = branchwise("serve", "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 2 and "already in use" in done.stderr and "Traceback" not in done.stderr


def test_doctor_reports_a_taken_port_and_the_model(server: Running) -> None:
    done = branchwise("doctor", "--port", server.url.rsplit(":", 1)[1])
    assert done.returncode == 0, done.stdout
    for words in ("python", "torch 2.", "cannot listen on", "fix it: branchwise serve --port", "8 layers × 2 KV heads"):
        assert words in done.stdout
