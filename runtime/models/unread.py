"""Warnings of what a checkpoint holds and the model served does not use."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .folder import ADAPTER, MERGE

logger = logging.getLogger(__name__)

_MAX_NAMED = 8  # groups of tensors in a warning


def warn_of_adapter(folder: Path) -> None:
    """Warns of a LoRA adapter beside the model."""
    if (folder / ADAPTER).is_file():
        logger.warning("%s: this LoRA adapter is not used: %s", folder / ADAPTER, MERGE)


def warn_of_unread(unread: Sequence[str], layers: tuple[str, ...]) -> None:
    """Warns of tensors that are not read. ``layers``: prefixes of the names in the model's layers, of which an unread
    tensor may mean that the model is another one."""
    of_layers = [name for name in unread if name.startswith(layers)]
    if of_layers:
        logger.warning("%d tensors of the checkpoint's layers are not used, such as %s", len(of_layers), of_layers[0])
    others = Counter(name.split(".layers.")[0] for name in unread if not name.startswith(layers))
    if others:
        groups = ", ".join(f"{name} ({count})" for name, count in others.most_common(_MAX_NAMED))
        logger.warning("%d tensors of the checkpoint are no part of the model served: %s", others.total(), groups)
    if any("lora_" in name for name in unread):
        logger.warning("the checkpoint holds a LoRA adapter that is not merged and not used: %s", MERGE)
