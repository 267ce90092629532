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
    """Start a cluster, or change a running one to match FILE.

    Joins the Ray cluster that ray_address in FILE or RAY_ADDRESS names, or any that runs on this machine, also one of
    another program. Without one, or with `ray_address: local`, starts Ray here until Ctrl-C. Running replicas keep
    their caches if only the number of replicas or routers has changed. Replicas that are stopped or replaced finish
    their requests first.
    """
    with expected_failures():
        from ..cluster.config import read_cluster_config

        config = read_cluster_config(file)
        _connect(config.ray_address, start=None if detach else config)
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
        _connect("auto")
        from ray import serve

        serve.delete(name)


@app.command()
def status() -> None:
    """What runs: replicas by state."""
    with expected_failures():
        _connect("auto")
        from ray import serve

        for name, application in serve.status().applications.items():
            out.print(f"{name}: {application.status.value.lower()}", markup=False)
            for deployment, found in application.deployments.items():
                states = ", ".join(f"{count} {state.lower()}" for state, count in found.replica_states.items())
                out.print(f"  {deployment}: {states or 'no replica'}", markup=False)


def _connect(address: str, start: ClusterConfig | None = None) -> None:
    """Joins the Ray cluster at ``address`` (`ClusterConfig.ray_address`), or starts one for ``start`` on this machine.
    Raises `LoadError`."""
    from ...runtime.errors import LoadError

    try:
        import ray
    except ImportError as error:
        raise LoadError("a cluster needs Ray: pip install 'ray[serve]' pyyaml") from error
    if address == "auto" and os.environ.get("RAY_ADDRESS") == "local":
        address = "local"
    if address != "local":
        try:
            joined = ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            if address != "auto":
                raise LoadError(f"ray_address: no Ray cluster answers at {address}: {error}") from error
        else:
            if start is not None:
                out.print(f"branchwise: joined Ray at {joined.address_info['gcs_address']}", markup=False)
            return
    if start is None:
        raise LoadError("no Ray cluster runs here: start one with `ray start --head`, or set RAY_ADDRESS")
    os.environ.pop("RAY_ADDRESS", None)  # the processes of the Ray that is started would inherit it
    cpus = start.most_replicas * start.num_cpus + NODE_CPUS
    gpus = math.ceil(start.most_replicas * start.num_gpus) or None
    own = ray.init(address="local", num_cpus=int(cpus), num_gpus=gpus, include_dashboard=False, log_to_driver=False)
    out.print(f"branchwise: started Ray at {own.address_info['gcs_address']}", markup=False)
