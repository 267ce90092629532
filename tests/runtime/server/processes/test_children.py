"""How child processes start: the scheduler's before its settings are known."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import branchwise.__main__ as command
import branchwise.frontend.cli.main as cli
from branchwise.runtime.server.processes import children


def echo(role: str, *options: str) -> subprocess.Popen[bytes]:
    """Prints what it was started with, and then what it is told."""
    code = "import sys; print(*sys.argv[1:], sys.stdin.readline().strip())"
    command = [sys.executable, "-c", code, role, *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)


def said(child: subprocess.Popen[bytes]) -> list[str]:
    assert child.stdout is not None
    with child.stdout:
        words = child.stdout.read().decode().split()
    assert child.wait(300) == 0
    return words


def test_the_first_scheduler_is_the_one_that_was_started_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_spawn", echo)
    children.start_scheduler_early()
    [early] = children._early
    tokenizer = children.start_child("tokenizer", Path("/run/1"), torch=True)
    first = children.start_child("scheduler", Path("/run/1"), torch=True)
    second = children.start_child("scheduler", Path("/run/2"), torch=True)  # of `--restart`
    null = children.start_child("scheduler", Path("/run/3"), torch=False)
    assert first is early
    assert [said(each) for each in (tokenizer, first, second, null)] == [
        ["tokenizer", "/run/1"],
        ["scheduler", "torch", "/run/1"],
        ["scheduler", "torch", "/run/2"],
        ["scheduler", "/run/3"],
    ]


def test_a_child_that_has_ended_is_left_to_its_watcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "_spawn", echo)
    children.start_scheduler_early()
    [early] = children._early
    early.kill()
    early.wait(300)
    child = children.start_child("scheduler", Path("/run/1"), torch=True)
    assert child is early and child.returncode is not None
    assert child.stdout is not None
    child.stdout.close()


def test_a_run_directory_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary directory's name need not be text."""

    def worker(role: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"{children.__package__}.worker", role, str(os.getpid())]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)

    monkeypatch.setattr(children, "_spawn", worker)
    child = children.start_child("tokenizer", Path(os.fsdecode(b"/no/\xff")), torch=False)
    assert child.stderr is not None
    with child.stderr:
        assert rb"No such file or directory: '/no/\udcff/launch.json'" in child.stderr.read()
    assert child.wait(300) == 1


@pytest.mark.parametrize("role", ["tokenizer", "detokenizer"])
def test_a_child_without_a_run_directory_leaves(role: str) -> None:
    command = [sys.executable, "-m", f"{children.__package__}.worker", role, str(os.getpid())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("arguments", "early"), [(["serve", "model"], 1), (["serve", "--help"], 0), (["chat", "serve"], 0), ([], 0)]
)
def test_only_a_command_that_serves_starts_a_scheduler(
    arguments: list[str], early: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(sys, "argv", ["branchwise", *arguments])
    monkeypatch.setattr(command, "start_scheduler_early", lambda: calls.append("scheduler"))
    monkeypatch.setattr(cli, "main", lambda: calls.append("command"))
    command.main()
    assert calls == ["scheduler"] * early + ["command"]
