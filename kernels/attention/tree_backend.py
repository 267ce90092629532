"""Tree attention: the device reads each shared prefix once for all requests that share it.

A step takes the tree path where `tree_plan` expects that to be faster; otherwise the flat backend serves it. On the
tree path `TreeRunner` runs decodes and chunks alike. Only long chunks of steps that are not captured stay with the flat
backend. A plan serves every step until the composition changes: until then the host only sends the positions of the
query tokens.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ..arrays import Int64, ranges
from ..kv_pool import KVPool
from .base import AttentionBackend, AttentionBatch, LayerSpec, StepShape
from .register_kernel import checked
from .tree_costs import TreeCosts
from .tree_gate import describe
from .tree_plan import TreeLimits, TreePlan, TreeRequests, plan_tree
from .tree_runner import TreeRunner, tree_tiles
from .tree_tuning import calibrate, tune
from .wide_kernel import fits, runs_on

logger = logging.getLogger(__name__)

# Query tokens: longer chunks of steps that are not captured are left to the flat backend. `attend_wide` takes those of
# up to 512, from where on FlashInfer runs `fa3`, where they see so many keys in the mean. On an H200, µs of FlashInfer
# and of `attend_wide`: 60 chunks of 64 on 2,048 tokens 420 and 325, 27 prompts of 300 alone 117 and 160. They are taken
# beside a long chunk too: `dequantized_chunks` may have no room for a copy of all their pages.
SHORT_CHUNK, WIDE_CHUNK, WIDE_KEYS = 16, 512, 384
MAX_GROWTH = 128  # tokens that tails may grow by before their last items are cut again
MIN_DECODES = 8  # smaller steps are not captured on the tree path
SLOTS = 8192  # partial results of query tokens
# For the narrow, the middle and the widest tile: programs that a multiprocessor should have, keys that a program should
# read at least, and items of a captured step for each request.
WORKERS, MIN_KEYS, ITEMS = (8, 2, 1), (128, 256, 256), (1.25, 0.25, 0.375)
_NO_CHUNKS = np.empty(0, np.int64)


class Members(NamedTuple):
    """The requests of a step that are planned together: its decodes and chunks, or the short ones among these."""

    chunks: Int64  # indices into the batch
    requests: TreeRequests
    num_tokens: int  # query tokens of the decodes, with their padding, or of the step where a chunk is a member
    offset: int  # query token at which chunks begin; -1 where no chunk is a member

    def continues(self, earlier: Members) -> bool:
        """Whether these are the same requests, with a few more keys."""
        mine, theirs = self.requests, earlier.requests
        if self.offset != earlier.offset or len(mine.rows) != len(theirs.rows):
            return False
        if (mine.rows != theirs.rows).any() or (mine.q_lens != theirs.q_lens).any():
            return False
        growth = mine.kv_lens - theirs.kv_lens
        return int(growth.min(initial=0)) >= 0 and int(growth.max(initial=0)) <= MAX_GROWTH


class TreeAttention:
    """See `AttentionBackend`.

    Args:
        pool: keys and values.
        layers: one spec a layer; scales are positive.
        num_heads: query heads, a multiple of kv_heads.
        table: int32 ``[rows, columns]``, the page table on the device. Its last row belongs to no request.
        flat: the backend that reads keys once for each request.
        max_tokens: the most query tokens of a step.
        costs: what the choice between the paths is made by; by default measured, on a GPU.
        measure: False: keep the built-in costs, which are the same on all GPUs of one kind.
    """

    def __init__(
        self,
        pool: KVPool,
        layers: list[LayerSpec],
        num_heads: int,
        table: Tensor,
        flat: AttentionBackend,
        max_tokens: int,
        costs: TreeCosts | None = None,
        measure: bool = True,
    ) -> None:
        layout, fitted = pool.layout, costs is None and measure
        costs = costs or _default_costs(pool)
        if any(spec.scale <= 0 for spec in layers):
            raise ValueError("scales must be positive")
        self.captures, self.saved_keys = flat.captures, 0
        self._layers, self._flat, self._max_tokens = layers, flat, max_tokens
        self._head_dim, self._page_size, self._group = layout.head_dim, layout.page_size, num_heads // layout.kv_heads
        plain = checked(layers)
        self._wide = plain and fits(layout) and runs_on(pool.device)
        tiles = tree_tiles(layout, self._group, plain, self._wide)
        self._costs = costs.for_tiles(tuple(tile.rows for tile in tiles))
        self._kinds = (0, 2) if self._wide and len(tiles) == 2 else tuple(range(len(tiles)))
        per_processor = (tile.in_registers or WORKERS[kind] for tile, kind in zip(tiles, self._kinds, strict=True))
        self._workers = tuple(max(1, per * _processors(pool) // layout.kv_heads) for per in per_processor)
        least = tuple(MIN_KEYS[kind] for kind in self._kinds)
        self._limits = TreeLimits(self._items(len(table) - 1, max_tokens), SLOTS, self._workers, least)
        self._runner = TreeRunner(pool, num_heads, table, tiles, self._limits, max_tokens)
        if pool.device.type == "cuda":
            tune(self._runner, pool, num_heads, table, self._workers)
            if fitted:
                self._costs = self._calibrated(num_heads, table)
            logger.info("tree attention: %s", describe(self._group, self._page_size, self._costs, self._limits))
        self._scratch_row = len(table) - 1
        self.joint = flat.captures
        # The last members planned, and their plan; None where the flat path is faster.
        self._members: Members | None = None
        self._plan: TreePlan | None = None
        self._tree_paid = False  # whether the last step that had the choice took the tree path
        # Columns of each row of the page table that the plan was made from.
        self._planned_columns = np.zeros(len(table), np.int64)
        self._loaded: tuple[TreePlan, int] | None = None
        self._by_shape: dict[StepShape, TreeLimits] = {}  # of plans of captured steps
        self._step: tuple[tuple[int, ...], int] | None = None  # grid and query tokens of a step on the tree path
        self._chunks_from: int | None = None  # query token at which the flat backend's chunks begin

    def _calibrated(self, num_heads: int, table: Tensor) -> TreeCosts:
        """The costs on this device, or the built-in ones where they cannot be measured."""
        try:
            return calibrate(
                *(self._costs, self._runner, self._flat, self._layers, self._runner.pool, num_heads, table),
                self._limits,
            )
        except (RuntimeError, OutOfResources) as error:  # a start does not fail for want of a measurement
            logger.warning("tree attention keeps its built-in costs, because measuring failed: %s", error)
            return self._costs

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`. A joint shape has the tree's form alone."""
        if shape.joint:
            return [replace(shape, tree=True)]
        return [shape, replace(shape, tree=True)] if shape.decodes >= MIN_DECODES else [shape]

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> StepShape | None:
        """See `AttentionBackend.plan`."""
        decodes = batch.num_decodes if shape is None else shape.first_chunk(batch.num_decodes)
        forced = shape is not None and (shape.tree or shape.joint > 0)
        limits, longest = self._limits, SHORT_CHUNK
        if shape is not None:
            limits, longest = self._captured_limits(shape), shape.tokens
        elif self._wide and self._takes_chunks(batch):
            forced, longest = True, WIDE_CHUNK
        if self._rewritten(batch):
            self._members = None
        members, plan = self._find_members(batch, decodes, longest), None
        if forced or (len(members.requests.rows) > 1 and (shape is None or decodes >= MIN_DECODES)):
            plan = self._plan_members(batch, members, limits, forced)
        if plan is None:
            self._step, flat_form = None, self._flat.plan(batch, None if forced else shape)
            self.saved_keys = self._flat.saved_keys
            return flat_form
        self.saved_keys = plan.keys_flat - plan.keys_read
        padded = decodes if shape is None else shape.num_tokens
        if self._loaded is None or self._loaded[0] is not plan or self._loaded[1] != padded:
            self._runner.load(plan, padded)
            self._loaded = plan, padded
        requests = members.requests
        positions = requests.kv_lens - 1
        if len(members.chunks):
            positions = np.zeros(members.num_tokens, np.int64)
            queries = ranges(requests.queries, requests.q_lens)
            positions[queries] = ranges(requests.kv_lens - requests.q_lens, requests.q_lens)
        self._runner.advance(positions)
        self._chunks_from = None
        if shape is not None:
            self._step = limits.items, shape.num_tokens
            return replace(shape, tree=True)
        if len(members.chunks) < len(batch.rows) - batch.num_decodes:
            self._plan_chunks(batch, members)
        self._step = tuple(plan.sizes), members.num_tokens if plan.most else 0
        return None

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        if self._step is None:
            return self._flat.run(layer, q, k, v, out)
        if out is None:
            out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if q.stride()[1:] != (self._head_dim, 1) or out.stride()[1:] != (self._head_dim, 1):
            raise ValueError("the heads of a token must be contiguous")
        if self._chunks_from is not None:
            at = self._chunks_from
            self._flat.run(layer, q[at:], k[at:], v[at:], out[at:])
        self._runner.run(layer, self._layers[layer], q, out, *self._step)
        return out

    def _takes_chunks(self, batch: AttentionBatch) -> bool:
        """Whether `attend_wide` is faster than the flat backend for the short chunks of a step that is not captured."""
        n = batch.num_decodes
        short = batch.q_lens[n:] <= WIDE_CHUNK
        q_lens, kv_lens = batch.q_lens[n:][short].astype(np.int64), batch.kv_lens[n:][short]
        if q_lens.max(initial=0) <= 1:
            return False
        keys = int((q_lens * (kv_lens - q_lens // 2)).sum())
        return self._runner.pool.layout.quantized or keys >= WIDE_KEYS * int(q_lens.sum())

    def _find_members(self, batch: AttentionBatch, decodes: int, longest: int) -> Members:
        """``decodes``: with their padding; ``longest``: the most query tokens of a chunk that is a member."""
        n = batch.num_decodes
        q_lens, kv_lens = batch.q_lens.astype(np.int64), batch.kv_lens.astype(np.int64)
        chunks = n + (q_lens[n:] <= longest).nonzero()[0] if n < len(q_lens) else _NO_CHUNKS
        tokens = decodes + int(q_lens[n:].sum()) if len(chunks) else decodes
        if not len(chunks) or tokens > self._max_tokens:
            requests = TreeRequests(batch.rows[:n], np.arange(n), q_lens[:n], kv_lens[:n])
            return Members(_NO_CHUNKS, requests, decodes, -1)
        starts = q_lens.cumsum() - q_lens
        starts[n:] += decodes - n
        index = np.concatenate([np.arange(n), chunks])
        requests = TreeRequests(batch.rows[index], starts[index], q_lens[index], kv_lens[index])
        return Members(chunks, requests, tokens, decodes)

    def _plan_members(
        self, batch: AttentionBatch, members: Members, limits: TreeLimits, forced: bool
    ) -> TreePlan | None:
        requests = members.requests
        if self._members is not None and members.continues(self._members):
            if self._plan is None and not forced:
                return None
            if self._plan is not None and (forced or self._plan.gain >= 0.0) and _fits(self._plan, limits):
                return self._plan
        self._planned_columns[:] = 0
        self._planned_columns[requests.rows] = requests.kv_lens // self._page_size
        # Steps that gain about as much as they lose would change kernels at every step: a change has to pay.
        least = -np.inf if forced else 0.0 if self._tree_paid else self._costs.margin
        sizes = members.num_tokens, self._group, self._page_size
        self._members = members
        self._plan = plan_tree(batch.host_page_table, requests, *sizes, self._costs, limits, least)
        if not forced:
            self._tree_paid = self._plan is not None
        return self._plan

    def _rewritten(self, batch: AttentionBatch) -> bool:
        """Whether the page table may have changed where the plan was made from it."""
        if batch.written is None:
            return True
        rows, columns = batch.written
        return len(rows) > 0 and bool((columns < self._planned_columns[rows]).any())

    def _plan_chunks(self, batch: AttentionBatch, members: Members) -> None:
        """Leaves the other chunks to the flat backend, for which the members among them read the scratch page."""
        n = self._chunks_from = batch.num_decodes
        rows, kv_lens = batch.rows.copy(), batch.kv_lens.copy()
        rows[members.chunks], kv_lens[members.chunks] = self._scratch_row, batch.q_lens[members.chunks]
        self._flat.plan(replace(batch, rows=rows[n:], q_lens=batch.q_lens[n:], kv_lens=kv_lens[n:], num_decodes=0))

    def _captured_limits(self, shape: StepShape) -> TreeLimits:
        """Limits of a captured step's plans. No items of tiles that only more query tokens than the shape has would
        need (`tree_costs.tile_table`): even an empty launch takes 2 to 3 µs."""
        found = self._by_shape.get(shape)
        if found is None:
            tokens = shape.num_tokens
            rows, smaller = tokens * self._group, (0, *self._costs.tiles)
            # No more members than the page table has rows, which the buffers are made for.
            items = self._items(min(shape.num_outputs, tokens, self._scratch_row), tokens)
            items = tuple(most if rows > least else 0 for most, least in zip(items, smaller, strict=False))
            found = self._by_shape[shape] = replace(self._limits, items=items)
        return found

    def _items(self, members: int, tokens: int) -> tuple[int, ...]:
        """The most items of each tile in captured steps of so many requests and query tokens: a tail each and a few
        nodes; in the widest, chunks too."""
        kinds = zip(self._kinds, self._workers, strict=True)
        items = [int(members * ITEMS[kind]) + 2 * workers for kind, workers in kinds]
        items[-1] += tokens * self._group // self._costs.tiles[-1]
        return tuple(items)


def _default_costs(pool: KVPool) -> TreeCosts:
    """On devices where it was measured, the narrow tile also beats FlashInfer's decode at keys that are not shared."""
    hopper = pool.device.type == "cuda" and torch.cuda.get_device_capability(pool.device)[0] == 9
    layout = pool.layout
    if layout.quantized:  # the flat backend's kernel is the narrow tile's
        return TreeCosts().for_bytes(2 * layout.head_dim * layout.dtype.itemsize / layout.head_bytes)
    return TreeCosts(flat_tail=1.06) if hopper and layout.head_dim == 128 else TreeCosts()


def _fits(plan: TreePlan, limits: TreeLimits) -> bool:
    return all(size <= limit for size, limit in zip(plan.sizes, limits.items, strict=True))


def _processors(pool: KVPool) -> int:
    return torch.cuda.get_device_properties(pool.device).multi_processor_count if pool.device.type == "cuda" else 4
