"""Readers of a program that still runs, and blocking calls from where nothing may block."""

from __future__ import annotations

import threading

import pytest

import branchwise as bw
from branchwise.frontend.errors import BackendError


def test_a_branch_that_fails_ends_the_stream_of_its_run(echo):
    @bw.function
    def program(s):
        s += "x"
        fork = s.fork(1)[0]
        fork += bw.gen("b")

    with pytest.raises(bw.ProgramError, match="'b' failed on the echo: no luck"):
        list(program.stream(backend=echo(lambda prompt: BackendError("no luck"))))


def test_readers_are_woken_by_the_variable_and_by_the_programs_end(echo):
    first, last = threading.Event(), threading.Event()

    @bw.function
    def program(s):
        first.wait(200)
        s["late"] = 1
        last.wait(200)

    state = program.run(backend=echo(lambda prompt: "ok"), stream=True)
    found = []

    def read(name):
        try:
            found.append(state[name])
        except bw.ProgramError as error:
            found.append(error.message)

    late, never = (threading.Thread(target=read, args=(name,)) for name in ("late", "never"))
    late.start()
    never.start()
    assert not found
    first.set()
    late.join(100)
    assert found == [1]
    last.set()
    never.join(100)
    assert found[1:] == ["no variable 'never' has been set in this state (set so far: 'late')"]


def test_a_blocking_call_on_the_background_loop_does_not_wait_for_itself(echo):
    backend = echo(lambda prompt: "ok")

    @bw.function
    async def program(s):
        bw.flush_cache(backend)
        return "flushed"

    assert program.run(backend=backend).ret_value == "flushed"
