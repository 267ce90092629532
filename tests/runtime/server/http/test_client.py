"""The engine client alone: what it sends, what it remembers, and whom it wakes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from branchwise.runtime.errors import EngineDead, InvalidRequest, Overloaded, TimedOut
from branchwise.runtime.messages import (
    Abort,
    BranchOp,
    BranchRun,
    Control,
    ControlReply,
    Delta,
    Finished,
    Generate,
    Limits,
    Message,
    Refusal,
)
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http import engine_client
from branchwise.runtime.server.http.engine_client import ENDS, EngineClient
from branchwise.runtime.server.http.plumbing.errors import ClientGone, describe
from branchwise.runtime.server.http.plumbing.failures import KEY_QUEUE, TIMED_OUT, Failure
from branchwise.runtime.server.http.plumbing.metrics import Metrics

TWO = Generate([], SamplingParams(n=2), text="hello")
ONE = Generate([], SamplingParams(), tokens=b"\1\0\0\0")


def end(id: int, reason: str = "length", **fields: object) -> Delta:
    return Delta(id, finish=Finished(id, reason, **fields))  # type: ignore[arg-type]


def test_ids_are_ours_and_never_repeat(client: EngineClient, sent: list[Message]) -> None:
    first, second = client.open([TWO, ONE]), client.open([ONE])
    submits = [message for message in sent if isinstance(message, Generate)]
    assert [message.ids for message in submits] == [[1, 2], [3], [4]]
    assert (list(first.ids), list(second.ids)) == ([1, 2, 3], [4])


async def test_batches_in_order_then_the_end(client: EngineClient) -> None:
    call = client.open([TWO])
    waiting = asyncio.create_task(call.batch())
    await asyncio.sleep(0)
    client.deliver([Delta(2, "b"), Delta(1, "a")])
    assert [(i, delta.text) for i, delta in await waiting] == [(1, "b"), (0, "a")]
    client.deliver([end(1)])
    client.deliver([end(2)])
    assert [i for i, _ in await call.batch()] == [0, 1]
    assert await call.batch() == []
    assert client.in_flight == 0


@pytest.mark.parametrize("frames", [1, 3, 3 * ENDS])
async def test_sockets_are_read_between_the_ends_of_many_requests(frames: int) -> None:
    client = EngineClient(lambda _: None, lambda _: None, 3 * ENDS, Metrics())
    client.ready(Limits(100, 100, 100))
    calls = [client.open([ONE]) for _ in range(3 * ENDS)]
    client.deliver([Delta(call.ids.start, "a") for call in calls])
    for i in range(frames):
        client.deliver([end(call.ids.start) for call in calls[i::frames]])
    finished: list[int] = []
    while client.in_flight:
        await asyncio.sleep(0)  # one iteration of the event loop
        finished.append(sum(call.finished for call in calls))
    assert finished == [2 * ENDS, 3 * ENDS]  # and `ENDS` at once
    for call in calls:
        assert [(delta.text, delta.finish is None) for _, delta in await call.all()] == [("a", True), ("", False)]


async def test_a_fault_in_one_request_does_not_hold_up_the_others(client: EngineClient) -> None:
    first, second = client.open([ONE]), client.open([ONE])

    def push(_delta: Delta) -> None:
        raise RuntimeError("a fault")

    first.push = push  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        client.deliver([end(first.ids.start), end(second.ids.start)])
    await asyncio.wait_for(second.all(), 60)
    third = client.open([ONE])
    client.deliver([end(third.ids.start)])
    assert len(await asyncio.wait_for(third.all(), 60)) == 1


async def test_all_wakes_once(client: EngineClient) -> None:
    call = client.open([TWO])
    waiting = asyncio.create_task(call.all())
    await asyncio.sleep(0)
    client.deliver([Delta(1, "a")])
    client.deliver([end(1), Delta(2, "b")])
    await asyncio.sleep(0)
    assert not waiting.done()
    client.deliver([end(2)])
    assert len(await waiting) == 4


async def test_leaving_aborts_what_is_open_and_waits_for_the_engine(client: EngineClient, sent: list[Message]) -> None:
    with client.open([TWO, ONE]):
        client.deliver([end(2)])
        sent.clear()
    assert sent == [Abort(1), Abort(3)]
    assert client.in_flight == 2, "the engine has not let go of them yet"
    client.abandon([1, 3])
    assert len(sent) == 2, "an abort is sent once"
    client.deliver([end(1, "abort"), end(3, "abort")])
    assert client.in_flight == 0


async def test_one_failure_fails_the_call(client: EngineClient, sent: list[Message]) -> None:
    with pytest.raises(InvalidRequest) as failed, client.open([TWO]) as call:
        client.deliver([end(1, "error", error=Refusal("prompt", "is bad"))])
        await call.all()
    assert (failed.value.message, failed.value.path, failed.value.status) == ("prompt is bad", "prompt", 400)
    assert sent[-1] == Abort(2)


def test_the_queue_is_bounded(client: EngineClient) -> None:
    calls = [client.open([TWO]) for _ in range(4)]
    with pytest.raises(Overloaded, match="limit of 8"):
        client.open([ONE])
    calls[0].close()
    with pytest.raises(Overloaded):
        client.open([ONE])  # the client left, the engine still holds them
    client.deliver([end(1, "abort"), end(2, "abort")])
    client.open([TWO])


def example(failure: Failure) -> tuple[str | None, str]:
    [one] = failure.examples
    return one.code, one.message


def said(error: Exception) -> tuple[str, str]:
    """Code and message, as a client gets them."""
    _, body = describe(error)
    return body["error"]["code"], body["error"]["message"]


def test_one_key_does_not_fill_the_queue(sent: list[Message]) -> None:
    client = EngineClient(sent.extend, sent.extend, 8, Metrics(), max_requests_per_key=3)
    client.ready(Limits(400, 512, 1024))

    def of(owner: str, n: int = 1) -> Generate:
        return Generate([], SamplingParams(n=n), text="hello", namespace=(owner, "any salt"))

    client.open([of("a", 2)])
    with pytest.raises(InvalidRequest, match=r"this key has 2 unfinished .* limit of 3") as refused:
        client.open([of("a"), of("a")])
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    assert said(refused.value) == example(KEY_QUEUE)
    run = BranchRun([], "branch", ("a", ""), SamplingParams())
    client.open_run(run, 1)
    with pytest.raises(InvalidRequest):
        client.open_run(run, 1)
    client.open([of("b", 3)])
    with pytest.raises(Overloaded):
        client.open([of("c", 3)])
    client.deliver([end(id) for id in (1, 2, 4)])
    client.open([of("a", 2)])
    with pytest.raises(InvalidRequest):
        client.open([of("a")])


def test_what_cannot_be_sent_is_not_waited_for(sent: list[Message]) -> None:
    def send(messages: Sequence[Message]) -> None:
        sent.extend(messages)
        if any(isinstance(message, (Generate, BranchRun)) for message in messages):
            raise OverflowError("can't serialize ints > 2**64 - 1")

    client = EngineClient(send, send, 8, Metrics(), max_requests_per_key=8)
    client.ready(Limits(400, 512, 1024))
    for _ in range(10):
        with pytest.raises(OverflowError):
            client.open([TWO], ["label"])
        with pytest.raises(OverflowError):
            client.open_run(BranchRun([], "branch", ("", ""), SamplingParams()), 1, "label")
    assert client.in_flight == 0
    assert client.abort("label") == 0


async def test_past_its_time_a_call_is_aborted_once_whether_or_not_anybody_waits(sent: list[Message]) -> None:
    client = EngineClient(sent.extend, sent.extend, 8, Metrics(), request_timeout=0.02)
    client.ready(Limits(400, 512, 1024))
    with pytest.raises(TimedOut, match=r"within the 0\.02 s") as refused, client.open([TWO]) as call:
        client.deliver([Delta(1, "a"), end(2)])
        assert len(await call.batch()) == 2
        sent.clear()
        await call.batch()
    assert sent == [Abort(1)]
    code, message = said(refused.value)
    assert (code, message.replace("0.02 s", "60 s")) == example(TIMED_OUT)
    unread, done = client.open([ONE]), client.open([ONE])
    client.deliver([end(4)])
    sent.clear()
    await asyncio.sleep(0.05)
    assert sent == [Abort(3)], "nobody waited for it"
    with pytest.raises(TimedOut):
        await unread.batch()
    assert len(await done.batch()) == 1, "what has finished in time is there for who comes late"
    assert client.in_flight == 2, "the engine has not let go of them yet"
    client.deliver([end(1, "abort"), end(3, "abort")])
    assert client.in_flight == 0


async def test_death_reaches_everybody(client: EngineClient, sent: list[Message]) -> None:
    call = client.open([TWO])
    waiting = asyncio.create_task(call.all())
    control = asyncio.create_task(client.control("info"))
    await asyncio.sleep(0)
    client.died(EngineDead("gone"))
    for task in (waiting, control):
        with pytest.raises(EngineDead):
            await task
    with pytest.raises(EngineDead):
        client.open([ONE])
    with pytest.raises(EngineDead):
        await client.control("info")
    sent.clear()
    call.close()
    assert sent == [], "nobody is there to be told"


async def test_a_gone_client_stops_waiting(client: EngineClient) -> None:
    call = client.open([ONE])
    waiting = asyncio.create_task(call.all())
    await asyncio.sleep(0)
    call.fail(ClientGone())
    with pytest.raises(ClientGone):
        await waiting


def test_abort_by_label_is_exact(client: EngineClient, sent: list[Message]) -> None:
    client.open([TWO], ["batch_1"])
    client.open([ONE], ["batch_10"])
    client.open([ONE], [None])
    sent.clear()
    assert client.abort("batch_1") == 2
    assert sent == [Abort(1), Abort(2)]
    assert client.abort("batch") == 0
    client.deliver([end(1, "abort"), end(2, "abort")])
    assert client.abort("batch_1") == 0
    assert client.abort(None) == 2


def test_a_label_is_its_owners(client: EngineClient, sent: list[Message]) -> None:
    client.open([replace(ONE, namespace=("ann", ""))], ["mine"])
    client.open([replace(ONE, namespace=("bob", ""))], ["mine"])
    sent.clear()
    assert client.abort("mine", "ann") == 1
    assert sent == [Abort(1)]
    assert client.abort("mine", "cleo") == 0
    assert client.abort("mine") == 2


def test_a_request_that_cannot_be_sent_is_not_in_flight(sent: list[Message]) -> None:
    def broken(messages: object) -> None:
        raise OverflowError("an integer that no message holds")

    client = EngineClient(broken, sent.extend, 10, Metrics(), max_requests_per_key=10)
    client.state = "ready"
    for _ in range(3):
        with pytest.raises(OverflowError):
            client.open([TWO], ["batch"])
        with pytest.raises(OverflowError):
            client.open_run(BranchRun([], "b", ("", ""), SamplingParams()), 2, "batch")
    assert client.in_flight == 0
    assert client._unfinished == {}


def test_late_deltas_are_ignored(client: EngineClient) -> None:
    client.open([ONE])
    client.deliver([end(1)])
    client.deliver([Delta(1, "late"), end(1), Delta(99, "never")])
    assert client.in_flight == 0


async def test_control(client: EngineClient, sent: list[Message]) -> None:
    asking = asyncio.create_task(client.control("tree", {"max_nodes": 3}))
    await asyncio.sleep(0)
    assert sent == [Control(1, "tree", {"max_nodes": 3})]
    client.answer(ControlReply(1, True, {"a": 1}))
    assert await asking == {"a": 1}
    client.answer(ControlReply(1, True, "late"))
    refused = asyncio.create_task(client.control("check"))
    await asyncio.sleep(0)
    client.answer(ControlReply(2, False, None, Refusal(None, "the books do not balance", 500)))
    with pytest.raises(InvalidRequest, match="balance"):
        await refused
    with pytest.raises(Overloaded, match=r"within 0\.01 s"):
        await client.control("info", seconds=0.01)


def test_not_ready(sent: list[Message]) -> None:
    starting = EngineClient(sent.extend, sent.extend, 8, Metrics())
    with pytest.raises(Overloaded, match="loading"):
        starting.open([ONE])
    with pytest.raises(Overloaded, match="loading"):
        _ = starting.limits


@pytest.mark.parametrize(("what", "value"), [("create", {"id": "b1"}), ("fork", {"ids": ["b1", "b2"]})])
async def test_branches_that_are_made_too_late_are_deleted(
    client: EngineClient, sent: list[Message], monkeypatch: pytest.MonkeyPatch, what: str, value: dict[str, object]
) -> None:
    monkeypatch.setattr(engine_client, "CONTROL_SECONDS", 0.01)
    owner = ("ann", "")
    for op in (BranchOp(0, what, owner), BranchOp(0, what, owner), BranchOp(0, "extend", owner)):  # type: ignore[arg-type]
        with pytest.raises(Overloaded, match="did not answer"):
            await client.operate(op)
    asked = [message.id for message in sent if isinstance(message, BranchOp)]
    sent.clear()
    client.answer(ControlReply(asked[0], True, {**value, "num_tokens": 1}))
    client.answer(ControlReply(asked[1], False, error=Refusal("branch", "is gone", 410)))
    client.answer(ControlReply(asked[2], True, {"num_tokens": 1}))
    deleted = [(message.what, message.namespace, message.branch) for message in sent]  # type: ignore[attr-defined]
    assert deleted == [("delete", owner, id) for id in ("b1", "b2")[: len(value.get("ids", "1"))]]  # type: ignore[arg-type]
    client.answer(ControlReply(asked[0], True, value))
    assert len(sent) == len(deleted)
