"""Tiers of a model over two ranks: each keeps its part of a page, and a page that one of them lost is a miss."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from branchwise import Engine, LoadError, SamplingParams
from branchwise.radix import RadixTree
from branchwise.runtime.tiers.copies import Ended, HostCopies
from branchwise.runtime.tiers.disk import DiskTier
from branchwise.runtime.tiers.fingerprint import Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder, rank_folder
from branchwise.runtime.tiers.manager import TierManager
from branchwise.runtime.tiers.rank import RankTiers
from branchwise.runtime.tiers.split import OpenDisk, RankCopies, SplitDisk, SplitHost

Checkpoint = Callable[[str], Path]
PROMPTS = [[(7 * i + j * j) % 60 + 3 for j in range(90)] for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
BYTES = 64
ANN = ("ann", "")
NONE = np.empty(0, np.int32)


# ---- in one process: what rank 0 makes of the ranks' reports ----


class Host:
    """A host tier that copies when it is told to."""

    def __init__(self) -> None:
        self.num_slots, self.page_bytes = 8, BYTES
        self.memory = np.zeros((8, BYTES), np.uint8)
        self.calls = self.made = 0
        self.loads: list[Ended] = []
        self.finished: list[Ended] = []

    def store(self, copies: HostCopies) -> None:
        self.calls += 1
        self.memory[copies.slots] = copies.pages[:, None]

    def load(self, copies: HostCopies) -> None:
        self.loads += [Ended(id, len(slots), 0.5) for id, slots, _ in copies.loads]

    def stored(self) -> int:
        return self.made

    def ended(self) -> list[Ended]:
        ended, self.finished = self.finished, []
        return ended


class Direct:
    """Rank 1 in this process."""

    size = 2

    def __init__(self) -> None:
        self.host = Host()
        self.tiers = RankTiers(1, self.host)

    def send_copies(self, message: bytes) -> None:
        self.tiers.receive(message)

    def copy_reports(self) -> list[tuple[int, bytes]]:
        report = self.tiers.report()
        return [] if report is None else [(1, report)]


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_copy_has_ended_once_all_ranks_have_made_it() -> None:
    link, local = Direct(), Host()
    host = SplitHost(local, RankCopies(link))
    host.store(HostCopies(ids(5, 6), ids(0, 3), 2))
    assert link.host.memory[3, 0] == 6 and link.tiers.busy
    local.made = 1
    assert host.stored() == 0
    link.host.made = 1
    assert host.stored() == 1 and not link.tiers.busy
    host.load(HostCopies(NONE, NONE, -1, [(7, ids(0, 3), ids(1, 2)), (8, ids(3), ids(4))]))
    local.finished = local.loads
    assert host.ended() == []
    link.host.finished = [Ended(8, 1, 0.9), Ended(7, 1, 0.2)]
    assert host.ended() == [Ended(7, 1, 0.5), Ended(8, 1, 0.9)], "the least that arrived, the longest time"
    assert host.ended() == [] and not link.tiers.busy


@contextlib.contextmanager
def disks(path: Path) -> Iterator[tuple[SplitDisk, Direct, Host]]:
    link, local = Direct(), Host()
    prints = Fingerprint("m", "cpu", "layout on each of 2 ranks", BYTES)
    folder, copies = CacheFolder(path, prints, 100), RankCopies(link)
    copies.send(OpenDisk(str(folder.path), prints.facts(), folder.max_records))
    disk = SplitDisk(folder, False, copies)
    disk.load_index()
    yield disk, link, local
    disk.close()
    link.tiers.close()


def end(disk: SplitDisk, link: Direct) -> Ended:
    """The one copy that is under way."""
    while True:
        for ended in disk.ended():
            return ended._replace(seconds=0.0)


def filled(disk: SplitDisk, link: Direct, local: Host) -> None:
    """Two pages, in records 3 and 4. Rank 1's bytes differ from rank 0's."""
    local.memory[:2], link.host.memory[:2] = [[1], [2]], [[101], [102]]
    disk.write(1, [(ANN, -1, ids(1, 2)), (ANN, 3, ids(3, 4))], ids(3, 4), local.memory, ids(0, 1))
    assert end(disk, link) == Ended(1, 2, 0.0)


def test_every_rank_has_its_part_of_a_record(tmp_path: Path) -> None:
    with disks(tmp_path) as (disk, link, local):
        filled(disk, link, local)
    with disks(tmp_path) as (disk, link, local):
        disk.read(2, ids(4, 3), local.memory, ids(6, 7))
        assert end(disk, link) == Ended(2, 2, 0.0)
        assert local.memory[6:, 0].tolist() == [2, 1] and link.host.memory[6:, 0].tolist() == [102, 101]


def test_a_page_that_a_rank_lost_is_a_miss(tmp_path: Path) -> None:
    with disks(tmp_path) as (disk, link, local):
        filled(disk, link, local)
        (segment,) = rank_folder(disk.folder.path, 1).glob("*/segment-*.bin")
        data = bytearray(segment.read_bytes())
        data[4 * BYTES + 5] ^= 1
        segment.write_bytes(data)
        disk.read(2, ids(3, 4), local.memory, ids(6, 7))
        assert end(disk, link) == Ended(2, 1, 0.0, damaged=True)
        bad: list[int] = []
        disk.verify(3, [3, 4], bad)
        assert end(disk, link).good == 2 and bad == [4]


def test_a_record_that_a_rank_has_of_another_prefix_is_a_miss(tmp_path: Path) -> None:
    """Its row is older or newer than rank 0's: a kill came between."""
    with disks(tmp_path) as (disk, link, local):
        filled(disk, link, local)
        rank = link.tiers._opened
        rank.folder.write([(ANN, -1, ids(9, 9))], [3], [local.memory[0]])
        rank.load_index()
        disk.read(2, ids(3), local.memory, ids(6))
        assert end(disk, link) == Ended(2, 0, 0.0, damaged=True)


def test_what_a_rank_lacks_is_dropped_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its index was damaged, and it began an empty one: not one miss for each prefix, but none."""
    with disks(tmp_path) as (disk, link, local):
        filled(disk, link, local)
        link.tiers._opened.folder.index.delete([4])
    with disks(tmp_path) as (disk, link, local):
        tree = RadixTree(8, 2, host_slots=8, disk_slots=8)
        assert disk.restore(tree) == 4
        manager = TierManager(tree, SplitHost(local, disk._copies), disk, "auto", lambda: 0.0)
        while manager.busy:
            manager.apply(manager.poll())
        assert tree.reach(ids(1, 2, 3, 4), ANN).disk == 2
        tree.check()
        manager.poll()  # deletes the record everywhere
        bad: list[int] = []
        disk.verify(9, [3, 4], bad)
        assert end(disk, link).good == 2 and bad == []
    assert "1 pages are damaged or not on every rank" in caplog.text
    with disks(tmp_path) as (disk, _, _):
        assert [row.record for row in disk.load_index()] == [3]


def test_a_write_that_fails_on_a_rank_counts_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with disks(tmp_path) as (disk, link, local):

        def fail(*_: Any) -> None:
            raise OSError("full")

        monkeypatch.setattr(link.tiers._opened.folder, "write", fail)
        disk.write(1, [(ANN, -1, ids(1, 2))], ids(3), local.memory, ids(0))
        assert end(disk, link) == Ended(1, 0, 0.0)
        disk.delete(ids(3))  # as the tree's slots are free again
    with disks(tmp_path) as (disk, _, _):
        assert disk.load_index() == []


# ---- with processes ----


@contextlib.contextmanager
def engine(folder: Path, ranks: int = 2, **settings: Any) -> Iterator[Engine]:
    settings = {"device": "cpu", "max_model_len": 256, "check_when_idle": True, "kv_cache_tokens": 128} | settings
    with Engine(folder, tensor_parallel_size=ranks, host_cache="4MiB", **settings) as made:
        yield made


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> list[list[int]]:
    with Engine(checkpoint("llama-gqa"), device="cpu", disable_radix_cache=True) as made:
        return [output.token_ids for output in made.generate(PROMPTS, GREEDY)]


def test_the_same_tokens_from_every_tier_and_after_a_restart(
    checkpoint: Checkpoint, expected: list[list[int]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six prompts of 90 tokens pass twice through a pool of 128. Another number of ranks finds nothing."""
    folder, disk = checkpoint("llama-gqa"), {"disk_cache": str(tmp_path)}
    with engine(folder, **disk) as two:
        for again in (False, True):
            for prompt, tokens in zip(PROMPTS, expected, strict=True):
                output = two.generate(prompt, GREEDY)
                assert output.token_ids == tokens
                assert (output.cache.hit_tokens, output.cache.host_tokens > 60) == ((89, True) if again else (0, False))
        stats = two.stats()
        assert stats.tier_failures == 0
    (part,) = tmp_path.glob("*/format.json")
    assert rank_folder(part.parent, 1).is_dir()
    with caplog.at_level(logging.INFO), engine(folder, ranks=1, **disk) as one:
        output = one.generate(PROMPTS[0], GREEDY)
        assert (output.token_ids, output.cache.hit_tokens) == (expected[0], 0)
        assert one.stats().host_pages_total == stats.host_pages_total, "--host-cache is for all ranks together"
    assert any("are of other models" in record.getMessage() for record in caplog.records)
    with engine(folder, **disk) as two:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            output = two.generate(prompt, GREEDY)
            assert (output.token_ids, output.cache.disk_tokens) == (tokens, 89)


def test_damage_on_one_rank_is_a_miss(checkpoint: Checkpoint, expected: list[list[int]], tmp_path: Path) -> None:
    folder = checkpoint("llama-gqa")
    with engine(folder, disk_cache=str(tmp_path)) as two:
        two.generate(PROMPTS, GREEDY)
    (segment,) = tmp_path.glob("*/rank-1/*/segment-*.bin")
    data = bytearray(segment.read_bytes())
    for at in range(100, len(data), 4500):
        data[at] ^= 0xFF
    segment.write_bytes(data)
    with engine(folder, disk_cache=str(tmp_path)) as two:
        assert [two.generate(prompt, GREEDY).token_ids for prompt in PROMPTS] == expected
        assert two.stats().tier_failures > 0


def test_a_folder_that_a_rank_cannot_use_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama-gqa")
    with engine(folder, disk_cache=str(tmp_path)):
        pass
    (part,) = tmp_path.glob("*/format.json")
    with (part.parent / "rank-1" / "lock").open() as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        with (
            pytest.raises(LoadError, match=r"rank 1: the disk cache .* is in use"),
            engine(folder, disk_cache=str(tmp_path)),
        ):
            pass
    disk = DiskTier(CacheFolder(tmp_path, Fingerprint("m", "cpu", "layout", BYTES), 10))
    disk.close()  # rank 0 has given up its lock
