"""Files that commands cannot read or write: one line with the path, once, and what the system says of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from branchwise.frontend.cli.main import app
from branchwise.runtime.engine.profiling import StepProfiler
from branchwise.runtime.errors import LoadError
from branchwise.runtime.tiers.fingerprint import Fingerprint
from branchwise.runtime.tiers.folder import CacheFolder, folder_secret

Damage = Callable[[Path], object]


def refused(*arguments: str | Path) -> str:
    """The line that the command ends with."""
    done = CliRunner().invoke(app, [str(each) for each in arguments], env={"COLUMNS": "400"})
    assert done.exit_code == 2, done.output
    (line,) = done.output.splitlines()
    return line


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: None, "No such file or directory"),
        (Path.mkdir, "Is a directory"),
        (lambda file: file.write_bytes(b"\x92\x85"), None),
        (lambda file: file.write_text("replicas: [\n"), None),
    ],
    ids=["missing", "folder", "bytes", "no yaml"],
)
def test_a_cluster_file_that_cannot_be_read(tmp_path: Path, damage: Damage, said: str | None) -> None:
    pytest.importorskip("yaml")
    file = tmp_path / "cluster.yaml"
    damage(file)
    line = refused("cluster", "up", file)
    assert line.startswith(f"error: {file}: ") and line.count(str(file)) == 1
    assert said is None or line.endswith(said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x92\x85", "invalid start byte"),
        (b'{"timestamp": 1, "hash_ids": [1]}', "a line has no 'input_length'"),
        (b"[", "Expecting value"),
    ],
)
def test_a_file_that_is_no_trace(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(content)
    line = refused("simulate", file)
    assert line.count(str(file)) == 1 and said in line and "Error" not in line


def test_a_key_file_that_is_not_there(tmp_path: Path) -> None:
    file = tmp_path / "key"
    line = refused("serve", "--api-key-file", file)
    assert line == f"error: --api-key-file {file} cannot be read: No such file or directory"


def test_a_result_that_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    CacheFolder(cache, Fingerprint("m", "cpu", "layout", 64), 10).close()
    file = tmp_path / "nowhere" / "result"
    for command in (["bench", "http://127.0.0.1:9", "--out"], ["cache", "save", cache]):
        assert refused(*command, file) == f"error: {file} cannot be written: No such file or directory"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(LoadError, match=f"^the disk cache {file} cannot be used: File exists$"):
        folder_secret(file)
    with pytest.raises(LoadError, match=f"^--profile {file} cannot be used: File exists$"):
        StepProfiler(file)
