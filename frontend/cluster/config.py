"""``cluster.yaml``: what ``branchwise cluster up`` starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from ...runtime.config import EngineConfig, ServerConfig, check_server
from ...runtime.errors import LoadError, why

REPLICA_LIMIT = 4096  # unfinished requests of one replica, where the server's own limit is not set

# Fields of Ray Serve's `AutoscalingConfig` that are fields of the file itself.
AUTOSCALING_FIELDS = {
    "min_replicas": "replicas",
    "max_replicas": "max_replicas",
    "target_ongoing_requests": "target_ongoing_requests",
}


class ClusterConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A cluster.

    Args:
        name: Of the Ray Serve application.
        host: Address on which the cluster answers, on each node with a proxy.
        port: Port on which it answers.
        replicas: Servers; or, with max_replicas, the fewest.
        max_replicas: Servers at most, started and stopped by load. Default: replicas.
        target_ongoing_requests: Unfinished requests of a replica above which another is started.
        autoscaling_config: Further settings of Ray Serve's `AutoscalingConfig`, by its names. Needs max_replicas.
        routers: Processes that take requests and route them.
        num_cpus: Of each replica, as Ray counts them.
        num_gpus: Of each replica.
        ray_address: Which Ray cluster. "auto": that of the variable RAY_ADDRESS, or any that runs on this machine, or
            else a new one, as long as `up` runs. "local": always a new one. Otherwise the address of its head.
        engine: Settings of the engine, by the names of `serve`'s flags with underscores.
        server: Settings of the server, likewise.
        warm_prefixes: Most used prefixes of another replica that a new one computes before it takes requests.
        drain_seconds: Longest time that a replica which is stopped may take to finish its requests.
        start_seconds: Longest time that a replica may take to load its model.
        generation: Any number. A different one replaces all replicas, for changes that this file does not show.
    """

    name: str = "branchwise"
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 2
    max_replicas: int | None = None
    target_ongoing_requests: float = 32.0
    autoscaling_config: dict[str, Any] = {}
    routers: int = 1
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    ray_address: str = "auto"
    engine: dict[str, Any] = {}
    server: dict[str, Any] = {}
    warm_prefixes: int = 32
    drain_seconds: float = 600.0
    start_seconds: float = 1800.0
    generation: int = 0

    def replica(self, secret: str) -> ServerConfig:
        """The config of every replica but its name. ``secret``: see `ServerConfig.namespace_secret`.

        Raises `LoadError`.
        """
        owned = {"host", "port", "kv_events", "kv_events_replay", "namespace_secret", "drain_seconds"}
        for name in owned & self.server.keys():
            raise LoadError(f"server.{name}: the cluster sets it")
        settings = {**self.server, "engine": self.engine}
        settings |= {
            "port": 0,
            "kv_events": "tcp://127.0.0.1:*",
            "kv_events_replay": "tcp://127.0.0.1:*",
            "namespace_secret": secret,
            "drain_seconds": self.drain_seconds,
        }
        try:
            config = msgspec.convert(settings, ServerConfig, strict=False)
        except msgspec.ValidationError as error:
            raise LoadError(f"cluster: {error}") from error
        unknown = (self.server.keys() - set(ServerConfig.__struct_fields__)) | (
            self.engine.keys() - set(EngineConfig.__struct_fields__)
        )
        if unknown:
            raise LoadError(f"cluster: there is no setting {', '.join(sorted(unknown))}")
        return check_server(config)

    @property
    def most_replicas(self) -> int:
        """Servers at most."""
        return self.replicas if self.max_replicas is None else self.max_replicas


def read_cluster_config(path: Path) -> ClusterConfig:
    """Reads a YAML file. Raises `LoadError`."""
    try:
        found = msgspec.yaml.decode(path.read_bytes(), type=ClusterConfig)
    except ImportError as error:
        raise LoadError("a cluster needs Ray and PyYAML: pip install 'ray[serve]' pyyaml") from error
    except (OSError, msgspec.MsgspecError) as error:
        raise LoadError(f"{path}: {why(error, path)}") from error
    if not 1 <= found.replicas <= found.most_replicas <= 10_000 or found.routers < 1:
        raise LoadError(f"{path}: 1 <= replicas <= max_replicas, and at least one router")
    if found.autoscaling_config and found.most_replicas == found.replicas:
        raise LoadError(f"{path}: autoscaling_config has an effect only with max_replicas above replicas")
    for name in AUTOSCALING_FIELDS.keys() & found.autoscaling_config:
        raise LoadError(f"{path}: autoscaling_config.{name}: {AUTOSCALING_FIELDS[name]} sets it")
    found.replica("checked")
    return found
