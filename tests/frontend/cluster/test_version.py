"""The cluster's secret, and the version of its deployments. No Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from branchwise.frontend.cluster.config import ClusterConfig
from branchwise.frontend.cluster.version import application_version, cluster_secret
from branchwise.runtime.errors import LoadError


def test_the_secret_is_kept_for_its_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    secret = cluster_secret("a")
    assert len(secret) == 64 and cluster_secret("a") == secret != cluster_secret("b")
    [file] = (tmp_path / "state" / "branchwise" / "cluster-a").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    cluster_secret("../../up")
    assert sorted(path.name for path in tmp_path.rglob("*up*")) == ["cluster-..%2F..%2Fup"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(LoadError, match="XDG_STATE_HOME"):
        cluster_secret("a")


def test_the_version_is_of_what_a_replica_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def version(cluster: ClusterConfig, secret: str = "s") -> str:
        settings = {"warm_prefixes": cluster.warm_prefixes}
        return application_version(cluster.replica(secret), settings, cluster.generation)

    first = version(ClusterConfig())
    for same in (ClusterConfig(replicas=3), ClusterConfig(max_replicas=9, routers=4, target_ongoing_requests=1.0)):
        assert version(same) == first
    other = [
        version(ClusterConfig(), "t"),
        version(ClusterConfig(generation=1)),
        version(ClusterConfig(warm_prefixes=1)),
        version(ClusterConfig(drain_seconds=1.0)),
        version(ClusterConfig(engine={"max_num_seqs": 8})),
        version(ClusterConfig(server={"api_key": "k"})),
    ]
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / "a.py").write_text("1")
    monkeypatch.setattr("branchwise.frontend.cluster.version._PACKAGE", tmp_path)
    other.append(version(ClusterConfig()))
    (tmp_path / "runtime" / "a.py").write_text("2")
    other.append(version(ClusterConfig()))
    assert len({first, *other}) == 9
