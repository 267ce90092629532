"""Which process is blamed for a heartbeat that does not come back, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest

from branchwise.runtime.messages import Heartbeat, Message
from branchwise.runtime.server import heartbeat
from branchwise.runtime.server.heartbeat import HeartbeatMonitor

CHAIN = ("tokenizer", "scheduler", "detokenizer")
TICK = 0.005  # seconds


class Processes:
    """The chain: each stops for good (``stopped``), at once or right after its report of heartbeat 3, unsent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stopped: str | None, reports: bool, limit: float) -> None:
        monkeypatch.setattr(heartbeat, "INTERVAL", TICK)
        self.sent: list[int] = []
        self.given_up: asyncio.Future[tuple[str, float]] = asyncio.get_running_loop().create_future()
        self._stopped, self._reports = stopped, reports
        self.monitor = HeartbeatMonitor(self._take, limit, lambda *what: self.given_up.set_result(what))
        self.monitor.start()

    def _take(self, messages: Sequence[Message]) -> None:
        for message in messages:
            assert isinstance(message, Heartbeat)
            self.sent.append(message.number)
            asyncio.get_running_loop().call_soon(self._pass, message.number)

    def _pass(self, number: int) -> None:
        for role in CHAIN:
            stops = role == self._stopped and number >= 3
            if not stops or (self._reports and number == 3):
                self.monitor.receive(Heartbeat(number, role))
            if stops:
                return


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(TICK)


@pytest.mark.parametrize("reports", [False, True])
@pytest.mark.parametrize("role", CHAIN)
async def test_the_process_that_stopped_is_blamed(monkeypatch: pytest.MonkeyPatch, role: str, reports: bool) -> None:
    """Also where its report of the last heartbeat came and the heartbeat itself did not go on."""
    processes = Processes(monkeypatch, role, reports, 10 * TICK)
    blamed, seconds = await asyncio.wait_for(processes.given_up, 60)
    assert (blamed, processes.monitor.stalled) == (role, role)
    assert seconds >= 10 * TICK and processes.monitor.age == seconds
    last = 4 if reports and role == "detokenizer" else 3  # what the detokenizer reports has come back
    assert processes.sent == list(range(1, last + 2))  # no more than two are under way


async def test_answers_that_come_keep_the_age_at_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes(monkeypatch, None, True, 10 * TICK)
    await until(lambda: len(processes.sent) > 30)
    processes.monitor.stop()
    assert (processes.monitor.stalled, processes.given_up.done()) == (None, False)


async def test_the_age_is_that_of_the_oldest_heartbeat_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes longer than half the limit: two heartbeats overlap, and nothing hangs."""
    monkeypatch.setattr(heartbeat, "INTERVAL", TICK)
    sent: list[int] = []
    monitor = HeartbeatMonitor(
        lambda messages: sent.extend(m.number for m in messages if isinstance(m, Heartbeat)),
        20 * TICK,
        lambda *what: pytest.fail(str(what)),
    )
    monitor.start()
    await until(lambda: monitor.age >= 8 * TICK)
    assert sent == [1, 2]
    before = monitor.age
    for role in CHAIN:
        monitor.receive(Heartbeat(1, role))
    assert 0 < monitor.age < before  # the second's
    await until(lambda: monitor.age >= 12 * TICK)
    assert (sent, monitor.stalled) == ([1, 2, 3], "tokenizer")
    for role in reversed(CHAIN):
        monitor.receive(Heartbeat(3, role))
    assert (monitor.age, monitor.stalled) == (0.0, None)
    monitor.stop()
