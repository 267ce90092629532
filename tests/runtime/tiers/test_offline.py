"""``branchwise cache``: the folder of a disk cache without a server."""

from __future__ import annotations

import gc
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli.main import app
from branchwise.runtime.errors import LoadError
from branchwise.runtime.tiers import offline
from branchwise.runtime.tiers.fingerprint import FORMAT, Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder, rank_folder

BYTES = 4096
PRINT = Fingerprint("m", "cpu", "layout", BYTES)


def payload(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, BYTES, np.uint8)


def fill(path: Path, prefixes: int = 3, fingerprint: Fingerprint = PRINT, owner: str = "") -> None:
    """Each prefix: three pages, one after the other."""
    folder = CacheFolder(path, fingerprint, 1000)
    for i in range(prefixes):
        pages = [((owner, ""), -1 if j == 0 else 3 * i + j - 1, np.array([i, j], np.int32)) for j in range(3)]
        folder.write(pages, range(3 * i, 3 * i + 3), [payload(3 * i + j) for j in range(3)])
        with folder.index._database as database:
            database.execute("UPDATE pages SET written = ? WHERE record >= ?", (1000 + i, 3 * i))
    folder.close()


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["cache", *map(str, arguments)])
    return done.exit_code, done.output


def test_list_and_verify(tmp_path: Path) -> None:
    fill(tmp_path)
    code, said = run("list", tmp_path)
    assert code == 0 and PRINT.digest in said and " 9 " in said and " 18 " in said
    assert run("verify", tmp_path)[0] == 0
    segment = tmp_path / PRINT.digest / "segment-00000.bin"
    data = bytearray(segment.read_bytes())
    data[4 * BYTES + 5] ^= 1  # the second page of the second prefix
    segment.write_bytes(data)
    code, said = run("verify", tmp_path)
    assert code == 1 and "7 pages are good, 2 were damaged" in said
    assert run("verify", tmp_path)[0] == 0


def test_the_folder_of_a_model_that_is_split(tmp_path: Path) -> None:
    """Each rank has its part of every page in the record of the same number."""
    fill(tmp_path)
    rank = rank_folder(tmp_path / PRINT.digest, 1)
    fill(rank)
    code, said = run("list", tmp_path)
    assert code == 0 and " 9 " in said and f"{18 * BYTES / 2**20:.1f}" in said
    segment = rank / PRINT.digest / "segment-00000.bin"
    data = bytearray(segment.read_bytes())
    data[4 * BYTES + 5] ^= 1  # the second page of the second prefix
    segment.write_bytes(data)
    code, said = run("verify", tmp_path)
    assert code == 1 and "7 pages are good, 2 were damaged" in said
    assert run("verify", tmp_path)[0] == 0
    gc.disable()  # or the collector might close what a failed command left open
    try:
        for command in ("save", "load"):
            code, said = run(command, tmp_path, tmp_path / "file")
            assert code == 2 and "split over 2 devices" in " ".join(said.split())
        assert run("prune", tmp_path, "--size", 10 * BYTES) == (0, "2 pages deleted, 0.0 MiB left\n")
    finally:
        gc.enable()
    for path in (tmp_path, rank):
        folder = offline.open_part(path, PRINT.digest)
        assert sorted(row.record for row in folder.load()) == [0, 3, 6, 7, 8]
        folder.close()
    assert run("prune", tmp_path, "--size", 0)[0] == 0 and not rank.exists()


def test_prune_deletes_the_oldest_ends_first(tmp_path: Path) -> None:
    fill(tmp_path)
    assert run("prune", tmp_path, "--size", 5 * BYTES) == (0, "4 pages deleted, 0.0 MiB left\n")
    folder = offline.open_part(tmp_path, PRINT.digest)
    assert sorted(row.record for row in folder.load()) == [3, 4, 6, 7, 8]
    folder.close()
    assert run("prune", tmp_path, "--size", 0)[0] == 0
    assert not (tmp_path / PRINT.digest).exists()


def test_prune_keeps_the_model_that_was_written_last(tmp_path: Path) -> None:
    old = Fingerprint("old", "cpu", "layout", BYTES)
    fill(tmp_path, 1, old)
    fill(tmp_path, 3)
    assert "3 pages deleted" in run("prune", tmp_path, "--size", 9 * BYTES)[1]
    assert offline.digests(tmp_path) == [PRINT.digest]


def test_a_saved_file_loads_into_another_folder(tmp_path: Path) -> None:
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "file"
    fill(here, 2)
    fill(there, 1)
    assert "6 pages" in run("save", here, file)[1]
    assert run("load", there, file) == (0, "3 pages added, 3 were there\n")
    assert run("load", there, file) == (0, "0 pages added, 6 were there\n")
    assert run("verify", there)[0] == 0
    folder = offline.open_part(there, PRINT.digest)
    out = np.zeros(BYTES, np.uint8)
    for row in folder.load():
        folder.read(row.record, row.prefix, row.checksum, out)
        assert np.array_equal(out, payload(3 * int(row.tokens[0]) + int(row.tokens[1])))
    folder.close()


def test_pages_of_a_key_are_loaded_as_those_of_another(tmp_path: Path) -> None:
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "file"
    fill(here, 1)
    fill(there, 1)
    assert "0 pages" in run("save", here, file, "--api-key", "key")[1]
    run("save", here, file)
    assert "3 pages added" in run("load", there, file, "--api-key", "key")[1]
    assert "0 pages added" in run("load", there, file, "--api-key", "key")[1]


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("cut", "cut off"),
        ("magic", "not written by"),
        ("model", "model differ"),
        ("format", "format differ"),
        ("flip", "has changed"),
        ("head", "damaged"),
    ],
)
def test_files_that_are_not_right_are_refused(tmp_path: Path, harm: str, problem: str) -> None:
    fill(tmp_path / "here", 2)
    folder = offline.open_part(tmp_path / "here", PRINT.digest)
    saved = io.BytesIO()
    offline.save(folder, saved)
    folder.close()
    data = saved.getvalue()
    flipped, headless = bytearray(data), bytearray(data)
    flipped[-7] ^= 1
    headless[data.index(b"cpu") - 3] ^= 0xFF
    others: dict[str, dict[str, Any]] = {"model": {"model": "other"}, "format": {"format": FORMAT - 1}}
    other = replace(PRINT, **others.get(harm, {}))
    fill(tmp_path / "there", 0, other)
    into = offline.open_part(tmp_path / "there", other.digest)
    file = tmp_path / "file"
    file.write_bytes({"cut": data[:-100], "magic": b"x" + data, "flip": flipped, "head": headless}.get(harm, data))
    with pytest.raises(LoadError, match=problem):
        offline.load(into, file)
    assert len(into.index) == (5 if harm == "flip" else 0), "pages before the damaged one are good"
    into.close()


def test_a_folder_in_use_and_a_folder_of_others(tmp_path: Path) -> None:
    code, said = run("list", tmp_path)
    assert code == 2 and said.startswith("error: ") and "holds no disk cache" in said
    fill(tmp_path)
    folder = CacheFolder(tmp_path, PRINT, 1000)
    assert run("list", tmp_path)[0] == 2
    folder.close()
