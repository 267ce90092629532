"""Branches of an engine in process: `Engine.branch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Unpack, overload

from ..errors import InvalidRequest
from ..messages import BranchOp, BranchRun, Delta, Piece
from ..sampling_params import SamplingParams
from ..scheduler.branches.scores import Score, ScoreCollector
from ..shared_tokens import tokens_from_bytes, tokens_to_bytes
from ..tokenizer.pieces import chat_piece, encode_message
from .base import EngineBase
from .prompts import BranchPiece, Prompt, RunOptions, token_array
from .request_output import RequestOutput, StreamChunk, error_of


class BranchBase:
    """The base of `Branch` and `AsyncBranch`: the engine, the branch's id, and one message for each operation."""

    def __init__(self, engine: EngineBase, id: str) -> None:
        self._engine = engine
        self._thread = engine._thread
        self.id = id

    @staticmethod
    def _creation(engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> BranchOp:
        piece: Piece | None = None
        if isinstance(prompt, str):
            piece = _piece(engine, prompt, parse_special=True)
        elif len(prompt):
            chat = isinstance(prompt[0], Mapping)
            piece = chat_piece(engine.tokenizer, prompt) if chat else _piece(engine, prompt, parse_special=True)  # type: ignore[arg-type]
        return BranchOp(0, "create", ("", cache_salt), piece=piece, ttl=ttl)

    def _operation(self, what: Literal["fork", "extend", "get", "delete"], **fields: Any) -> BranchOp:
        return BranchOp(0, what, ("", ""), self.id, **fields)

    def _extension(self, piece: Prompt, parse_special: bool) -> BranchOp:
        return self._operation("extend", piece=_piece(self._engine, piece, parse_special))

    def _generation(
        self,
        params: SamplingParams | None,
        extend: Prompt | None = None,
        parse_special: bool = False,
        priority: int = 0,
    ) -> BranchRun:
        params = self._engine._checked(params)
        piece = None if extend is None else _piece(self._engine, extend, parse_special)
        ids = self._thread.new_ids(params.n)
        return self._encoded(BranchRun(ids, self.id, ("", ""), params, piece, priority=priority))

    def _scoring(self, continuations: Sequence[Prompt], parse_special: bool, unconditional: bool) -> BranchRun:
        if not continuations:
            raise InvalidRequest("continuations", "must not be empty")
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        pieces = [_piece(self._engine, piece, parse_special) for piece in continuations]
        ids = self._thread.new_ids(len(pieces) * (1 + unconditional))
        run = BranchRun(ids, self.id, ("", ""), params, continuations=pieces, unconditional=unconditional)
        return self._encoded(run)

    def _encoded(self, run: BranchRun) -> BranchRun:
        encode_message(self._engine.tokenizer, run)
        return run

    def _text_of(self, info: Mapping[str, Any]) -> str:
        return self._engine.tokenizer.decode(token_ids(info), skip_special_tokens=False) + str(info["pending_text"])


class Branch(BranchBase):
    """A prompt that the engine keeps, to be continued. Every use renews its time to live; close it when done.

    Errors are `InvalidRequest`: ``status`` 410 once it has expired or was closed, 409 while it generates, 429 when
    there are too many.
    """

    @classmethod
    def create(cls, engine: EngineBase, prompt: BranchPiece, cache_salt: str, ttl: float | None) -> Branch:
        op = cls._creation(engine, prompt, cache_salt, ttl)
        return cls(engine, engine._thread.operate(op)["id"])

    def fork(self, n: int = 1) -> list[Branch]:
        """``n`` branches that begin as this one is now. No tokens or pages are copied."""
        return [Branch(self._engine, id) for id in self._operate(self._operation("fork", n=n))["ids"]]

    def extend(self, piece: Prompt, *, parse_special: bool = False) -> int:
        """Appends text, tokenized by itself, or token ids. Returns the branch's length in tokens.

        ``parse_special``: special tokens such as ``<|im_start|>`` may be spelled out in the text.
        """
        return int(self._operate(self._extension(piece, parse_special))["num_tokens"])

    @overload
    def generate(
        self, params: SamplingParams | None = None, *, stream: Literal[False] = False, **options: Unpack[RunOptions]
    ) -> RequestOutput: ...

    @overload
    def generate(
        self, params: SamplingParams | None = None, *, stream: Literal[True], **options: Unpack[RunOptions]
    ) -> Iterator[StreamChunk]: ...

    def generate(
        self, params: SamplingParams | None = None, *, stream: bool = False, **options: Unpack[RunOptions]
    ) -> RequestOutput | Iterator[StreamChunk]:
        """Appends ``extend`` and then what is generated; returns a `RequestOutput`, or with ``stream`` an iterator of
        `StreamChunk`. Of several samples the first is kept in the branch.

        The branch then ends where the returned text ends: stop tokens and stop strings are not kept.
        """
        if stream:
            return self.stream(params, **options)
        return self._thread.complete([self._generation(params, **options)])[0]

    def stream(self, params: SamplingParams | None = None, **options: Unpack[RunOptions]) -> Iterator[StreamChunk]:
        """`generate` in chunks. Leaving the loop early aborts it; what has been generated by then is kept."""
        return self._thread.stream(self, self._generation(params, **options))

    def score(
        self, continuations: Sequence[Prompt], *, parse_special: bool = False, unconditional: bool = False
    ) -> list[Score]:
        """Logprobs of every continuation's tokens after the branch, which does not change. All are computed together,
        what they share once. ``unconditional``: also the logprobs of the same tokens by themselves."""
        run = self._scoring(continuations, parse_special, unconditional)
        collector = ScoreCollector(len(run.ids), unconditional=unconditional)
        with contextlib.closing(self._thread.follow([run])) as deltas:
            for delta in deltas:
                collector.feed(delta.id - run.ids[0], scored(delta))
        return collector.scores

    @property
    def tokens(self) -> list[int]:
        return token_ids(self.info(tokens=True))

    @property
    def text(self) -> str:
        """The branch's text, special tokens included."""
        return self._text_of(self.info(tokens=True))

    def info(self, *, tokens: bool = False) -> dict[str, Any]:
        """``num_tokens``; of them ``resident_tokens`` are in the cache now and ``held_tokens`` kept from eviction;
        ``pending_text`` follows them and has no tokens yet; ``generating``; ``expires_in`` seconds."""
        return dict(self._operate(self._operation("get", tokens=tokens)))

    def close(self) -> None:
        """Deletes it, and ends what it is generating. Idempotent."""
        with ignore_gone():
            self._operate(self._operation("delete"))

    def _operate(self, op: BranchOp) -> Any:
        return self._thread.operate(op)

    def __enter__(self) -> Branch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _piece(engine: EngineBase, piece: Prompt, parse_special: bool) -> Piece:
    if isinstance(piece, str):
        return Piece(piece, parse_special=parse_special)
    if not len(piece):
        return Piece()
    return Piece(tokens=tokens_to_bytes(token_array(piece, engine.vocab_size, "input_ids")))


def token_ids(info: Mapping[str, Any]) -> list[int]:
    """The branch's token ids, of a ``get`` with ``tokens``."""
    return list(tokens_from_bytes(info["tokens"]).tolist())


def scored(delta: Delta) -> Delta:
    """The delta of a scoring request, unless that has failed or was aborted: then raises its error."""
    if delta.finish is not None:
        if delta.finish.reason == "error":
            raise error_of(delta.finish)
        if delta.finish.reason == "abort":
            raise InvalidRequest("branch", "was deleted while it was being scored", status=410)
    return delta


@contextlib.contextmanager
def ignore_gone() -> Iterator[None]:
    """Suppresses the error of a branch that has been deleted or has expired."""
    try:
        yield
    except InvalidRequest as error:
        if error.status != 410:
            raise
