"""What programs do wrong is told at the line, and what they do at once stays apart."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import branchwise as bw
from branchwise.frontend.errors import BackendError


def line_of(text: str) -> str:
    lines = open(__file__).read().splitlines()  # noqa: PTH123, SIM115
    (number,) = [i for i, line in enumerate(lines, 1) if line.rstrip().endswith("# " + text)]
    return f"{__file__}:{number}"


def ok(prompt: str) -> str:
    return "ok"


# -- bad programs ------------------------------------------------------------------------------------------------------


def test_reading_a_variable_never_set(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        return s["b"]  # never set

    with pytest.raises(
        bw.ProgramError, match=r"no variable 'b' has been set in this state \(set so far: 'a'\)"
    ) as caught:
        program.run(backend=echo(ok))
    assert caught.value.site == line_of("never set")


def test_an_unknown_argument_is_an_error_at_the_call(echo):
    with pytest.raises(TypeError, match="temprature"):
        bw.gen("a", temprature=1)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        bw.gen("a", temperature=-1)
    with pytest.raises(ValueError, match="top_p must be greater than 0"):
        bw.gen("a", top_p=0)
    with pytest.raises(ValueError, match="dtype must be int"):
        bw.gen("a", dtype=list)
    with pytest.raises(ValueError, match="exclude each other"):
        bw.gen("a", regex="x", dtype=int)
    with pytest.raises(ValueError, match="not JSON"):
        bw.gen("a", json_schema="{")
    with pytest.raises(ValueError, match="list of choices"):
        bw.select("a", "yes")

    @bw.function
    def program(s, question):
        s += question

    with pytest.raises(TypeError, match="program: got an unexpected keyword argument 'questoin'"):
        program.run("?", questoin="?", backend=echo(ok))
    with pytest.raises(TypeError, match="missing a required argument: 'question'"):
        program.run(backend=echo(ok))
    with pytest.raises(TypeError, match="no argument 'answer'"):
        program.bind(answer=1)
    with pytest.raises(TypeError, match="not object"):

        @bw.function
        def other(s):
            s += object()

        other.run(backend=echo(ok))


def test_a_plus_without_its_equals_sign_is_told_what_to_write(echo):
    """It would append to nothing, and the program go on without the text."""
    backend = echo(ok)
    for what in ("text", bw.gen("a"), bw.user("x")):

        @bw.function
        def program(s, what=what):
            s + what

        with pytest.raises(TypeError, match=r"write s \+= \.\.\."):
            program.run(backend=backend)


def test_a_fork_of_a_failed_state(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")  # what failed
        assert s.error() is not None
        s.fork(2)  # the fork

    with pytest.raises(bw.ProgramError, match=r"forked from one that failed.*no room") as caught:
        program.run(backend=echo(lambda prompt: BackendError("no room")))
    assert caught.value.site == line_of("the fork")
    assert line_of("what failed") in str(caught.value)


def test_a_fork_of_a_state_that_fails_later(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        forks = s.fork(2)
        forks += bw.gen("b")
        return forks[1]["b"]

    with pytest.raises(bw.ProgramError, match=r"forked from one that failed.*no room"):
        program.run(backend=echo(lambda prompt: BackendError("no room")))


def test_a_cycle_in_join(echo):
    @bw.function
    def program(s):
        s += "x"
        a, b = s.fork(2)
        a.join([b])
        b2 = a.fork(1)[0]
        b2.join([a])  # a waits for b, which is fine
        s.join([s])  # itself

    with pytest.raises(bw.ProgramError, match="a cycle in join") as caught:
        program.run(backend=echo(ok))
    assert caught.value.site == line_of("itself")


def test_two_states_that_join_each_other(echo):
    started = threading.Event()

    def slow(prompt):
        started.wait(200)
        return "ok"

    @bw.function
    def program(s):
        a, _ = s.fork(2)
        a += "x" + bw.gen("y")
        c = a.fork(1)[0]
        a.join([c])
        try:
            c.join([a])
        finally:
            started.set()

    with pytest.raises(bw.ProgramError, match="joined or closed"):
        program.run(backend=echo(slow))


def test_a_joined_state_takes_no_more(echo):
    @bw.function
    def program(s):
        forks = s.fork(2)
        forks += "x" + bw.gen("a")
        forks.join()
        assert s["a"] == ["ok", "ok"]
        forks[0] += "more"

    with pytest.raises(bw.ProgramError, match="joined or closed"):
        program.run(backend=echo(ok))


def test_turns_must_nest(echo):
    @bw.function
    def program(s):
        s += bw.user_begin()
        s += bw.assistant("hello")  # inside

    with pytest.raises(bw.ProgramError, match="'assistant' cannot begin inside one of 'user'") as caught:
        program.run(backend=echo(ok))
    assert caught.value.site == line_of("inside")


@pytest.mark.parametrize("manager", ["scope", "role", "copy"])
def test_a_failure_inside_a_context_manager_is_told_at_the_programs_line(echo, manager):
    @bw.function
    def program(s):
        if manager == "scope":
            with s.var_scope("x"):  # scope
                pass
        elif manager == "role":
            with s.role("user"):  # role
                pass
        else:
            with s.copy():  # copy
                pass
        s.sync()

    class Broken(echo):
        async def create(self):
            raise BackendError("no room")

    with pytest.raises(bw.ProgramError, match="no room") as caught:
        program.run(backend=Broken(ok))
    assert line_of(manager) in str(caught.value)


def test_an_empty_prompt(echo):
    @bw.function
    def program(s):
        s += bw.gen("a")

    with pytest.raises(bw.ProgramError, match="prompt is empty"):
        program.run(backend=echo(ok))


def test_no_backend():
    @bw.function
    def program(s):
        s += "x"

    with pytest.raises(bw.BackendError, match="set_default_backend"):
        program.run()


def test_a_value_that_is_not_of_its_dtype(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a", dtype=int)

    backend = echo(lambda prompt: "12 or so", constraints=frozenset({"regex"}))
    with pytest.raises(bw.ProgramError, match="not a complete int: '12 or so'"):
        program.run(backend=backend)


def test_an_exception_of_the_program_ends_what_it_started(echo):
    waiting, cancelled = threading.Event(), []
    backend = echo(ok)
    generate = backend.generate

    async def never(handle, ask, on_delta=None):
        waiting.set()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return await generate(handle, ask, on_delta)

    backend.generate = never

    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        waiting.wait(200)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        program.run(backend=backend)
    assert cancelled == [True]


def test_a_batch_keeps_exceptions_with_their_item(echo):
    @bw.function
    def program(s, i):
        s += f"{i}" + bw.gen("a")
        if i == 1:
            raise KeyError("mine")
        return i

    backend = echo(lambda prompt: BackendError("no room") if prompt == "2" else "ok")
    states = program.run_batch([{"i": i} for i in range(4)], backend=backend)
    assert [state.error() is None for state in states] == [True, False, False, True]
    assert states[0]["a"] == states[3]["a"] == "ok"
    assert isinstance(states[1].error().__cause__, KeyError)
    assert [states[0].ret_value, states[3].ret_value] == [0, 3]
    for failed, why in ((states[1], "mine"), (states[2], "no room")):
        with pytest.raises(bw.ProgramError, match=why):
            failed.ret_value  # noqa: B018 - it raises
    with pytest.raises(bw.ProgramError, match="no room"):
        states[2]["a"]


def test_a_state_that_failed_does_not_lose_what_it_had(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        s += "!" + bw.gen("b")
        assert s["a"] == "ok"
        with pytest.raises(bw.ProgramError, match="no room"):
            s.text()

    program.run(backend=echo(lambda prompt: BackendError("no room") if "!" in prompt else "ok"))


def test_appending_never_blocks(echo):
    go = threading.Event()

    def slow(prompt):
        assert go.wait(200), "the program waits for a generation"
        return "ok"

    @bw.function
    def program(s):
        s += "x" + bw.gen("a") + bw.gen("b")
        forks = s.fork(3)
        forks += bw.gen("c")
        forks.join()
        s += bw.gen("d")
        go.set()
        assert s["c"] == ["ok"] * 3 and s["d"] == "ok"

    program.run(backend=echo(slow))


# -- nothing waits for ever --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["its own state", "a branch"])
def test_a_program_that_follows_all_of_what_it_writes_is_an_error_not_a_deadlock(echo, which):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        fork = s.fork(1)[0]
        fork += bw.gen("b")
        assert "".join(fork.text_iter("b")) == "ok"
        list((s if which == "its own state" else fork).text_iter())  # follows

    state = program.run(backend=echo(ok), stream=True)
    with pytest.raises(bw.ProgramError, match="name a variable, or read") as caught:
        list(state.text_iter())
    assert caught.value.site == line_of("follows")


def test_who_follows_a_program_that_fails_is_told_why(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        fork = s.fork(1)[0]
        s.set("fork", fork)
        fork += bw.gen("b")
        s["zz"]  # was never set

    backend = echo(ok)
    generate = backend.generate

    async def slow(*args, **options):
        await asyncio.sleep(0.05)
        return await generate(*args, **options)

    backend.generate = slow
    state = program.run(backend=backend, stream=True)
    for follow in (lambda: list(state.text_iter()), lambda: list(state.text_iter("a")), lambda: state["a"]):
        with pytest.raises(bw.ProgramError, match="no variable 'zz'") as caught:
            follow()
        assert caught.value.site == line_of("was never set")
    with pytest.raises(bw.ProgramError, match=r"forked from one that failed.*no variable 'zz'"):
        state["fork"]["b"]


def test_a_variable_that_is_not_written_by_the_model_has_nothing_to_follow(echo):
    @bw.function
    def program(s):
        s += "x" + bw.gen("a")
        s["mine"] = 3

    state = program.run(backend=echo(ok), stream=True)
    with pytest.raises(bw.ProgramError, match="does not write 'mine': read it"):
        list(state.text_iter("mine"))
    with pytest.raises(bw.ProgramError, match="stream=True"):
        list(program.run(backend=echo(ok)).text_iter())


def test_reading_a_run_that_goes_on_waits_for_it(echo):
    @bw.function
    def program(s, fail=False):
        time.sleep(0.05)
        if fail:
            raise KeyError("mine")
        s += "x" + bw.gen("a")
        time.sleep(0.05)
        s += "y" + bw.gen("b")
        return 7

    backend = echo(ok)
    for read, found in (
        (lambda s: s["a"], "ok"),
        (lambda s: s.meta("b")["finish_reason"]["type"], "stop"),
        (lambda s: s.text(), "xokyok"),
        (lambda s: s.messages(), []),
        (lambda s: s.error(), None),
        (lambda s: s.ret_value, 7),
    ):
        assert read(program.run(backend=backend, stream=True)) == found
    with pytest.raises(bw.ProgramError, match="KeyError: 'mine'"):
        program.run(True, backend=backend, stream=True)["a"]


def test_states_of_another_run_are_not_joined(echo):
    @bw.function
    def other(s):
        s += "x"
        return s.fork(1)[0]

    @bw.function
    def program(s, stranger):
        s.join([stranger])  # a stranger

    stranger = other.run(backend=echo(ok)).ret_value
    with pytest.raises(bw.ProgramError, match="another run") as caught:
        program.run(stranger, backend=echo(ok))
    assert caught.value.site == line_of("a stranger")


def test_a_turn_ends_also_where_an_exception_leaves_it(echo):
    @bw.function
    def program(s):
        with contextlib.suppress(KeyError), s.user():
            s += "Hi"
            raise KeyError
        s += bw.assistant("Hello")
        return s.messages()

    messages = program.run(backend=echo(ok)).ret_value
    assert messages == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_callbacks_of_library_programs_may_call_library_programs(echo):
    """More of them at once than asyncio's own pool has threads: none waits for the thread of another."""

    @bw.function
    def program(s):
        s += "x"

        def propose(fork):
            bw.best_of(fork, 2, bw.gen("a"), score=lambda branch: len(branch["a"]))

        return len(bw.search(s, propose, lambda fork: 1.0, beam=40, depth=1, branches=40))

    assert program.run(backend=echo(ok)).ret_value == 40


def test_a_forked_process_runs_programs_of_its_own():
    code = (
        "import os, sys, branchwise as bw\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from conftest import Echo\n"
        "@bw.function\n"
        "def program(s):\n"
        "    s += 'x' + bw.gen('a')\n"
        "print(program.run(backend=Echo(str))['a'], flush=True)\n"
        "if os.fork() == 0:\n"
        "    print(program.run(backend=Echo(str))['a'], flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "x\nx\n"), done.stderr
