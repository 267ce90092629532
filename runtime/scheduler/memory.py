"""The tree of a scheduler and what manages its lower memory tiers."""

from __future__ import annotations

import logging
from typing import NamedTuple

from ...radix.tree import RadixTree
from ..config import EngineConfig
from ..tiers.copies import HostCopier
from ..tiers.disk import DiskTier
from ..tiers.manager import TierManager
from ..tiers.none import NoTiers
from .clock import Clock

logger = logging.getLogger(__name__)


class LowerTiers(NamedTuple):
    """The memory tiers below the device. A disk needs a host, which its pages pass through."""

    host: HostCopier
    disk: DiskTier | None = None


def make_tree(
    config: EngineConfig, num_pages: int, lower: LowerTiers | None, clock: Clock
) -> tuple[RadixTree, NoTiers]:
    """A tree over the device and ``lower``, with what the disk remembers; and what manages the tiers."""
    host, disk = lower or (None, None)
    tree = RadixTree(
        num_pages,
        page_size=config.page_size,
        policy=config.eviction_policy,
        enabled=not config.disable_radix_cache,
        host_slots=0 if host is None else host.num_slots,
        disk_slots=0 if disk is None else disk.folder.max_records,
    )
    if disk is not None:
        tokens = disk.restore(tree)
        logger.info("disk cache: %d tokens of earlier runs in %s", tokens, disk.folder.path)
    if host is None:
        return tree, NoTiers()
    # What comes back from a tier that rounds is not what a preempted request had computed.
    preemption = "recompute" if config.host_cache_dtype == "fp8" else config.preemption
    return tree, TierManager(tree, host, disk, preemption, clock)
