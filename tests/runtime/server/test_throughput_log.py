"""What a server at work says about its load, and when it says nothing."""

from __future__ import annotations

from branchwise.runtime.messages import Stats
from branchwise.runtime.server.throughput_log import ThroughputLog


class Load:
    """A log on a clock of its own, and the lines it said."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.now, self.lines = 1000.0, []  # type: ignore[var-annotated]
        self._log = ThroughputLog(seconds, self.lines.append, lambda: self.now)

    def at(self, now: float, **stats: int) -> None:
        self.now = now
        self._log.update(Stats(pages_total=200, **stats))


def test_rates_are_of_the_time_since_the_last_line() -> None:
    load = Load()
    load.at(1000, running=1, generated_tokens=50)
    load.at(1009.9, running=3, generated_tokens=500)
    assert not load.lines
    load.at(1010, running=3, waiting=2, generated_tokens=1050, cached_tokens=750, computed_tokens=250, pages_free=60,
            pages_cached=40)  # fmt: skip
    load.at(1015, running=3, generated_tokens=2000)
    load.at(1020, running=3, generated_tokens=2050, cached_tokens=750, computed_tokens=250, retractions=2)
    assert load.lines == [
        "3 running, 2 waiting; 100.0 tokens/s generated; prompts 100.0 tokens/s, 75.0% cached; "
        "KV 50.0% in use, 20.0% cached",
        "3 running, 0 waiting; 100.0 tokens/s generated; prompts 0.0 tokens/s, none new; "
        "KV 100.0% in use, 0.0% cached; 2 retracted",
    ]


def test_a_pause_counts_for_nothing() -> None:
    load = Load()
    load.at(1000, running=1)
    load.at(1004, generated_tokens=100)  # the end of a stretch: too short for a line
    load.at(5000, running=1, generated_tokens=100)
    load.at(5011, running=1, generated_tokens=1200)
    (line,) = load.lines
    assert "100.0 tokens/s generated" in line


def test_zero_seconds_are_silence() -> None:
    load = Load(seconds=0)
    for i in range(100):
        load.at(1000 + 10 * i, running=1, generated_tokens=i)
    assert not load.lines
