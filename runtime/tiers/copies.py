"""The contract between the tier manager, which decides, and what moves the bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...radix.node import Int32


class Ended(NamedTuple):
    """A copy has ended: its first ``good`` pages arrived. An input of the planner, like a step's result."""

    id: int
    good: int
    seconds: float  # that the copy itself took
    damaged: bool = False  # what failed is wrong where it came from


@dataclass(slots=True)
class HostCopies:
    """Copies between the KV pool and the host, whole pages.

    Stores are started before the step that was planned with them, which may write to their pages; loads after it, since
    it may still copy from their pages. Loads run beside later steps, and end with an `Ended`.
    """

    pages: Int32  # [S] pages to store
    slots: Int32  # [S] where on the host; no slot twice
    after: int  # the last step that may write one of the pages
    loads: list[tuple[int, Int32, Int32]] = field(default_factory=list)  # (id, slots, pages)


class HostCopier(Protocol):
    """Copies between the KV pool and a tier in host memory."""

    num_slots: int
    page_bytes: int
    memory: npt.NDArray[np.uint8]  # [num_slots, page_bytes]

    def store(self, copies: HostCopies) -> None:
        """Starts the stores. What is launched later waits for them."""
        ...

    def load(self, copies: HostCopies) -> None:
        """Starts the loads. They wait for what was launched before."""
        ...

    def stored(self) -> int:
        """The number of `store` calls whose stores are all complete."""
        ...

    def ended(self) -> list[Ended]:
        """The loads that have ended since the last call."""
        ...
