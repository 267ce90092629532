"""Async programs: the same language, awaited, on the caller's own loop."""

from __future__ import annotations

import asyncio
import threading

import pytest

import branchwise as bw
from branchwise.frontend.loop import Once

ANSWER = "Mira is the baker of Fernhollow. She lives next to the market square."


@bw.function
async def program(s, names):
    s += bw.system("You are a helpful assistant.")
    forks = s.fork(len(names))
    forks += lambda i: bw.user(f"Who is {names[i]}?")
    forks += bw.assistant(bw.gen("who", max_tokens=30))
    assert (await forks["who"])[0] == await forks[0]["who"]
    meta = await forks[0].meta("who")
    forks.join()
    s += bw.user("Thank you!") + bw.assistant(bw.gen("bye", max_tokens=12))
    return meta["finish_reason"]["type"], len(await s["who"])


async def test_everything_is_awaited_on_the_callers_loop(engine):
    state = await program.arun(names=["Mira", "Tobin"], temperature=0)
    assert state.ret_value == ("stop", 2)
    assert (await state["who"])[0] == ANSWER
    assert (await state.text()).endswith(f"{await state['bye']}<|im_end|>\n")
    assert (await state.messages())[-2:] == [
        {"role": "user", "content": "Thank you!"},
        {"role": "assistant", "content": await state["bye"]},
    ]
    assert await state.error() is None


def test_an_async_program_runs_from_ordinary_code_too(engine):
    state = program.run(names=["Mira"], temperature=0)
    assert state["who"] == [ANSWER]
    assert [s["who"] for s in program.run_batch([{"names": ["Mira"]}] * 3, temperature=0)] == [[ANSWER]] * 3


async def test_an_ordinary_program_runs_from_async_code_too(engine):
    @bw.function
    def plain(s, name):
        s += bw.user(f"Who is {name}?") + bw.assistant(bw.gen("who", max_tokens=30))
        return s["who"]

    state = await plain.arun("Mira", temperature=0)
    assert state.ret_value == ANSWER == await state["who"]
    states = await plain.arun_batch(["Mira", "Mira"], temperature=0, concurrency=2)
    assert [await one["who"] for one in states] == [ANSWER] * 2
    assert "".join([piece async for piece in plain.astream("Mira", temperature=0, variable="who")]) == ANSWER


async def test_streams(engine):
    pieces = [piece async for piece in program.astream(names=["Mira"], temperature=0, variable="bye")]
    assert len(pieces) > 2
    whole = [piece async for piece in program.astream(names=["Mira"], temperature=0)]
    assert "".join(whole).startswith("<|im_start|>system\nYou are")
    assert "".join(pieces) in "".join(whole)


async def test_leaving_a_stream_ends_the_program(shipped, engine):
    @bw.function
    async def endless(s):
        s += "Once upon a time" + bw.gen("a", max_tokens=4000, ignore_eos=True)

    async for _ in endless.astream():
        break
    for _ in range(3000):
        stats = shipped.stats()
        if not stats.running and not stats.waiting:
            break
        await asyncio.sleep(0.02)
    assert not shipped.stats().running


async def test_a_batch_is_bounded_in_order_and_keeps_errors(echo):
    running, most = 0, 0

    @bw.function
    async def one(s, i):
        nonlocal running, most
        running += 1
        most = max(most, running)
        s += str(i) + bw.gen("a")
        await s["a"]
        await asyncio.sleep(0.001)
        running -= 1
        if i == 3:
            raise ValueError("three")

    states = await one.arun_batch(list(range(20)), backend=echo(lambda prompt: prompt * 2), concurrency=4)
    assert [await s["a"] for i, s in enumerate(states) if i != 3] == [str(i) * 2 for i in range(20) if i != 3]
    assert isinstance((await states[3].error()).__cause__, ValueError)
    assert 1 < most <= 4


async def test_reading_what_was_never_set_and_what_failed(echo):
    @bw.function
    async def bad(s):
        s += "x" + bw.gen("a")
        await s["b"]

    with pytest.raises(bw.ProgramError, match="no variable 'b'") as caught:
        await bad.arun(backend=echo(lambda prompt: "ok"))
    assert caught.value.site.startswith(__file__)


def test_a_blocking_read_on_the_loop_is_an_error_not_a_deadlock(echo):
    backend = echo(lambda prompt: "ok")

    @bw.function
    async def confused(s):
        s += "x" + bw.gen("a")
        return bw.State(s._interpreter)["a"]

    with pytest.raises(bw.ProgramError, match="blocking read on the event loop"):
        confused.run(backend=backend)


async def test_cancelling_the_run_cancels_its_requests(echo):
    started = asyncio.Event()
    cancelled = []
    backend = echo(lambda prompt: "ok")

    async def never(handle, ask, on_delta=None):
        started.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    backend.generate = never

    @bw.function
    async def slow(s):
        s += "x" + bw.gen("a")
        await s["a"]

    task = asyncio.create_task(slow.arun(backend=backend))
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cancelled == [True]


async def test_ordinary_programs_awaited_all_at_once_get_sixty_four_threads(echo):
    lock, together, running, most = threading.Lock(), threading.Barrier(64), 0, 0

    @bw.function
    def plain(s):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        s += "x" + bw.gen("a")
        together.wait(60)
        with lock:
            running -= 1
        return s["a"]

    backend = echo(lambda prompt: "ok")
    states = await asyncio.gather(*(plain.arun(backend=backend) for _ in range(256)))
    assert [state.ret_value for state in states] == ["ok"] * 256
    assert most == 64


async def test_an_async_program_needs_no_threads(echo, threads_started):
    @bw.function
    async def many(s):
        s += "x"
        forks = s.fork(200)
        forks += bw.gen("a")
        return len(await forks["a"]), threads_started()

    count, threads = (await many.arun(backend=echo(lambda prompt: "ok"))).ret_value
    assert (count, threads) == (200, set())


async def test_what_is_made_once_is_made_again_if_its_maker_was_cancelled_or_failed():
    made = []
    begun = asyncio.Event()

    async def make():
        made.append(len(made))
        begun.set()
        await asyncio.sleep(60 if len(made) == 1 else 0)
        if len(made) == 2:
            raise KeyError("second")
        return made[-1]

    once = Once(make)
    first, *others = (asyncio.create_task(once.get()) for _ in range(4))
    await begun.wait()
    await asyncio.sleep(0)
    first.cancel()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    assert isinstance(found[0], asyncio.CancelledError)
    assert [type(one) for one in found[1:]] == [KeyError] * 3
    assert await asyncio.gather(*(once.get() for _ in range(3))) == [2, 2, 2] and made == [0, 1, 2]
