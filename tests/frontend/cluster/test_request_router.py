"""Ray Serve's request router over replicas that exist by name only: what counts as load, and for how long."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

pytest.importorskip("ray")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import PendingRequest

from branchwise.frontend.cluster.forward import ForwardedRequest, NoReplica
from branchwise.frontend.cluster.request_router import BranchwiseRouter
from branchwise.frontend.cluster.serve_app import ClusterGateway
from branchwise.runtime.fleet.view import RoutingHint

REQUEST = ForwardedRequest("POST", "/v1/completions", [], b"")


class NamedReplica:
    """The attributes of Serve's `RunningReplica` that choosing uses. It answers how long its queue is once it may."""

    def __init__(self, name: str, answers: asyncio.Event) -> None:
        self.replica_id = ReplicaID(name, DeploymentID("engine", "branchwise"))
        self.routing_stats: dict[str, Any] = {}
        self.max_ongoing_requests = 100
        self.probed = asyncio.Event()
        self._answers = answers

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probed.set()
        await self._answers.wait()
        return 0


class Fleet:
    """A request router, its replicas, and a gateway whose calls go as far as Serve's choice of a replica."""

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.router = BranchwiseRouter(DeploymentID("engine", "branchwise"), DeploymentHandleSource.REPLICA)
        self.router.queue_len_response_deadline_s = self.router.max_queue_len_response_deadline_s = 3600.0
        self.router.initialize_state()
        self.replicas = [NamedReplica(name, self.answers) for name in "abc"]
        self.requests: list[PendingRequest] = []
        self.parts: list[_Parts] = []
        self.gateway = object.__new__(ClusterGateway)
        self.gateway._replicas = SimpleNamespace(remote=self._remote)

    def _remote(self, *args: bytes) -> Any:
        request = PendingRequest(list(args), {}, RequestMetadata("r", f"id-{len(self.requests)}"))
        self.requests.append(request)
        self.parts.append(_Parts(asyncio.create_task(self.router._choose_replica_for_request(request))))
        return self.parts[-1]

    def ask(self) -> asyncio.Task[Any]:
        """A request of a prompt of 100 blocks."""
        parts = self.gateway._dispatch(REQUEST, RoutingHint(prompt_tokens=1600, hashes=list(range(1, 101))))
        return asyncio.create_task(anext(parts))

    def loads(self) -> list[float]:
        """Prompt tokens and running requests by replica, then the number of blocks in flight and of choices."""
        fleet = self.router.view.router
        return [*fleet._loads[:2].ravel().tolist(), len(fleet._in_flight.holders), len(self.router._choices)]


class _Parts:
    """A `DeploymentResponseGenerator` that waits for its replica."""

    def __init__(self, chosen: asyncio.Task[Any]) -> None:
        self._chosen, self._refused = chosen, False

    def __aiter__(self) -> _Parts:
        return self

    async def __anext__(self) -> bytes:
        await asyncio.wait([self._chosen])
        raise BackPressureError(1, 1)

    def refuse(self) -> None:
        """As Serve does when it has no room for the request."""
        self._refused = self._chosen.cancel()

    def cancel(self) -> None:
        self._chosen.cancel()
        if self._refused:
            raise BackPressureError(1, 1)


async def until(true: Any) -> None:
    async with asyncio.timeout(300):
        while not true():
            await asyncio.sleep(0)


async def test_a_request_cancelled_while_its_replica_is_chosen_leaves_no_load() -> None:
    """Serve reports no end of such a request, so its gateway does."""
    fleet = Fleet()
    fleet.router.update_replicas(fleet.replicas)
    asked = fleet.ask()
    await until(lambda: sum(fleet.loads()) == 1600 + 100 + 1)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: fleet.requests[0].future.cancelled() and not sum(fleet.loads()))
    await fleet.router.choose_replicas(fleet.replicas, fleet.requests[0])  # one more try, begun before
    assert not sum(fleet.loads())


async def test_a_request_cancelled_as_its_replica_is_found_leaves_no_load() -> None:
    """Serve drops the replica that it has found: it reports neither that the request was routed nor that it ended."""
    fleet = Fleet()
    fleet.router.update_replicas(fleet.replicas)
    asked = fleet.ask()
    await until(lambda: sum(fleet.loads()))
    fleet.requests[0].future.add_done_callback(lambda _: asked.cancel())
    fleet.answers.set()
    await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: not sum(fleet.loads()))
    assert not fleet.requests[0].future.cancelled()


async def test_a_request_that_serve_refuses_ends_as_one_without_a_replica() -> None:
    """Serve's `cancel` raises the refusal again."""
    fleet = Fleet()
    fleet.router.update_replicas(fleet.replicas)
    asked = fleet.ask()
    await until(lambda: sum(fleet.loads()))
    fleet.parts[0].refuse()
    with pytest.raises(NoReplica):
        await asked
    await until(lambda: not sum(fleet.loads()))


async def test_only_the_try_that_a_replica_took_counts() -> None:
    """A request of which nobody says that it has ended, such as a new replica's for prefixes, never counts."""
    fleet = Fleet()
    fleet.router.update_replicas(fleet.replicas)
    fleet.answers.set()
    hint = RoutingHint(key="k", prompt_tokens=1600, hashes=list(range(1, 101)))
    request = PendingRequest([msgspec.msgpack.encode(hint)], {}, RequestMetadata("r", "id"))
    recent = fleet.router.view.router._loads[4]
    for _ in range(3):
        [best], others = await fleet.router.choose_replicas(fleet.replicas, request)
        assert sum(fleet.loads()) == 1600 + 100 + 1 and sum(recent) == 1600
        fleet.router.on_request_completed(best.replica_id, "id")  # Serve's report of an earlier try may come now
        fleet.router.on_request_routed(request, best.replica_id, None)
        assert sum(fleet.loads()) == 1600 + 100 + 1
    fleet.router.on_request_routed(request, others[0].replica_id, None)
    assert not sum(fleet.loads()) and not sum(recent), "another one took it: its own reports show it"
    for nobody in ([msgspec.msgpack.encode(RoutingHint(prompt_tokens=64))], []):
        await fleet.router.choose_replicas(fleet.replicas, PendingRequest(nobody, {}, RequestMetadata("r", "id-2")))
        assert not sum(fleet.loads()) and not sum(recent)
