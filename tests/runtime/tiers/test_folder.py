"""The folder of the disk tier: what survives, and what damage does."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from branchwise.radix import RadixTree
from branchwise.runtime.errors import LoadError
from branchwise.runtime.server.http.plumbing.auth import Namespaces
from branchwise.runtime.tiers.disk import DiskTier
from branchwise.runtime.tiers.fingerprint import FORMAT, Fingerprint, model_fingerprint
from branchwise.runtime.tiers.folder import CacheFolder, Damaged, folder_secret
from branchwise.runtime.tiers.index import prefix_hash

ANN, SALTED = ("ann", ""), ("ann", "salt")
BYTES = 4096


def fingerprint() -> Fingerprint:
    return Fingerprint("m", "cpu", "layout", BYTES)


def payload(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, BYTES, np.uint8)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def filled(path: Path) -> CacheFolder:
    """Two prefixes: 0-1-2 and 0-3 of one namespace."""
    folder = CacheFolder(path, fingerprint(), 100)
    pages = [(ANN, -1, tokens(1, 2)), (ANN, 0, tokens(3, 4)), (ANN, 1, tokens(5)), (ANN, 0, tokens(6, 7))]
    folder.write(pages, [0, 1, 2, 3], [payload(i) for i in range(4)])
    return folder


def read(folder: CacheFolder, record: int) -> np.ndarray:
    out = np.zeros(BYTES, np.uint8)
    folder.read(record, *folder.index.checksums([record])[record], out)
    return out


def test_pages_are_there_after_reopening(tmp_path: Path) -> None:
    filled(tmp_path).close()
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert [(row.record, row.before, row.tokens.tolist()) for row in folder.load()] == [
        (0, -1, [1, 2]),
        (1, 0, [3, 4]),
        (3, 0, [6, 7]),
        (2, 1, [5]),
    ]
    for record in range(4):
        assert np.array_equal(read(folder, record), payload(record))
    assert (tmp_path.stat().st_mode & 0o777) == 0o700 and (folder.path / "segment-00000.bin").stat().st_mode & 0o77 == 0
    folder.close()


@pytest.mark.parametrize("facts", [{"model": "another"}, {"format": FORMAT - 1}])
def test_pages_of_another_model_or_version_are_not_there(tmp_path: Path, facts: dict[str, Any]) -> None:
    filled(tmp_path).close()
    other = CacheFolder(tmp_path, replace(fingerprint(), **facts), 100)
    assert other.load() == []
    other.close()
    again = CacheFolder(tmp_path, fingerprint(), 100)
    assert len(again.load()) == 4
    again.close()


def test_a_folder_is_used_by_one_server(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    with pytest.raises(LoadError, match=f"in use by process {os.getpid()}"):
        CacheFolder(tmp_path, fingerprint(), 100)
    folder.close()
    CacheFolder(tmp_path, fingerprint(), 100).close()


def test_a_folder_that_cannot_be_used_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoadError, match="cannot be used"):
        CacheFolder(tmp_path / "file" / "cache", fingerprint(), 100)


@pytest.mark.parametrize("fault", ["a folder in its place", "a full disk"])
def test_a_folder_whose_index_cannot_be_opened_is_not_kept_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    index = tmp_path / fingerprint().digest / "index.sqlite"
    with monkeypatch.context() as broken:
        if fault == "a full disk":
            full = Mock(side_effect=sqlite3.OperationalError("database or disk is full"))
            broken.setattr(f"{CacheFolder.__module__}.Index", full)
        else:
            index.mkdir(parents=True)
        with pytest.raises(LoadError, match="cannot be used") as refused:  # its traceback keeps the first attempt
            CacheFolder(tmp_path, fingerprint(), 100)
    if index.is_dir():
        index.rmdir()
    CacheFolder(tmp_path, fingerprint(), 100).close()
    assert refused.value.__traceback__ is not None


@pytest.mark.parametrize("harm", ["flip", "short", "gone", "other record"])
def test_a_changed_record_is_found(tmp_path: Path, harm: str) -> None:
    filled(tmp_path).close()
    segment = tmp_path / fingerprint().digest / "segment-00000.bin"
    data = bytearray(segment.read_bytes())
    if harm == "flip":
        data[2 * BYTES + 77] ^= 1
    elif harm == "short":
        del data[2 * BYTES + 100 :]
    elif harm == "other record":
        data[2 * BYTES : 3 * BYTES] = data[:BYTES]
    segment.write_bytes(data)
    if harm == "gone":
        segment.unlink()
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert len(folder.load()) == 4
    with pytest.raises(Damaged):
        read(folder, 2)
    if harm == "flip":
        assert np.array_equal(read(folder, 3), payload(3)), "others are as they were"
    folder.close()


@pytest.mark.parametrize("harm", ["parent", "tokens", "owner", "beyond"])
def test_rows_that_do_not_form_whole_prefixes_are_dropped(tmp_path: Path, harm: str) -> None:
    filled(tmp_path).close()
    file = tmp_path / fingerprint().digest / "index.sqlite"
    with sqlite3.connect(file) as index:
        change = {
            "parent": "DELETE FROM pages WHERE record = 1",
            "tokens": "UPDATE pages SET tokens = x'0900000004000000' WHERE record = 1",
            "owner": "UPDATE pages SET owner = 'bob' WHERE record = 1",
            "beyond": "UPDATE pages SET record = 1000 WHERE record = 1",
        }[harm]
        index.execute(change)
    index.close()
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert [row.record for row in folder.load()] == [0, 3]
    assert len(folder.index) == 2, "they are deleted"
    folder.close()


def test_of_two_rows_with_one_prefix_the_first_counts(tmp_path: Path) -> None:
    """A kill can leave both, if a page was written twice: a tree with both would lose one of them."""
    folder = filled(tmp_path)
    pages = [(ANN, -1, tokens(1, 2)), (ANN, 4, tokens(3, 4)), (ANN, 5, tokens(8, 9))]
    folder.write(pages, [4, 5, 6], [payload(0), payload(1), payload(7)])
    for _ in range(2):  # the second time as the index is now
        rows = folder.load()
        assert sorted((row.record, row.before) for row in rows) == [(0, -1), (1, 0), (2, 1), (3, 0), (6, 1)]
    assert np.array_equal(read(folder, 6), payload(7))
    tree = RadixTree(10, 2, host_slots=10, disk_slots=100)
    tree.restore([(row.record, row.before, row.namespace, row.tokens, row.written) for row in rows])
    tree.check()
    folder.close()


@pytest.mark.parametrize("text", [b"", b"not a database at all" * 500])
def test_a_damaged_index_is_an_empty_one(tmp_path: Path, text: bytes) -> None:
    filled(tmp_path).close()
    for file in (tmp_path / fingerprint().digest).glob("index.sqlite*"):
        file.unlink() if file.suffix != ".sqlite" else file.write_bytes(text)
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert folder.load() == []
    folder.write([(ANN, -1, tokens(1, 2))], [0], [payload(9)])
    folder.close()


def test_an_index_that_cannot_be_opened_now_is_kept(tmp_path: Path) -> None:
    filled(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / fingerprint().digest / "index.sqlite")) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LoadError, match=r"the disk cache .* cannot be used: database is locked"):
            CacheFolder(tmp_path, fingerprint(), 100)
    with closing(CacheFolder(tmp_path, fingerprint(), 100)) as folder:
        assert [row.record for row in folder.load()] == [0, 1, 3, 2]


def test_an_index_that_cannot_be_changed_now_is_kept(tmp_path: Path) -> None:
    """Rows of no whole prefix are to be deleted."""
    folder = filled(tmp_path)
    folder.index.delete([1])
    with closing(sqlite3.connect(tmp_path / fingerprint().digest / "index.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LoadError, match=r"the disk cache .* cannot be used: database is locked"):
            folder.load()
    assert len(folder.index) == 3
    assert [row.record for row in folder.load()] == [0, 3]
    folder.close()


def test_a_full_disk_adds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        folder.write([(ANN, 3, tokens(8, 9)), (ANN, 4, tokens(1, 1))], [4, 5], [payload(4), payload(5)])
    monkeypatch.undo()
    assert len(folder.index) == 4
    monkeypatch.setattr("branchwise.runtime.tiers.folder._MIN_FREE", 1 << 60)
    with pytest.raises(OSError, match="left free"):
        folder.write([(ANN, 3, tokens(8, 9))], [4], [payload(4)])
    folder.close()


KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from branchwise.runtime.tiers.fingerprint import Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder

folder = CacheFolder(Path(sys.argv[1]), Fingerprint("m", "cpu", "layout", 4096), 100)
write, when = os.pwrite, int(sys.argv[2])
calls = 0

def pwrite(file, data, offset):
    global calls
    calls += 1
    if calls == when:
        write(file, data[:100], offset)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(file, data, offset)

os.pwrite = pwrite
for i in range(6):
    page = np.random.default_rng(i).integers(0, 256, 4096, np.uint8)
    folder.write([(("ann", ""), i - 1, np.array([i, i], np.int32))], [i], [page])
"""


def test_a_server_that_is_killed_while_it_writes_keeps_what_was_written(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "4"], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert [row.record for row in folder.load()] == [0, 1, 2]
    for record in range(3):
        assert np.array_equal(read(folder, record), payload(record))
    folder.close()


def restored(path: Path, salted: bool = False) -> tuple[DiskTier, RadixTree]:
    disk = DiskTier(CacheFolder(path, fingerprint(), 100), salted)
    tree = RadixTree(10, 2, host_slots=10, disk_slots=100)
    assert disk.restore(tree) == 7
    tree.check()
    return disk, tree


def test_the_tree_is_rebuilt(tmp_path: Path) -> None:
    filled(tmp_path).close()
    disk, tree = restored(tmp_path)
    assert tree.num_nodes == 4
    assert tree.reach(tokens(1, 2, 3, 4, 5, 9), ANN)[:3] == (0, 0, 5)
    assert tree.reach(tokens(1, 2, 6, 7, 8), ANN)[:3] == (0, 0, 4)
    assert tree.reach(tokens(1, 2, 6, 7, 8), SALTED)[:3] == (0, 0, 0)
    tree.flush()
    disk.delete(tree.structure.disk.take_freed())
    disk.close()
    folder = CacheFolder(tmp_path, fingerprint(), 100)
    assert folder.load() == [], "what is flushed is gone from the disk, too"
    folder.close()


def test_salts_stay_in_memory_unless_asked(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    assert DiskTier(folder).keeps(ANN) and not DiskTier(folder).keeps(SALTED)
    assert DiskTier(folder, keep_salted=True).keeps(SALTED)
    folder.close()


def test_a_fingerprint_changes_with_the_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "a.safetensors").write_bytes(b"x" * 10_000_000)
    before = model_fingerprint(tmp_path)
    assert model_fingerprint(tmp_path) == before != model_fingerprint(tmp_path, seed=1)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 9_999_999 + b"y")
    assert model_fingerprint(tmp_path) != before


def test_names_of_namespaces_survive_a_restart(tmp_path: Path) -> None:
    secret = folder_secret(tmp_path / "cache")
    assert folder_secret(tmp_path / "cache") == secret != folder_secret(tmp_path / "other")
    assert ((tmp_path / "cache" / "secret").stat().st_mode & 0o777) == 0o600
    assert Namespaces("key", secret).of("salt") == Namespaces("key", secret).of("salt") != Namespaces("key").of("salt")
    (tmp_path / "cache" / "secret").write_bytes(b"short")
    with pytest.raises(LoadError, match="damaged"):
        folder_secret(tmp_path / "cache")


def test_the_hash_of_a_prefix_is_the_same_in_every_process() -> None:
    """Python's own hashes are seeded at random. Changing this value needs another `fingerprint.FORMAT`."""
    first = prefix_hash(b"", SALTED, tokens(1, 2))
    assert first.hex() == "a439787b64b0a98d810e94372ed66dd7"
    assert prefix_hash(first, SALTED, tokens(3)).hex() == "ce7f3057fa98cdc53c8feceed6c0d803"
