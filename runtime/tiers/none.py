"""The scheduler's interface to memory tiers, for an engine that has none below its device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

from ...radix.node import Int32, Namespace
from ..messages import Stats
from .copies import Ended, HostCopies
from .jobs import DiskJobs

Reason = Literal["", "late", "failed", "full", "slower"]  # why tokens of a lower tier were computed instead


class Request(Protocol):
    """The fields of a queued request that tiers use."""

    id: int
    namespace: Namespace
    retractions: int

    @property
    def tokens(self) -> Int32: ...

    @property
    def reuse_limit(self) -> int: ...


class Served(NamedTuple):
    """The tiers from which a request's reused tokens came."""

    host: int = 0
    disk: int = 0
    reason: Reason = ""


class NoTiers:
    """See `manager.TierManager`, which overrides all of it."""

    exist = False
    jobs: DiskJobs | None = None  # of the disk tier, if there is one

    @property
    def busy(self) -> bool:
        return False

    def poll(self) -> list[Ended]:
        return []

    def apply(self, ended: Sequence[Ended]) -> None:
        pass

    def begin(self) -> HostCopies | None:
        return None

    def should_wait(self, request: Request) -> bool:
        return False

    def served(self, request: Request, hit: int) -> Served:
        return Served()

    def used(self, namespace: Namespace, prefix: Int32) -> None:
        pass

    def forget(self, request_id: int) -> None:
        pass

    def step_ended(self, prompt_tokens: int, tokens: int) -> None:
        pass

    def idle(self) -> None:
        pass

    def distrust(self) -> None:
        pass

    def write_everything(self) -> bool:
        return False

    def count(self, totals: Stats) -> None:
        pass
