"""Attention in plain torch: the executable specification, and the backend of CPUs.

A step's keys are split into parts. Each part is attended with few calls for many requests, and the parts are merged:

- decodes whose pages lie side by side in the pool: in place, masked, with one call for all;
- runs of pages that several requests share: once for all their queries (`sharing`);
- the other keys of decodes: requests of similar length are padded to one call;
- the other keys of prefill chunks: the cached prefix, and causally the chunk's own tokens, which need no gathering.

In layers with a window, requests that are longer than the window take a masked path without sharing.

Once the compiled kernels are there (`native`), they attend the step's decodes (`native_decodes`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import native
from ..arrays import Int32, Int64, ranges
from ..kv_pool import KVLayer, KVPool
from .base import AttentionBatch, LayerSpec, StepShape
from .native_decodes import NativeDecodes
from .partial import attend, merge_

SHARE_TOKENS = 512  # token reads that a shared run must save to pay for its own call
GATHER_BYTES = 2 * 1024 * 1024  # keys gathered at once, so that the cache still has them (8 MiB: 1.4 times slower)
RUN_TOKENS = 512  # runs of consecutive pages with at least this mean length are read in place
SPAN_QUERIES = 8  # of a key head that meet each key of a span: most are masked; 16 took 1.2 times as long as a gather
SPAN_WASTE = 1.25  # pages of a span for each page that is read
WINDOW_BLOCK = 256  # queries of a chunk that are masked together on the windowed path


@dataclass(slots=True)
class _Part:
    """B requests with Q query tokens each over L keys each, gathered from pages. Some keys may be masked."""

    queries: slice | Tensor  # query tokens, request by request: B * Q of them
    num_requests: int
    pages: slice | Tensor  # int64 [B * P], or consecutive pages read in place
    length: int  # L, of the P * page_size keys in the pages
    mask: Tensor | None = None  # 0 or -inf: [B, 1, 1, L], [1, 1, Q, L], or of a span [1, 1, Q * group, L]


@dataclass(slots=True)
class _Plan:
    """The parts of one step for layers of one window. Every query token is in exactly one of ``own`` or ``causal``."""

    causal: list[tuple[slice | Tensor, int]] = field(default_factory=list)  # (query tokens, number of requests)
    own: list[_Part] = field(default_factory=list)
    merged: list[_Part] = field(default_factory=list)


class TorchAttention:
    """See `AttentionBackend`.

    Args:
        pool: keys and values.
        layers: one spec a layer.
        num_heads: query heads, a multiple of kv_heads.
        share: whether shared pages are attended once; off for comparison in tests.
    """

    captures = False
    joint = False

    def __init__(self, pool: KVPool, layers: list[LayerSpec], num_heads: int, share: bool = True) -> None:
        self._pool, self._layers, self._share = pool, layers, share
        layout = pool.layout
        self._page_size, self._kv_heads, self._head_dim = layout.page_size, layout.kv_heads, layout.head_dim
        self._group = num_heads // self._kv_heads
        self._key_bytes = self._kv_heads * self._head_dim * layout.dtype.itemsize  # of a token in one layer
        self._plans: dict[int | None, _Plan] = {}
        self._own_tokens: tuple[Tensor, Tensor] | None = None  # pages and offsets, where the pool is quantized
        self._decodes = NativeDecodes(pool, layers, num_heads) if NativeDecodes.fit(pool) else None
        self._native = 0  # decodes of the planned step that the compiled kernel attends: its first query tokens
        self.saved_keys = 0
        self._scratch = [
            pool.layer(0).k.new_empty(0) for _ in range(2)
        ]  # gathered keys and values; grown, never shrunk

    def forms(self, shape: StepShape) -> list[StepShape]:
        """See `AttentionBackend.forms`."""
        return []

    def plan(self, batch: AttentionBatch, shape: StepShape | None = None) -> None:
        """See `AttentionBackend.plan`."""
        if shape is not None:
            raise ValueError("the torch backend does not support padded steps: its plan depends on the values")
        full: _Plan | None = None
        self._plans, self.saved_keys, self._native = {}, 0, 0
        if self._decodes is not None and native.library() is not None and batch.num_decodes:
            self._native = batch.num_decodes
            self.saved_keys = self._decodes.plan(batch, SHARE_TOKENS if self._share else None)
        if self._pool.layout.quantized and batch.num_decodes < len(batch.rows):
            slots = self._index(batch.query_slots())
            self._own_tokens = slots // self._page_size, slots % self._page_size
        else:
            self._own_tokens = None
        members = np.arange(self._native, len(batch.rows))
        for window in dict.fromkeys(spec.window for spec in self._layers):
            slides = batch.kv_lens[members] > (np.inf if window is None else window)
            if window is not None and slides.any():
                self._plans[window] = self._plan_windowed(batch, members[slides], members[~slides], window)
            else:  # no request is longer than the window
                full = full or self._plan_full(batch, members)
                self._plans[window] = full

    def run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None = None) -> Tensor:
        """See `AttentionBackend.run`."""
        if self._decodes is None or not self._native:
            return self._run(layer, q, k, v, out)
        if self._native == q.shape[0]:
            result = torch.empty(q.shape, dtype=q.dtype) if out is None else out
        else:
            result = self._run(layer, q, k, v, out)
        self._decodes.run(layer, q, result)
        return result

    def _run(self, layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor | None) -> Tensor:
        """`run` for what is in the plans; the results of other query tokens are left undefined."""
        kv, spec = self._pool.layer(layer), self._layers[layer]
        plan = self._plans[spec.window]
        if self._own_tokens is not None:  # as later steps will see them
            k, v = (x.to(q.dtype) for x in kv.read(self._own_tokens))
        alone = len(plan.own) == 1 and not (self._native or plan.causal or plan.merged)
        if alone and spec.sinks is None and out is None:
            return self._paged(kv, spec, plan.own[0], q)[0].to(q.dtype)
        # Merging rounds once more, so it is done in float32.
        result = torch.empty(q.shape, dtype=torch.float32 if plan.merged else q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        for queries, requests in plan.causal:
            found, lse[queries] = self._causal(spec, requests, q[queries], k[queries], v[queries])
            result[queries] = found.to(result.dtype)
        for part in plan.own:
            found, lse[part.queries] = self._paged(kv, spec, part, q[part.queries])
            result[part.queries] = found.to(result.dtype)
        for part in plan.merged:
            merge_(result, lse, part.queries, *self._paged(kv, spec, part, q[part.queries]))
        if spec.sinks is not None:
            result = result * torch.sigmoid(lse - spec.sinks)[..., None]
        return result.to(q.dtype) if out is None else out.copy_(result)

    # -- run: one part. Queries are [N, heads, D]; a key head meets all queries of its group without being expanded. ---

    def _causal(self, spec: LayerSpec, requests: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kv_heads, group, dim = self._kv_heads, self._group, self._head_dim
        folded = q.view(requests, -1, kv_heads, group, dim).permute(0, 2, 3, 1, 4).flatten(0, 1)
        shape = (requests * kv_heads, 1, -1, dim)
        k, v = (x.view(requests, -1, kv_heads, dim).transpose(1, 2).reshape(shape) for x in (k, v))
        k, v = k.expand(-1, group, -1, -1), v.expand(-1, group, -1, -1)
        out, lse = attend(folded, k, v, spec.scale, spec.softcap, causal=True)
        out = out.unflatten(0, (requests, kv_heads)).permute(0, 3, 1, 2, 4)
        lse = lse.unflatten(0, (requests, kv_heads)).permute(0, 3, 1, 2)
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    def _paged(self, kv: KVLayer, spec: LayerSpec, part: _Part, q: Tensor) -> tuple[Tensor, Tensor]:
        kv_heads, group, dim, requests = self._kv_heads, self._group, self._head_dim, part.num_requests
        k, v = self._gather(kv, part)
        if (
            part.mask is not None and part.mask.shape[2] == len(q) > 1
        ):  # one mask row per query: heads take the place of requests
            folded = q.view(-1, kv_heads, group, dim).permute(1, 2, 0, 3)
            k, v = (x.transpose(0, 1).expand(-1, group, -1, -1) for x in (k, v))
            out, lse = attend(folded, k, v, spec.scale, spec.softcap, part.mask)
            return out.permute(2, 0, 1, 3).reshape(q.shape), lse.permute(2, 0, 1).reshape(q.shape[:2])
        if len(q) == requests:  # decodes
            out, lse = attend(q.view(requests, kv_heads, group, dim), k, v, spec.scale, spec.softcap, part.mask)
            return out.reshape(q.shape), lse.reshape(q.shape[:2])
        folded = q.view(requests, -1, kv_heads, group, dim).transpose(1, 2).flatten(2, 3)
        out, lse = attend(folded, k, v, spec.scale, spec.softcap, part.mask)
        out = out.unflatten(2, (-1, group)).transpose(1, 2)
        lse = lse.unflatten(2, (-1, group)).transpose(1, 2)
        return out.reshape(q.shape), lse.reshape(q.shape[:2])

    def _gather(self, kv: KVLayer, part: _Part) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, kv_heads, L, D]``, valid until the next call."""
        shape = (part.num_requests, -1, self._kv_heads, self._head_dim)
        if self._pool.layout.quantized:
            pages = part.pages
            if isinstance(pages, slice):
                pages = torch.arange(pages.start, pages.stop, device=self._pool.device)
            k, v = (x.to(self._pool.layout.dtype) for x in kv.read(pages))
        elif isinstance(part.pages, slice):
            k, v = kv.k[part.pages], kv.v[part.pages]
        else:
            k, v = self._gather_into(0, kv.k, part.pages), self._gather_into(1, kv.v, part.pages)
        k, v = k.reshape(shape), v.reshape(shape)
        return k[:, : part.length].transpose(1, 2), v[:, : part.length].transpose(1, 2)

    def _gather_into(self, which: int, source: Tensor, pages: Tensor) -> Tensor:
        shape = (len(pages), *source.shape[1:])
        size = len(pages) * source[0].numel()
        if self._scratch[which].numel() < size:
            # Reused between calls: page faults of new memory of this size cost more than the copy itself.
            self._scratch[which] = source.new_empty(max(size, GATHER_BYTES // source.element_size()))
        return torch.index_select(source, 0, pages, out=self._scratch[which][:size].view(shape))

    # -- plan ----------------------------------------------------------------------------------------------------------

    def _plan_full(self, batch: AttentionBatch, members: Int64) -> _Plan:
        """Requests whose queries see all tokens before them."""
        plan = _Plan()
        if not len(members):
            return plan
        requests = _Requests(batch, members, self._page_size)
        q_lens, page = requests.q_lens, self._page_size
        decodes = q_lens == 1
        span = self._span(requests, np.flatnonzero(decodes))
        if span is not None:
            plan = self._plan_full(batch, members[~decodes])
            plan.own.append(span)
            return plan
        # Tokens that all of a request's queries see: a chunk's cached prefix; for a decode also its own token.
        seen = requests.kv_lens - np.where(decodes, 0, q_lens)
        covered = np.zeros(len(members), np.int64)
        if self._share:
            shared = batch.shared_runs(SHARE_TOKENS).among(members)
            covered = shared.covered
            for run in shared.runs:
                pages = requests.table[run.members[0], run.start : run.stop]
                self.saved_keys += (len(run.members) - 1) * len(pages) * page
                plan.merged += self._read(self._queries(requests.tokens(run.members)), pages, len(pages) * page)
        rest = seen - covered * page
        for length in np.unique(q_lens[~decodes]).tolist():
            chunks = np.flatnonzero(q_lens == length)
            plan.causal.append((self._queries(requests.tokens(chunks)), len(chunks)))
            for bucket in length_buckets(rest, chunks[rest[chunks] > 0]):
                for parts in self._padded(requests, bucket, covered, seen):
                    plan.merged += parts
        for bucket in length_buckets(rest, np.flatnonzero(decodes)):
            for first, *others in self._padded(requests, bucket, covered, seen):
                plan.own.append(first)
                plan.merged += others
        return plan

    def _span(self, requests: _Requests, some: Int64) -> _Part | None:
        """The decodes ``some`` as one part over all pages from their first to their last in the pool, if few of these
        are other requests' and few queries meet keys that they do not see."""
        page, count = self._page_size, len(some)
        if not 0 < count * self._group <= SPAN_QUERIES or self._pool.layout.quantized:
            return None
        if torch.get_num_threads() > self._kv_heads:  # the kernel divides a part by requests and heads
            return None
        num_pages = -(-requests.kv_lens[some] // page)
        row = np.repeat(np.arange(count), num_pages)
        pages = requests.table[some[row], ranges(np.zeros(count, np.int64), num_pages)]
        start, stop = int(pages.min()), int(pages.max()) + 1
        if stop - start > SPAN_WASTE * len(pages):
            return None
        tokens = np.zeros((count, stop - start), np.int64)  # of each page that a request sees
        tokens[row, pages - start] = page
        tokens[np.arange(count), pages[np.cumsum(num_pages) - 1] - start] -= num_pages * page - requests.kv_lens[some]
        distinct = int(np.count_nonzero(tokens.any(axis=0)))
        if stop - start > SPAN_WASTE * distinct:
            return None
        self.saved_keys += (len(pages) - distinct) * page
        length = (stop - start - 1) * page + int(tokens[:, -1].max())
        visible = (np.arange(page) < tokens[:, :, None]).reshape(count, -1)[:, :length]
        mask = None if visible.all() else self._mask(visible.repeat(self._group, axis=0)[None, None])
        return _Part(self._queries(requests.tokens(some)), 1, slice(start, stop), length, mask)

    def _plan_windowed(self, batch: AttentionBatch, slides: Int64, others: Int64, window: int) -> _Plan:
        """Requests longer than the window (``slides``) read only what it covers; the others read everything."""
        plan = self._plan_full(batch, others)
        requests = _Requests(batch, slides, self._page_size)
        kv_lens, page = requests.kv_lens, self._page_size
        decodes = requests.q_lens == 1
        first_page = (kv_lens - window) // page
        for bucket in length_buckets(kv_lens - first_page * page, np.flatnonzero(decodes)):
            for first, *further in self._padded(requests, bucket, first_page, kv_lens, window):
                plan.own.append(first)
                plan.merged += further
        for i in np.flatnonzero(~decodes).tolist():
            start = int(kv_lens[i] - requests.q_lens[i])
            for at in range(start, int(kv_lens[i]), WINDOW_BLOCK):
                plan.own.append(self._window_block(requests, i, at, min(at + WINDOW_BLOCK, int(kv_lens[i])), window))
        return plan

    def _window_block(self, requests: _Requests, i: int, start: int, stop: int, window: int) -> _Part:
        """The queries of request i at positions ``start … stop - 1``, on the keys they see."""
        page = self._page_size
        first_page = max(start - window + 1, 0) // page
        pages = requests.table[i, first_page : -(-stop // page)]
        queries, keys = np.arange(start, stop)[:, None], np.arange(first_page * page, stop)
        mask = self._mask(((keys <= queries) & (keys > queries - window))[None, None])
        begin = int(requests.starts[i] + requests.q_lens[i] - requests.kv_lens[i])  # token of position 0
        tokens = slice(begin + start, begin + stop)
        return _Part(tokens, 1, self._index(pages), len(keys), mask)

    def _padded(
        self, requests: _Requests, bucket: Int64, first_page: Int64, end: Int64, window: int | None = None
    ) -> Iterator[list[_Part]]:
        """Parts over positions ``first_page * page_size … end - 1`` of each request, in batches that fit the cache.

        The parts of one list have the same query tokens.
        """
        page = self._page_size
        longest = int((-(-end[bucket] // page) - first_page[bucket]).max()) * page
        size = max(1, GATHER_BYTES // (longest * self._key_bytes))
        for some in (bucket[at : at + size] for at in range(0, len(bucket), size)):
            begin, num_pages = first_page[some] * page, -(-end[some] // page) - first_page[some]
            length = int((end[some] - begin).max())
            # Padding repeats the request's own last page, so that no other request's page is read.
            columns = first_page[some, None] + np.minimum(np.arange(num_pages.max()), num_pages[:, None] - 1)
            pages = requests.table[some[:, None], columns]
            positions = begin[:, None] + np.arange(length)
            visible = positions < end[some, None]
            if window is not None:
                visible &= positions >= end[some, None] - window
            queries, all_visible = self._queries(requests.tokens(some)), bool(visible.all())
            if len(some) == 1 and all_visible:
                yield self._read(queries, pages[0], length)
            else:
                mask = None if all_visible else self._mask(visible[:, None, None])
                yield [_Part(queries, len(some), self._index(pages.ravel()), length, mask)]

    def _read(self, queries: slice | Tensor, pages: Int32, length: int) -> list[_Part]:
        """Parts over the first ``length`` tokens of ``pages``, in place where long runs of pages are consecutive."""
        runs = np.split(pages, np.flatnonzero(np.diff(pages) != 1) + 1)
        if len(runs) > 1 and length < len(runs) * RUN_TOKENS:
            return [_Part(queries, 1, self._index(pages), length)]
        parts = []
        for run in runs:
            here = min(length, len(run) * self._page_size)
            parts.append(_Part(queries, 1, slice(int(run[0]), int(run[-1]) + 1), here))
            length -= here
        return parts

    def _queries(self, tokens: Int64) -> slice | Tensor:
        if int(tokens[-1]) - int(tokens[0]) + 1 == len(tokens):  # ascending and distinct, so consecutive
            return slice(int(tokens[0]), int(tokens[-1]) + 1)
        return self._index(tokens)

    def _mask(self, visible: npt.NDArray[np.bool_]) -> Tensor:
        mask = np.where(visible, np.float32(0), np.float32("-inf"))
        return torch.from_numpy(mask).to(self._pool.device, self._pool.layout.dtype)

    def _index(self, array: npt.NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._pool.device)


class _Requests:
    """Some of a batch's requests: their lengths (int64), rows of pages, and query tokens."""

    def __init__(self, batch: AttentionBatch, members: Int64, page_size: int) -> None:
        self.q_lens, self.kv_lens = batch.q_lens[members].astype(np.int64), batch.kv_lens[members].astype(np.int64)
        self.starts = (np.cumsum(batch.q_lens, dtype=np.int64) - batch.q_lens)[members]
        columns = -(-int(self.kv_lens.max(initial=0)) // page_size)
        self.table = batch.host_page_table[:, :columns][batch.rows[members]]

    def tokens(self, some: Int64) -> Int64:
        """Query tokens of the requests ``some``, concatenated."""
        return ranges(self.starts[some], self.q_lens[some])


def length_buckets(lengths: Int64, some: Int64, ratio: float = 1.5, small: int = 128) -> list[Int64]:
    """Splits the requests ``some`` so that the longest of a bucket is at most ``ratio`` times its shortest.

    Lengths below ``small`` count as ``small``: the padding costs less than another call.
    """
    if not len(some):
        return []
    counted = np.maximum(lengths[some], small)
    keys = np.floor(np.log(counted.max() / counted) / np.log(ratio))
    return [some[keys == key] for key in np.unique(keys)]
