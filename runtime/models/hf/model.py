"""From a model of transformers on the CPU to a decoder on a rank's device."""

from __future__ import annotations

from typing import Any

import torch

from ....kernels.base import Ops
from ...parallel.group import TensorGroup
from ..weights import rank_config
from .config import TransformersConfig
from .cuts import cut_parameters, cuts_of
from .decoder import TransformersDecoder
from .linear import replace_linears
from .locality import check_locality
from .norm import replace_norms


def make_decoder(
    config: TransformersConfig, model: Any, ops: Ops, device: torch.device, group: TensorGroup, *, int8: bool
) -> TransformersDecoder:
    """Moves the rank's part of ``model`` to ``device``, with linear layers of ours. Raises `LoadError` for a model
    whose steps depend on more than what our pages hold."""
    cuts = cuts_of(model, group.size)
    with torch.inference_mode():
        replace_norms(model, ops)
    cut_parameters(model, cuts, group)
    replace_linears(model, config, cuts, ops, device, group, int8=int8)
    decoder = TransformersDecoder(rank_config(config, group.size), model, ops)
    check_locality(decoder, device)
    return decoder
