"""``branchwise chat`` on a terminal: what can be typed, line editing, history, and what an answer cost."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time

import pytest

from branchwise.frontend.cli import chat

pytest.importorskip("readline")


class Terminal:
    def __init__(self, *command: str) -> None:
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", COLUMNS="200")
            os.execv(sys.executable, [sys.executable, "-m", "branchwise", *command])
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def wait_for(self, text: str, times: int = 1) -> None:
        deadline = time.monotonic() + 120
        while self.shown.count(text) < times:
            assert time.monotonic() < deadline, self.shown
            if select.select([self._fd], [], [], 0.2)[0]:
                self.shown += os.read(self._fd, 4096).decode("utf-8", "replace")

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_a_chat_on_a_terminal() -> None:
    chat = Terminal("chat", "--temperature", "0", "--max-tokens", "30", "--device", "cpu")
    chat.wait_for("you >")
    assert "type a message, /help for commands, Ctrl-D to leave" in chat.shown
    chat.type("Who is Mora\x1b[D\x1b[D\x7fi\n")  # two to the left, the o becomes an i
    chat.wait_for("you >", 2)
    assert "Mira is the baker of Fernhollow." in chat.shown
    assert re.search(
        r"\d+ tokens, [\d.]+ tokens/s, first after [\d.]+ s; 0 of \d+ prompt tokens were cached", chat.shown
    )
    chat.type("\x1b[A\n")  # the last line once more
    chat.wait_for("you >", 3)
    again = chat.shown.split("you >")[2]
    assert "Who is Mira" in again and re.search(r"[1-9]\d* of \d+ prompt tokens were cached", again)
    chat.type('"""Read this:\nBruno lives in Milford.\nWhere does Bruno live?"""\n')
    chat.wait_for("you >", 4)
    assert "..." in chat.shown and "Bruno lives in Milford." in chat.shown.split("Where does Bruno live?")[-1]
    chat.type("\x04")
    assert chat.exit_code() == 0


@pytest.mark.parametrize(
    ("typed", "messages"),
    [
        (["one", "two"], ["one", "two"]),
        (["one \\", "  two", "three"], ["one \n  two", "three"]),
        (['"""one', "", "  two", '"""', "three"], ["one\n\n  two", "three"]),
        (['"""one"""', '"""', "two", 'three"""'], ["one", "two\nthree"]),
        (["", "/help"], ["", "/help"]),
    ],
)
def test_a_message_may_have_several_lines(
    monkeypatch: pytest.MonkeyPatch, typed: list[str], messages: list[str]
) -> None:
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert [chat._message("", "") for _ in messages] == messages
    assert next(lines, None) is None
