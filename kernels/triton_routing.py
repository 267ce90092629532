"""Routing of tokens to experts in Triton: the choice of experts in one kernel, the order of the experts in another."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import ops
from .ops import Routing
from .triton_launch import kernel

_CHUNK = 1024  # slots that a program of `_align` reads at a time


@kernel()
def _route(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORES: tl.constexpr,
    BIAS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    expert, nth = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    exists = expert < EXPERTS
    logits = tl.load(logits_ptr + token * EXPERTS + expert, exists, other=float("-inf")).to(tl.float32)
    if SCORES == "sigmoid":
        scores = tl.sigmoid(logits)
    else:
        scores = tl.exp(logits - tl.max(logits, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    choice = scores
    if BIAS:
        choice += tl.load(bias_ptr + expert, exists, other=0.0)
    choice = tl.where(exists, choice, float("-inf"))
    weights = tl.zeros([BLOCK_K], tl.float32)
    ids = tl.zeros([BLOCK_K], tl.int32)
    for i in tl.static_range(TOP_K):
        best = tl.argmax(choice, axis=0)
        weights = tl.where(nth == i, tl.sum(tl.where(expert == best, scores, 0.0), axis=0), weights)
        ids = tl.where(nth == i, best, ids)
        choice = tl.where(expert == best, float("-inf"), choice)
    if NORMALIZE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    at = token * TOP_K + nth
    tl.store(weights_ptr + at, weights * SCALE, nth < TOP_K)
    tl.store(ids_ptr + at, ids, nth < TOP_K)


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """See `ops.route`, which serves sparsemixer and experts in groups here too."""
    if routing.scores == "sparsemixer" or routing.groups > 1:
        return ops.route(logits, bias, routing)
    (tokens, experts), top_k = logits.shape, routing.top_k
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        block = triton.next_power_of_2(experts)
        _route(
            (tokens, 1, 1),
            (logits, weights if bias is None else bias, weights, ids),
            (),
            (
                *(experts, top_k, routing.scores, bias is not None, routing.normalize, routing.scale),
                *(block, triton.next_power_of_2(top_k)),
            ),
            warps=max(1, min(4, block // 128)),
        )
    return weights, ids


@kernel("slots")
def _align(
    ids_ptr: tl.tensor,
    place_ptr: tl.tensor,
    order_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    slots: tl.tensor,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One expert. All count the slots of every expert, so that none has to wait for another."""
    mine, bins = tl.program_id(0), tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for at in range(0, slots, CHUNK):
        slot = at + tl.arange(0, CHUNK)
        counts += tl.histogram(tl.load(ids_ptr + slot, slot < slots, other=EXPERTS), BINS)
    of_experts = tl.where(bins < EXPERTS, counts, 0)
    block_counts = (of_experts + (ROWS - 1)) // ROWS
    first = tl.sum(tl.where(bins < mine, of_experts, 0), axis=0)
    count = tl.sum(tl.where(bins == mine, of_experts, 0), axis=0)
    first_block = tl.sum(tl.where(bins < mine, block_counts, 0), axis=0)
    tl.store(ends_ptr + mine, first + count)
    for block in range((count + (ROWS - 1)) // ROWS):
        tl.store(blocks_ptr + 2 * (first_block + block), mine)
        tl.store(blocks_ptr + 2 * (first_block + block) + 1, first + block * ROWS)
    if mine == EXPERTS - 1:  # the blocks that there are not
        for at in range(tl.sum(block_counts, axis=0), MAX_BLOCKS, CHUNK):
            empty = at + tl.arange(0, CHUNK)
            tl.store(blocks_ptr + 2 * empty, empty * 0 - 1, empty < MAX_BLOCKS)
    for at in range(0, slots, CHUNK):
        slot = at + tl.arange(0, CHUNK)
        is_mine = tl.load(ids_ptr + slot, slot < slots, other=EXPERTS) == mine
        place = first + tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(place_ptr + slot, place, is_mine)
        tl.store(order_ptr + place, slot, is_mine)
        first += tl.sum(is_mine.to(tl.int32), axis=0)


class Alignment:
    """T tokens, each sent to k of E experts, in order of the experts, and cut into blocks of one expert each.

    A *slot* is one of the experts of one token: token * k + which of its experts. All tensors are int32 on the device;
    no shape depends on a value and none is read back, so that a step can be captured in a CUDA graph.

    Attributes:
        order: ``[T * k]``: the slot at each place in order of the experts.
        place: ``[T * k]``: the place of each slot.
        ends: ``[E]``: behind the last place of each expert.
        blocks: ``[B, 2]``: the expert and the first place of each block of at most ``rows`` places; the expert is -1
            for blocks that the step does not have.
        rows: places of a block.
    """

    def __init__(self, ids: Tensor, experts: int, rows: int) -> None:
        """``ids``: int32 ``[T, k]``, at least one token."""
        slots = ids.numel()
        most = min(experts, slots) + slots // rows
        self.rows, self.top_k = rows, ids.shape[1]
        self.place, self.order = torch.empty((2, slots), dtype=torch.int32, device=ids.device)
        self.ends = torch.empty(experts, dtype=torch.int32, device=ids.device)
        self.blocks = torch.empty((most, 2), dtype=torch.int32, device=ids.device)
        _align(
            (experts, 1, 1),
            (ids, self.place, self.order, self.ends, self.blocks),
            (slots,),
            (experts, rows, most, triton.next_power_of_2(experts + 1), _CHUNK),
            warps=4,
        )
