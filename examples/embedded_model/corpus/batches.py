"""Batches of packed conversations, made by worker processes while the GPU trains. No torch here.

Batch ``k`` is a function of the seed and ``k`` alone, whatever the number of workers: training can stop and go on.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from .conversation import Conversation, render, split_marks
from .draw import Draw
from .mixture import stream

UInt16 = npt.NDArray[np.uint16]
PROMPT_WEIGHT = 13  # of 255: what a prompt's tokens count against the 255 of an answer's


@dataclass(slots=True)
class Batch:
    """uint16 ``[rows, length]`` each: token ids, loss weights (0 to 255), and where each token's text began."""

    tokens: UInt16
    weights: UInt16
    starts: UInt16


def encode(tokenizer: Tokenizer, conversation: Conversation) -> tuple[UInt16, UInt16]:
    """Ids and weights of a whole conversation."""
    text, edges = split_marks(render(conversation))
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begins = np.array(encoding.offsets, np.int32)[:, 0]
    learned = np.searchsorted(np.array(edges, np.int32), begins, side="right") % 2
    weights = np.where(learned == 1, 255, PROMPT_WEIGHT).astype(np.uint16)
    return np.array(encoding.ids, np.uint16), weights


def make_batch(tokenizer: Tokenizer, seed: int, index: int, level: float, rows: int, length: int) -> Batch:
    """Draws conversations until the rows are full, and packs the longest first."""
    texts: list[tuple[UInt16, UInt16]] = []
    room = rows * length
    for conversation, count in stream(Draw(seed * 1_000_003 + index, level=level)):
        tokens, weights = encode(tokenizer, conversation)
        count(len(tokens))
        if len(tokens) > length:
            continue
        texts.append((tokens, weights))
        room -= len(tokens)
        if room < 0:
            break
    texts.sort(key=lambda text: -len(text[0]))
    batch = Batch(*(np.zeros((rows, length), np.uint16) for _ in range(3)))
    filled = [0] * rows
    for tokens, weights in texts:
        row = min(range(rows), key=filled.__getitem__)
        at, end = filled[row], filled[row] + len(tokens)
        if end > length:
            continue  # some short ones are left over
        batch.tokens[row, at:end], batch.weights[row, at:end], batch.starts[row, at:end] = tokens, weights, at
        batch.weights[row, at] = 0  # nothing before it predicts it
        filled[row] = end
    for row, end in enumerate(filled):
        batch.starts[row, end:] = end
    return batch


class Batches:
    """Worker processes that make batches ``first``, ``first + 1``, ... up to ``total``; iterate over it once."""

    def __init__(self, tokenizer: str, seed: int, first: int, total: int, rows: int, length: int, workers: int) -> None:
        context = multiprocessing.get_context("fork")  # before CUDA is touched
        self.shape, self.first, self.total = (3, rows, length), first, total
        self._ends: list[Connection] = []
        self._workers = []
        for i in range(workers):
            here, there = context.Pipe(duplex=False)
            mine = range(first + i, total, workers)
            self._workers.append(
                context.Process(target=_work, args=(there, tokenizer, seed, mine, total, rows, length), daemon=True)
            )
            self._workers[-1].start()
            there.close()
            self._ends.append(here)

    def __iter__(self) -> Iterator[Batch]:
        for k in range(self.total - self.first):
            data = self._ends[k % len(self._ends)].recv_bytes()
            yield Batch(*np.frombuffer(data, np.uint16).reshape(self.shape))

    def close(self) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()


def _work(out: Connection, tokenizer: str, seed: int, indices: range, total: int, rows: int, length: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = Tokenizer.from_str(tokenizer)
    for index in indices:
        batch = make_batch(encoder, seed, index, index / total, rows, length)
        out.send_bytes(np.stack([batch.tokens, batch.weights, batch.starts]).tobytes())
    out.close()
