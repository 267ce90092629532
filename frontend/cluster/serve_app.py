"""The Ray Serve application: gateways and replicas as deployments."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import AutoscalingConfig, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from ...runtime.config import ServerConfig
from ...runtime.errors import LoadError
from ...runtime.fleet.instances import instance_tag
from ...runtime.fleet.view import RoutingHint
from . import registry
from .config import ClusterConfig
from .forward import ForwardedRequest, Head, NoReplica, ReplicaGone
from .gateway import Gateway
from .replica import SPARE_SECONDS, ReplicaProcess, stop_seconds
from .request_router import BranchwiseRouter
from .version import application_version

logger = logging.getLogger(__name__)

REPORT_SECONDS = 1.0  # between two reports of a replica
HEALTH_SECONDS = 5.0
WARM_SECONDS = 60.0  # to ask another replica for its most used prefixes
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class EngineReplica:
    """One server. Its actor ends when the server does, so that Serve starts another at once."""

    async def __init__(  # type: ignore[misc]
        self, config: bytes, *, loopback: bool, start_seconds: float, warm_prefixes: int
    ) -> None:
        server = msgspec.json.decode(config, type=ServerConfig)
        context = serve.get_replica_context()
        host = "127.0.0.1" if loopback else get_node_ip_address()
        events = f"tcp://{host}:*"
        server = msgspec.structs.replace(server, host=host, kv_events=events, kv_events_replay=events)
        self._process = ReplicaProcess(server, context.replica_id.unique_id)
        await self._process.start(start_seconds)
        await self._warm(warm_prefixes, context.app_name, context.deployment)
        self._stopping = False
        self._watch = asyncio.create_task(self._end_with_server())

    async def _warm(self, prefixes: int, app: str, deployment: str) -> None:
        """Computes the most used prefixes of another replica, if there is one."""
        if not prefixes or not another_runs(app, deployment):
            return
        with contextlib.suppress(Exception):
            handle: DeploymentHandle = serve.get_deployment_handle(deployment, app)
            async with asyncio.timeout(WARM_SECONDS):
                found = await handle.hottest.remote(msgspec.msgpack.encode(RoutingHint()), prefixes)
            await self._process.warm(found)
            logger.info("warmed with %d prefixes", len(found))

    async def _end_with_server(self) -> None:
        await self._process.wait()
        if not self._stopping:
            logger.error("the server of replica %s has ended", self._process.name)
            os._exit(1)

    async def forward(self, hint: bytes, request: bytes) -> AsyncIterator[bytes]:
        """The answer: a `Head` as msgpack, then pieces of the body.

        Raises `NoReplica` if the request is for another replica's branch or pin: a router of Serve cannot refuse a
        request, so one for a replica that is gone arrives at any other.
        """
        instance = msgspec.msgpack.decode(hint, type=RoutingHint).instance
        if instance is not None and instance != instance_tag(self._process.name):
            raise NoReplica("the replica that the request is for is gone")
        async with contextlib.aclosing(
            self._process.forward(msgspec.msgpack.decode(request, type=ForwardedRequest))
        ) as parts:
            async for part in parts:
                yield msgspec.msgpack.encode(part) if isinstance(part, Head) else part

    async def hottest(self, hint: bytes, count: int) -> list[dict[str, Any]]:
        """Its most used prefixes."""
        return await self._process.hottest(count)

    async def record_routing_stats(self) -> dict[str, Any]:
        """The report for routers."""
        report: dict[str, Any] = msgspec.to_builtins(await self._process.report())
        return report

    async def check_health(self) -> None:
        """Raises if the server does not answer. Whether its engine hangs is the server's to decide (`hang_timeout`)."""
        if await self._process.status() is None:
            raise RuntimeError(f"the server of replica {self._process.name} does not answer")

    async def __del__(self) -> None:
        self._stopping = True
        await self._process.stop()


def another_runs(app: str, deployment: str) -> bool:
    """Whether another replica runs already."""
    found = serve.status().applications.get(app)
    states = (
        {} if found is None or deployment not in found.deployments else found.deployments[deployment].replica_states
    )
    return any(str(getattr(state, "value", state)) == "RUNNING" and count for state, count in states.items())


class ClusterGateway:
    """One gateway."""

    def __init__(self, config: bytes, replicas: DeploymentHandle) -> None:
        self._replicas = replicas.options(stream=True, method_name="forward")
        self._config = msgspec.json.decode(config, type=ServerConfig)

    def __serve_build_asgi_app__(self) -> Gateway:
        return Gateway(self._config, self._dispatch, registry.members, registry.block_size)

    async def _dispatch(self, request: ForwardedRequest, hint: RoutingHint) -> AsyncGenerator[Head | bytes]:
        hint.key = uuid.uuid4().hex
        # In an empty context. Serve gives every call made while a request is handled that request's id, and its router
        # confuses calls of one id that run at once: one goes to the other's replica, and one is never sent.
        encoded = msgspec.msgpack.encode(hint), msgspec.msgpack.encode(request)
        parts = contextvars.Context().run(self._replicas.remote, *encoded)
        first = head = True
        try:
            async for part in parts:
                if head:
                    head = False
                    yield msgspec.msgpack.decode(part, type=Head)
                    continue
                if first:
                    first = False
                    registry.started(hint.key)
                yield part
        except NoReplica:
            raise
        except (BackPressureError, DeploymentUnavailableError) as error:
            raise NoReplica(str(error)) from error
        except (ReplicaGone, RayError, RayServeException) as error:
            raise ReplicaGone(type(error).__name__, getattr(error, "replica", None)) from error
        finally:
            with contextlib.suppress(Exception):  # of a request that found no replica it raises that again
                parts.cancel()
            registry.ended(hint.key)  # after the cancellation: no replica is chosen for the request any more


def autoscaling_of(cluster: ClusterConfig) -> AutoscalingConfig | None:
    """How Serve changes the number of replicas; None if it is fixed. Raises `LoadError` for a wrong setting."""
    if cluster.most_replicas == cluster.replicas:
        return None
    unknown = cluster.autoscaling_config.keys() - AutoscalingConfig.model_fields.keys()
    if unknown:
        raise LoadError(f"autoscaling_config: Ray Serve has no setting {', '.join(sorted(unknown))}")
    try:
        return AutoscalingConfig(
            min_replicas=cluster.replicas,
            max_replicas=cluster.most_replicas,
            target_ongoing_requests=cluster.target_ongoing_requests,
            **cluster.autoscaling_config,
        )
    except ValueError as error:
        raise LoadError(f"autoscaling_config: {error}") from error


def make_app(cluster: ClusterConfig, secret: str) -> serve.Application:
    """The application of a cluster. ``secret``: see `ServerConfig.namespace_secret`. Raises `LoadError`.

    Configs that differ only in how many replicas and routers there are give deployments of one version: Serve then
    adds and stops replicas and leaves the others as they are.
    """
    server = cluster.replica(secret)
    config = msgspec.json.encode(server)
    settings: dict[str, Any] = {
        "loopback": cluster.host in _LOOPBACK,
        "start_seconds": cluster.start_seconds,
        "warm_prefixes": cluster.warm_prefixes,
    }
    version = application_version(server, settings, cluster.generation)
    key = server.admin_api_key or server.api_key
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    autoscaling = autoscaling_of(cluster)
    scaling = {"num_replicas": cluster.replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    drain = stop_seconds(server) + SPARE_SECONDS
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        # Serve's default of 5 would leave the engine idle, and its 20 s would cut answers off.
        max_ongoing_requests=server.max_queued_requests,
        graceful_shutdown_timeout_s=drain,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
        health_check_timeout_s=30.0,
        ray_actor_options={"num_cpus": cluster.num_cpus, "num_gpus": cluster.num_gpus},
        request_router_config=RequestRouterConfig(
            request_router_class=BranchwiseRouter,
            request_router_kwargs={"headers": headers},
            request_routing_stats_period_s=REPORT_SECONDS,
            request_routing_stats_timeout_s=10.0,
        ),
        **scaling,
    )
    gateway = serve.deployment(
        serve.ingress()(ClusterGateway),
        name="gateway",
        num_replicas=cluster.routers,
        max_ongoing_requests=server.max_queued_requests * cluster.most_replicas,
        graceful_shutdown_timeout_s=drain,
        ray_actor_options={"num_cpus": 0.1},
    )
    return _versioned(gateway, version).bind(config, _versioned(engine, version).bind(config, **settings))


def _versioned(deployment: serve.Deployment, version: str) -> serve.Deployment:
    """Sets the version, which Serve otherwise draws at random for each `serve.run`, replacing every replica.

    A config file of Serve gets a version from its contents, but Serve logs its arguments, here with API keys, and
    deletes applications that are not in it. So this uses the option that Serve sets for such a file.
    """
    try:
        return deployment.options(version=version, _internal=True)
    except (TypeError, ValueError):  # not a public option
        logger.warning("this version of Ray Serve replaces all replicas at every `up`")
        return deployment
