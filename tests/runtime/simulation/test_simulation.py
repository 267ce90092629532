"""The simulated fleet, on small synthetic traces in the formats of the real ones."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli.main import app
from branchwise.runtime.errors import LoadError
from branchwise.runtime.simulation.bounds import offline_hit_rate, shared_cache_hit_rate
from branchwise.runtime.simulation.fleet import FleetSettings, simulate
from branchwise.runtime.simulation.replica import ReplicaSettings, SimulatedReplica
from branchwise.runtime.simulation.step_times import StepTimes, fit
from branchwise.runtime.simulation.traces import Arrival, read_trace

REPLICA = ReplicaSettings(kv_cache_tokens=65_536, page_size=64, max_num_seqs=32, max_num_batched_tokens=2048)


def conversations(path: Path, sessions: int = 60, turns: int = 5, seed: int = 0) -> Path:
    """Mooncake's format: a first block that all share, and conversations that grow by two or three blocks a turn."""
    rng, rows, fresh = random.Random(seed), [], 1
    for _ in range(sessions):
        at, blocks = rng.randrange(200_000), [0]
        for _ in range(turns):
            for _ in range(rng.randrange(2, 4)):
                blocks.append(fresh)
                fresh += 1
            length = 512 * len(blocks) - rng.randrange(512)
            rows.append(
                {
                    "timestamp": at,
                    "input_length": length,
                    "output_length": rng.randrange(1, 200),
                    "hash_ids": list(blocks),
                }
            )
            at += rng.randrange(5_000, 40_000)
    rows.sort(key=lambda row: row["timestamp"])
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def arrivals(tmp_path_factory: pytest.TempPathFactory) -> list[Arrival]:
    return read_trace(conversations(tmp_path_factory.mktemp("trace") / "trace.jsonl"))


def test_both_formats_are_read(tmp_path: Path) -> None:
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text('{"timestamp": 1500, "input_length": 700, "output_length": 9, "hash_ids": [0, 7]}\n')
    [one] = read_trace(mooncake)
    assert (one.seconds, one.session, one.prompt_tokens, one.output_tokens) == (1.5, 7, 700, 9)
    assert one.tokens().tolist() == [*range(512), *range(7 * 512, 7 * 512 + 188)]
    weka = tmp_path / "w.jsonl.gz"
    request = {"t": 2.0, "in": 150, "out": 3, "hash_id_ranges": [[1, 2], [5, 5]]}
    rows = [{"block_size": 64, "requests": [request, {"t": 9.0, "in": 1, "out": 1}]}] * 2  # the second has no blocks
    weka.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    first, second = read_trace(weka, seed=3)
    assert first.seconds < second.seconds and {first.session, second.session} == {0, 1}
    assert not set(first.tokens().tolist()) & set(second.tokens().tolist()), "ids are those of one session"
    assert len(first.tokens()) == 150
    for text in ("", "not json", '{"a": 1}'):
        mooncake.write_text(text)
        with pytest.raises(LoadError, match=r"m\.jsonl"):
            read_trace(mooncake)
    packed = weka.read_bytes()
    for damaged in (packed[:-20], packed[:12] + b"\xff" * 20 + packed[32:]):
        weka.write_bytes(damaged)
        with pytest.raises(LoadError, match=r"w\.jsonl\.gz cannot be read: \w"):
            read_trace(weka)


def test_one_replica_takes_the_time_of_its_steps() -> None:
    """By hand: a prompt of two chunks, then a token a step, whatever is skipped."""
    times = StepTimes(base=1.0, per_prompt_token=0.001, per_kv_token=0.0)
    replica = SimulatedReplica(REPLICA._replace(step_times=times, max_num_batched_tokens=1024), None)
    replica.add(10.0, 1, np.arange(1500, dtype=np.int32), 100)
    assert (replica.queued, replica.running) == (1500, 1)
    firsts, ends = [], []
    while replica.next_time < 1e9:
        at = replica.next_time
        replica.run()
        firsts += [(id, at) for id in replica.first_tokens]
        ends += [(each.id, each.hit_tokens, at) for each in replica.ended]
        replica.first_tokens.clear()
        replica.ended.clear()
    assert firsts == [(1, pytest.approx(10 + 2 * 1.0 + 1.5))]
    assert ends == [(1, 0, pytest.approx(10 + 3.5 + 99.0))]
    assert (replica.queued, replica.running, replica.computed_tokens) == (0, 0, 1500)


def test_an_arrival_joins_the_step_after_the_one_that_runs() -> None:
    times = StepTimes(base=1.0, per_prompt_token=0.0, per_kv_token=0.0)
    replica = SimulatedReplica(REPLICA._replace(step_times=times), None)
    replica.add(0.0, 1, np.arange(100, dtype=np.int32), 60)
    replica.run()  # the prompt, until 1.0; then it decodes, and many steps are skipped together
    assert replica.next_time > 5.0
    replica.add(4.2, 2, np.arange(1000, 1100, dtype=np.int32), 1)
    assert replica.next_time == 5.0
    replica.first_tokens.clear()
    while not replica.ended:
        at = replica.next_time
        replica.run()
    assert (replica.ended[0].id, at) == (2, 6.0)


def test_skipping_steps_changes_nothing(arrivals: list[Arrival], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = FleetSettings(2, replica=REPLICA)
    skipped = simulate(arrivals[:80], settings)
    monkeypatch.setattr("branchwise.runtime.simulation.replica.uneventful_steps", lambda scheduler: 0)
    stepped = simulate(arrivals[:80], settings)
    assert skipped.hit_rate == stepped.hit_rate and skipped.balance == stepped.balance
    # A skip has one step time for all its steps: their mean.
    assert np.allclose(skipped.first_token, stepped.first_token, atol=0.005)


def test_routing_by_what_is_cached_keeps_most_of_one_shared_cache(arrivals: list[Arrival]) -> None:
    shared = shared_cache_hit_rate(arrivals, 4 * REPLICA.kv_cache_tokens, REPLICA.page_size)
    offline = offline_hit_rate(arrivals, 4 * REPLICA.kv_cache_tokens)
    rates, balances = {}, {}
    for policy in ("round-robin", "sticky", "overlap", "branchwise"):
        result = simulate(arrivals, FleetSettings(4, policy, replica=REPLICA))
        rates[policy], balances[policy] = result.hit_rate, result.balance
        assert result.requests == len(arrivals) and not np.isnan(result.first_token).any(), "every request ends"
    assert shared <= offline + 0.01
    assert rates["round-robin"] < 0.5 * shared
    assert balances["overlap"] == 4, "all prompts share a block: it sends them to one replica"
    assert rates["branchwise"] > 0.95 * shared and balances["branchwise"] < min(1.25, balances["sticky"])


def test_several_routers_and_late_events_cost_little(arrivals: list[Arrival]) -> None:
    best = simulate(arrivals, FleetSettings(4, replica=REPLICA))
    other = simulate(arrivals, FleetSettings(4, routers=3, event_lag=0.5, replica=REPLICA))
    assert other.hit_rate > 0.97 * best.hit_rate and other.balance < 1.3


def test_the_offline_bound_is_beladys() -> None:
    def prompt(*blocks: int) -> Arrival:
        return Arrival(0.0, 0, np.array(blocks, np.int32), 10, 10 * len(blocks), 1)

    # Room for two blocks: keep 1 and evict 2, which comes later. LRU would do the opposite.
    trace = [prompt(1), prompt(2), prompt(3), prompt(1), prompt(3), prompt(2)]
    assert offline_hit_rate(trace, 20) == pytest.approx(2 / 6)
    assert offline_hit_rate(trace, 1000) == pytest.approx(3 / 6)


def test_step_times_are_fitted() -> None:
    true = StepTimes(0.004, 5e-5, 2e-8)
    samples = [(p, kv, true.seconds(p, kv)) for p in (0, 100, 2000, 8000) for kv in (0, 10_000, 500_000)]
    assert fit(samples) == pytest.approx(true)
    with pytest.raises(ValueError, match="three"):
        fit(samples[:2])


def test_the_command_writes_a_table_and_a_plot(tmp_path: Path) -> None:
    trace = conversations(tmp_path / "trace.jsonl", sessions=10, turns=3)
    arguments = ["simulate", str(trace), "--replicas", "1,2", "--routers", "1,2", "--event-lag", "0,100"]
    arguments += ["--kv-cache-tokens", "65536", "--table", str(tmp_path / "t.md"), "--plot", str(tmp_path / "p.svg")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    rows = (tmp_path / "t.md").read_text().splitlines()
    assert len(rows) == 2 + 1 + 3 + 4  # one replica; three other policies; routers times lags
    assert (tmp_path / "p.svg").read_text().count("<rect") == 1 + len(rows) - 2


@pytest.mark.parametrize(
    "wrong",
    [
        ["--policies", "best"],
        ["--policies", "overlap,best"],
        ["--step-times", "1"],
        ["--step-times", "0,1,1"],
        ["--event-lag", "x"],
        ["--event-lag", "nan"],
        ["--replicas", "0"],
        ["--replicas", "1.5"],
        ["--replicas", "inf"],
        ["--routers", "0"],
        ["--kv-cache-tokens", "600"],  # less than a prompt
        ["--kv-cache-tokens", "1"],  # less than a page
        ["--table", "/dev/null/t.md"],
        ["--plot", "/dev/null/p.svg"],
    ],
    ids="_".join,
)
def test_a_setting_that_cannot_be_simulated_is_one_line(tmp_path: Path, wrong: list[str]) -> None:
    trace = conversations(tmp_path / "trace.jsonl", sessions=2, turns=2)
    failed = CliRunner().invoke(app, ["simulate", str(trace), *wrong])
    assert failed.exit_code == 2, failed.output
    [line] = failed.stderr.splitlines()
    assert line.startswith("error: ") and (wrong[0] in line or wrong[1] in line), line


def test_a_trace_in_which_nothing_repeats(tmp_path: Path) -> None:
    """Even one shared cache reuses nothing: no share of that can be given."""
    lengths = {"input_length": 600, "output_length": 2}
    rows = [{"timestamp": 9, "hash_ids": [i, i + 1], **lengths} for i in (0, 2)]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    arguments = ["simulate", str(trace), "--replicas", "2", "--plot", str(tmp_path / "p.svg")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("| 0.0% | – |") == 4
    assert 'width="nan' not in (tmp_path / "p.svg").read_text()
