"""Three replicas, each a server in a process of its own, and gateways to them in this process. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import aiohttp
import httpx
import pytest
import uvicorn

from branchwise.frontend.cluster.config import ClusterConfig
from branchwise.frontend.cluster.forward import ForwardedRequest, Head, NoReplica, ReplicaGone
from branchwise.frontend.cluster.gateway import Gateway
from branchwise.frontend.cluster.replica import ReplicaProcess
from branchwise.runtime.config import ServerConfig
from branchwise.runtime.fleet.instances import instance_tag
from branchwise.runtime.fleet.view import FleetView, RoutingHint

REPORT_SECONDS = 0.2
NULL = {"null_executor": True, "null_step_seconds": 0.002, "stats_log_seconds": 0.0}
ENGINE = {"kv_cache_tokens": 32_768, "max_model_len": 4096, "check_when_idle": True}


class LocalGateway:
    """A gateway with a view of its own: what a router process is under Ray."""

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self.view: FleetView[str] = FleetView(self._snapshot, instance_tag)
        self.app = Gateway(cluster.config, self.dispatch, lambda: list(cluster.replicas), lambda: 16)
        self._server: uvicorn.Server | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self.lost = 0  # reports that did not come

    async def _snapshot(self, url: str) -> bytes:
        replica = next(each for each in self.cluster.replicas.values() if each.url == url)
        return await replica.snapshot()

    async def dispatch(self, request: ForwardedRequest, hint: RoutingHint) -> AsyncGenerator[Head | bytes]:
        choice = self.view.choose(time.monotonic(), hint, list(self.cluster.replicas))
        if choice is None:
            raise NoReplica("none is left")
        try:
            replica = self.cluster.replicas[choice.replica]
            async with contextlib.aclosing(replica.forward(request)) as parts:
                async for part in parts:
                    if not isinstance(part, Head):
                        self.view.started(choice)
                    yield part
        except ReplicaGone:
            if await replica.status() is None:
                self.cluster.replicas.pop(choice.replica, None)
                self.view.remove(choice.replica)
            raise
        finally:
            self.view.ended(choice)

    async def start(self, watch: bool) -> None:
        """``watch``: look at the replicas' reports a few times a second. Without, `refresh` does it when called: a
        report that happens to be taken in mid-request changes where the next prompt goes."""
        await self.refresh()
        if watch:
            self._tasks.append(asyncio.create_task(self._watch()))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(self.app, log_level="warning", lifespan="off", timeout_keep_alive=600)
        )
        self._tasks.append(asyncio.create_task(self._server.serve([listening])))
        self.http = httpx.AsyncClient(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=None))
        await self.settled()

    async def _watch(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(REPORT_SECONDS)

    async def refresh(self) -> None:
        reports: dict[str, Any] = {}
        for name, replica in list(self.cluster.replicas.items()):
            try:
                reports[name] = await replica.report()
            except (ReplicaGone, aiohttp.ClientError):
                self.lost += 1
                reports[name] = None
        self.view.update({name: report for name, report in reports.items() if name in self.cluster.replicas})

    async def settled(self) -> None:
        """Until the view knows everything of every replica."""
        for _ in range(1200):
            view = self.view
            if len(view._numbers) == len(self.cluster.replicas) and not any(
                view.router.unsure[number] for number in view._numbers.values()
            ):
                return
            await asyncio.sleep(0.05)
        raise AssertionError("the gateway does not know its replicas")

    async def caught_up(self) -> None:
        """Until the view has applied every event that its replicas have published so far."""
        for name, (_, follower) in list(self.view._followers.items()):
            published = json.loads(await self.cluster.replicas[name].snapshot())["seq"]
            follower.published(published)
            async with asyncio.timeout(60):
                while follower._last < published:
                    await asyncio.sleep(0.01)
        await self.settled()

    async def stop(self) -> None:
        self.view.close()
        await self.http.aclose()
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
        for task in self._tasks[:-1]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class LocalCluster:
    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.replicas: dict[str, ReplicaProcess] = {}
        self.gateways: list[LocalGateway] = []
        self._made: list[ReplicaProcess] = []  # also those that have left

    async def add(self) -> ReplicaProcess:
        replica = ReplicaProcess(self.config, f"replica-{len(self._made) + 1}")
        self._made.append(replica)
        await replica.start(240.0)
        self.replicas[replica.name] = replica
        return replica

    async def gateway(self, watch: bool = False) -> LocalGateway:
        gateway = LocalGateway(self)
        self.gateways.append(gateway)
        await gateway.start(watch)
        return gateway

    async def close(self) -> None:
        for gateway in self.gateways:
            await gateway.stop()
        for replica in self._made:
            await replica.kill()


@pytest.fixture
async def start_cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Any]:
    """``await start_cluster(replicas, engine={...}, server={...})``."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    made: list[LocalCluster] = []

    async def start(replicas: int = 3, *, engine: dict[str, Any] | None = None, **server: Any) -> LocalCluster:
        settings = ClusterConfig(replicas=replicas, engine=ENGINE | (engine or {}), server=NULL | server)
        cluster = LocalCluster(settings.replica("a secret of the test"))
        made.append(cluster)
        started = await asyncio.gather(*(cluster.add() for _ in range(replicas)))
        cluster.replicas = {replica.name: replica for replica in started}
        return cluster

    yield start
    for cluster in made:
        await cluster.close()
