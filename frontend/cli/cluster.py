"""``branchwise cluster``: replicas behind routers, on Ray Serve."""

from __future__ import annotations

import math
import os
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import EXIT_FAILED, err, expected_failures, out

if TYPE_CHECKING:
    from ..cluster.config import ClusterConfig

app = typer.Typer(
    no_args_is_help=True,
    help="Serve with several replicas, on this machine or on a Ray cluster. Needs `pip install 'ray[serve]' pyyaml`.",
)
NODE_CPUS = 2.0  # of a Ray that is started here, beside those of the replicas


@app.command()
def up(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What to start: cluster.yaml. See docs/cluster.md.")],
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready, on a Ray cluster that runs already.")
    ] = False,
) -> None:
    """Start a cluster, or change a running one to what FILE says.

    Joins the Ray cluster that RAY_ADDRESS names or that runs on this machine; without one, or with RAY_ADDRESS=local,
    starts Ray on this machine until Ctrl-C. Running replicas keep their caches if only the number of replicas or
    routers has changed. Replicas that are stopped or replaced finish their requests first.
    """
    with expected_failures():
        from ..cluster.config import read_cluster_config

        config = read_cluster_config(file)
        _connect(config, must_run=detach)
        from ray import serve

        from ..cluster.serve_app import make_app
        from ..cluster.version import cluster_secret

        application = make_app(config, cluster_secret(config.name))
        serve.start(http_options={"host": config.host, "port": config.port})
        out.print(f"branchwise: starting {config.replicas} replicas", markup=False)
        try:
            serve.run(application, name=config.name, route_prefix="/")
        except RuntimeError as error:
            err.print(f"the cluster did not start: {error}", markup=False)
            raise typer.Exit(EXIT_FAILED) from error
        out.print(f"[bold green]ready[/] at [bold]http://{config.host}:{config.port}[/]")
        if detach:
            return
        ended = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
        out.print("stopping: requests in flight finish first", markup=False)
        serve.delete(config.name)
        serve.shutdown()


@app.command()
def down(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The cluster's name.")] = "branchwise",
) -> None:
    """Stop a cluster that was started with --detach, after its requests have finished."""
    with expected_failures():
        _connect(None, must_run=True)
        from ray import serve

        serve.delete(name)


@app.command()
def status() -> None:
    """What runs: replicas by state."""
    with expected_failures():
        _connect(None, must_run=True)
        from ray import serve

        for name, application in serve.status().applications.items():
            out.print(f"{name}: {application.status.value.lower()}", markup=False)
            for deployment, found in application.deployments.items():
                states = ", ".join(f"{count} {state.lower()}" for state, count in found.replica_states.items())
                out.print(f"  {deployment}: {states or 'no replica'}", markup=False)


def _connect(config: ClusterConfig | None, *, must_run: bool) -> None:
    """Joins a Ray cluster, or starts one here. Raises `LoadError`."""
    from ...runtime.errors import LoadError

    try:
        import ray
    except ImportError as error:
        raise LoadError("a cluster needs Ray: pip install 'ray[serve]' pyyaml") from error
    try:
        if os.environ.get("RAY_ADDRESS") == "local":
            del os.environ["RAY_ADDRESS"]  # or the processes of the Ray that is started would inherit it
            raise ConnectionError("RAY_ADDRESS demands a Ray of its own")
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError as error:
        if must_run or config is None:
            raise LoadError("no Ray cluster runs here: start one with `ray start --head`") from error
        cpus = config.most_replicas * config.num_cpus + NODE_CPUS
        gpus = math.ceil(config.most_replicas * config.num_gpus) or None
        ray.init(address="local", num_cpus=int(cpus), num_gpus=gpus, include_dashboard=False, log_to_driver=False)
