"""The tokenizer process: turns the text of requests into token ids, and checks its length in tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import zmq

from ...config import ServerConfig
from ...errors import InvalidRequest
from ...limits import fit
from ...messages import (
    Abort,
    BranchOp,
    BranchRun,
    Delta,
    Deltas,
    Finished,
    Generate,
    Heartbeat,
    Limits,
    Message,
    Ready,
    Refusal,
    Shutdown,
)
from ...tokenizer.pieces import encode_message
from ...tokenizer.tokenizer import Tokenizer
from .channels import Inbox, Outbox, ToTokenizer

logger = logging.getLogger(__name__)


class TokenizerWorker:
    """Receives requests from HTTP; forwards them with token ids to the scheduler, and refuses those that do not fit."""

    def __init__(self, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> None:
        self._inbox: Inbox[ToTokenizer] = Inbox(context, run_dir, "tokenizer")
        self._scheduler = Outbox(context, run_dir, "scheduler")
        self._http = http
        self._limits: Limits | None = None
        self._tokenizer = Tokenizer.load(Path(config.engine.model))
        self._longest_token = _longest_token(self._tokenizer)
        http.send([Ready("tokenizer")])

    def run(self) -> None:
        """Serves until `Shutdown`. Messages are forwarded in the order in which they arrive."""
        while True:
            forward: list[Message] = []
            refused: list[Delta] = []
            leaving = False
            for message in self._inbox.receive(None):
                match message:
                    case Generate():
                        self._prepare(message, forward, refused)
                    case BranchOp() | BranchRun():
                        self._encode(message)
                        forward.append(message)
                    case Abort():
                        forward.append(message)
                    case Limits():
                        self._limits = message
                    case Heartbeat():
                        self._http.send([Heartbeat(message.number, "tokenizer")])
                        forward.append(message)
                    case Shutdown():
                        forward.append(message)
                        leaving = True
            if refused:  # first: one bad prompt fails its HTTP request, before the other prompts generate anything
                self._http.send([Deltas(refused)])
            self._scheduler.send(forward)
            if leaving:
                self._scheduler.close()
                self._inbox.close()
                return

    def _prepare(self, message: Generate, forward: list[Message], refused: list[Delta]) -> None:
        try:
            if message.text is not None:
                self._tokenize(message, message.text)
            forward.append(message)
        except InvalidRequest as error:
            refused += _refusals(message, Refusal.of(error))
        except BaseException:  # a Rust panic is not an `Exception`, and one text must not stop the server
            logger.exception("could not tokenize a prompt")
            refused += _refusals(message, Refusal(None, "the prompt could not be tokenized", 500))

    def _tokenize(self, message: Generate, text: str) -> None:
        """Replaces the message's text by its tokens. Raises `InvalidRequest` if they exceed the limits."""
        if self._limits is None:
            raise RuntimeError("a request arrived before the limits")
        self._check_bytes(text, "prompt")
        marks = [position for position, _ in message.breakpoints]
        ids, counts = self._tokenizer.encode_marked(text, marks, message.add_special_tokens)
        message.params = fit(len(ids), message.params, self._limits, shorten=message.shorten)
        message.breakpoints = [
            (len(ids) if position < 0 else count, seconds)
            for (position, seconds), count in zip(message.breakpoints, counts, strict=True)
        ]
        message.text, message.tokens = None, ids.astype("<i4", copy=False).tobytes()

    def _encode(self, message: BranchOp | BranchRun) -> None:
        """A failure becomes the message's ``refusal``: the scheduler answers messages in the order of their branch."""
        try:
            encode_message(self._tokenizer, message, lambda text: self._check_bytes(text, "text"))
        except BaseException:  # as in `_prepare`
            logger.exception("could not tokenize a text")
            message.refusal = Refusal(None, "the text could not be tokenized", 500)

    def _check_bytes(self, text: str, field: str) -> None:
        """Refuses a text that is too long for any tokenization before it is tokenized, which would delay all others."""
        if self._limits is None or self._longest_token is None:
            return
        bound = min(self._limits.max_model_len, self._limits.pool_tokens)
        size = len(text.encode())
        if size > bound * self._longest_token:
            raise InvalidRequest(
                field,
                f"has {size} bytes, at least {size // self._longest_token} tokens; the limit is {bound} tokens",
            )


def _longest_token(tokenizer: Tokenizer) -> int | None:
    """Bytes of the longest token; None if a byte of a text may end up in no token, which makes it no bound."""
    backend = tokenizer.backend
    greedy = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if not tokenizer.byte_level or backend.normalizer is not None or greedy:
        return None
    return max(len(token.encode()) for token in backend.get_vocab())


def _refusals(message: Generate, refusal: Refusal) -> list[Delta]:
    """A terminal delta for each of the request's samples; the scheduler never sees the request."""
    return [Delta(id, finish=Finished(id, "error", error=refusal)) for id in message.ids]
