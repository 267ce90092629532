"""Ray Serve's request router for replicas of ours: `fleet.view.FleetView` behind Serve's interface.

Serve makes one in every process that calls the replicas, on a loop of its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import aiohttp
import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ...runtime.fleet.instances import instance_tag
from ...runtime.fleet.view import Choice, FleetView, ReplicaReport, RoutingHint
from .registry import register

logger = logging.getLogger(__name__)

SNAPSHOT_SECONDS = 30.0


class BranchwiseRouter(RequestRouter):
    """Takes the request's `RoutingHint`, as msgpack, from the first argument of the call."""

    def initialize_state(self, headers: dict[str, str] | None = None) -> None:
        """``headers``: of requests for snapshots, with the operator's key."""
        self._headers = headers or {}
        self.view: FleetView[str] = FleetView(self._snapshot, instance_tag)
        self.names: tuple[str, ...] = ()
        self._choices: dict[str, Choice[str]] = {}  # by ``RoutingHint.key``, until `ended`
        self._loop: asyncio.AbstractEventLoop | None = None
        register(self)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, then, if it does not take the request, the others.

        The request counts as load of the best one until its gateway calls `ended`. Serve reports no end of a request
        that is cancelled while a replica is chosen for it, and that of an earlier try during the next one.
        """
        self._loop = asyncio.get_running_loop()
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        hint = msgspec.msgpack.decode(pending_request.args[0], type=RoutingHint)
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._withdraw(hint.key)  # an earlier try
        choice = self.view.choose(time.monotonic(), hint, by_name)
        if choice is None:
            return [candidate_replicas]
        self._choices[hint.key] = choice
        if not hint.key or pending_request.future.done():  # it has no gateway, or was cancelled: nobody calls `ended`
            self._withdraw(hint.key)
        others = [replica for name, replica in by_name.items() if name != choice.replica]
        return [[by_name[choice.replica]], others] if others and hint.instance is None else [[by_name[choice.replica]]]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if not pending_request.args:
            return
        key = msgspec.msgpack.decode(pending_request.args[0], type=RoutingHint).key
        choice = self._choices.get(key)
        if choice is not None and choice.replica != replica_id.unique_id:  # the best one did not take it
            self._withdraw(key)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self.view.remove(replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._follow(replicas)

    def started(self, key: str) -> None:
        """See `registry.LiveRouter`."""
        if self._loop is not None and key in self._choices:
            self._loop.call_soon_threadsafe(self._started, key)

    def ended(self, key: str) -> None:
        """See `registry.LiveRouter`."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ended, key)

    def _started(self, key: str) -> None:
        choice = self._choices.get(key)
        if choice is not None:
            self.view.started(choice)

    def _ended(self, key: str) -> None:
        choice = self._choices.pop(key, None)
        if choice is not None:
            self.view.ended(choice)

    def _withdraw(self, key: str) -> None:
        choice = self._choices.pop(key, None)
        if choice is not None:
            self.view.withdrawn(choice)

    def _follow(self, replicas: list[RunningReplica]) -> None:
        """Updates the view by the replicas' last reports. O(replicas), so not for each request: Serve calls
        `update_replicas` whenever a report has changed."""
        reports: dict[str, ReplicaReport | None] = {}
        for replica in replicas:
            stats = replica.routing_stats
            reports[replica.replica_id.unique_id] = msgspec.convert(stats, ReplicaReport) if stats else None
        self.view.update(reports)
        self.names = tuple(reports)

    async def _snapshot(self, url: str) -> bytes:
        timeout = aiohttp.ClientTimeout(total=SNAPSHOT_SECONDS)
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.get(f"{url}/cache/events/snapshot", headers=self._headers) as answer,
        ):
            answer.raise_for_status()
            return await answer.read()
