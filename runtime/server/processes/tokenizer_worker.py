"""The tokenizer process: turns the text of requests into token ids, and checks its length in tokens."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import zmq

from ...config import ServerConfig
from ...errors import InvalidRequest
from ...fair_queue import FairQueue
from ...limits import check_text_length, fit
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

LONG = 16_384  # characters; a longer text is tokenized in a thread
_SLICE_SECONDS = 0.001  # of tokenizing before what is done is sent on and the inbox is read again
_POLL_MS = 5  # how often the thread's results are collected

Text = Generate | BranchOp | BranchRun
Unit = list[Text]  # the prompts of one HTTP request, or one operation on a branch


class TokenizerWorker:
    """Receives requests from HTTP; forwards them with token ids to the scheduler, and refuses those that do not fit.

    Owners take turns: the texts of one delay another's by one request. The prompts of a request are tokenized
    together, so that one which is refused fails it before another generates anything. Long texts are tokenized in a
    thread, so that they delay short ones by no more than the CPU that they take. Heartbeats and aborts are not queued
    behind texts.

    The operations of one owner on branches stay in order. `Generate` messages may overtake each other.
    """

    def __init__(self, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> None:
        self._inbox: Inbox[ToTokenizer] = Inbox(context, run_dir, "tokenizer")
        self._scheduler = Outbox(context, run_dir, "scheduler")
        self._http = http
        self._limits: Limits | None = None
        self._tokenizer = Tokenizer.load(Path(config.engine.model))
        self._arriving: Unit = []  # prompts of which `Generate.more` follow
        self._queue: FairQueue[Unit] = FairQueue()
        self._long: FairQueue[Unit] = FairQueue()  # taken from the queue, for the thread
        self._in_thread: Unit | None = None
        self._todo: SimpleQueue[Unit | None] = SimpleQueue()
        self._done: SimpleQueue[list[tuple[Text, Refusal | None]]] = SimpleQueue()
        self._open: set[int] = set()  # requests that have not been forwarded yet
        self._aborted: set[int] = set()  # of them, those whose client has left
        http.send([Ready("tokenizer")])

    def run(self) -> None:
        """Serves until `Shutdown`, and then until every text before it is tokenized."""
        thread = threading.Thread(target=self._encode_long_texts, name="long-texts", daemon=True)
        thread.start()
        shutdown: Shutdown | None = None
        while shutdown is None or self._queue or self._in_thread is not None:
            for message in self._inbox.receive(self._timeout_ms()):
                match message:
                    case Generate() | BranchOp() | BranchRun():
                        self._enqueue(message)
                    case Abort():
                        self._abort(message)
                    case Limits():
                        self._limits = message
                    case Heartbeat():
                        self._scheduler.send([message])  # first: what is reported has been passed on
                        self._http.send([Heartbeat(message.number, "tokenizer")])
                    case Shutdown():
                        shutdown = message
            self._work()
        self._todo.put(None)
        self._scheduler.send([shutdown])
        self._scheduler.close()
        self._inbox.close()

    def _timeout_ms(self) -> int | None:
        if self._queue:
            return 0
        return None if self._in_thread is None else _POLL_MS

    # -- order ---------------------------------------------------------------------------------------------------------

    def _enqueue(self, message: Text) -> None:
        if not isinstance(message, BranchOp):
            self._open.update(message.ids)
        self._arriving.append(message)
        if not (isinstance(message, Generate) and message.more):
            self._queue.put(message.namespace[0], self._arriving)
            self._arriving = []

    def _abort(self, message: Abort) -> None:
        """An abort follows its request. A prompt of which all samples are aborted is not tokenized."""
        if message.id in self._open:
            self._aborted.add(message.id)
        else:
            self._scheduler.send([message])

    def _work(self) -> None:
        """Tokenizes texts for a moment, and sends on what is done."""
        done: list[tuple[Text, Refusal | None]] = []
        end = time.monotonic() + _SLICE_SECONDS
        while self._queue and time.monotonic() < end:
            unit = self._queue.take()
            if sum(map(_characters, unit)) > LONG or self._follows_long(unit[0]):
                self._long.put(unit[0].namespace[0], unit)
            else:
                done += [(message, self._prepare(message)) for message in unit]
        while not self._done.empty():
            done += self._done.get()
            self._in_thread = None
        if self._in_thread is None and self._long:
            self._in_thread = self._long.take()
            self._todo.put(self._in_thread)
        self._send(done)

    def _follows_long(self, message: Text) -> bool:
        """Whether it is an operation on a branch that must stay behind one of the same owner."""
        if isinstance(message, Generate):
            return False
        owner = message.namespace[0]
        return owner in self._long or (self._in_thread is not None and self._in_thread[0].namespace[0] == owner)

    def _encode_long_texts(self) -> None:
        while (unit := self._todo.get()) is not None:
            self._done.put([(message, self._prepare(message)) for message in unit])

    def _send(self, done: list[tuple[Text, Refusal | None]]) -> None:
        """Forwards messages to the scheduler, with aborts after their requests. Those with a refusal are answered from
        here and not forwarded."""
        forward: list[Message] = []
        ended: list[Delta] = []
        for message, refusal in done:
            ids = [] if isinstance(message, BranchOp) else message.ids
            aborted = self._aborted.intersection(ids)
            self._open.difference_update(ids)
            self._aborted -= aborted
            if refusal is not None:
                ended += [Delta(id, finish=Finished(id, "error", error=refusal)) for id in ids]
            elif isinstance(message, Generate) and len(aborted) == len(ids):
                ended += [Delta(id, finish=Finished(id, "abort")) for id in ids]
            else:
                forward += [message, *map(Abort, sorted(aborted))]
        if ended:  # first: one bad prompt fails its HTTP request, before the other prompts generate anything
            self._http.send([Deltas(ended)])
        self._scheduler.send(forward)

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _prepare(self, message: Text) -> Refusal | None:
        """Adds the token ids. Returns why a prompt is refused. A failure of a branch's text becomes the message's
        ``refusal`` instead: the scheduler answers messages in the order of their branch."""
        try:
            if not isinstance(message, Generate):
                encode_message(self._tokenizer, message, lambda text: self._check_length(text, "text"))
            elif message.text is not None and not self._aborted.issuperset(message.ids):
                self._tokenize(message, message.text)
            return None
        except InvalidRequest as error:
            refusal = Refusal.of(error)
        except BaseException:  # a Rust panic is not an `Exception`, and one text must not stop the server
            logger.exception("could not tokenize a text")
            what = "prompt" if isinstance(message, Generate) else "text"
            refusal = Refusal(None, f"the {what} could not be tokenized", 500)
        if isinstance(message, Generate):
            return refusal
        message.refusal = refusal
        return None

    def _tokenize(self, message: Generate, text: str) -> None:
        """Replaces the message's text by its tokens. Raises `InvalidRequest` if they exceed the limits."""
        if self._limits is None:
            raise RuntimeError("a request arrived before the limits")
        self._check_length(text, "prompt")
        marks = [position for position, _ in message.breakpoints]
        ids, counts = self._tokenizer.encode_marked(text, marks, message.add_special_tokens)
        message.params = fit(len(ids), message.params, self._limits, shorten=message.shorten)
        message.breakpoints = [
            (len(ids) if position < 0 else count, seconds)
            for (position, seconds), count in zip(message.breakpoints, counts, strict=True)
        ]
        message.text, message.tokens = None, ids.astype("<i4", copy=False).tobytes()

    def _check_length(self, text: str, field: str) -> None:
        if self._limits is not None:
            check_text_length(text, self._tokenizer.longest_token, self._limits, field)


def _characters(message: Text) -> int:
    """Characters to tokenize."""
    if isinstance(message, Generate):
        return len(message.text or "")
    pieces = [message.piece] if message.piece is not None else []
    if isinstance(message, BranchRun):
        pieces += message.continuations or []
    return sum(len(piece.before) + len(piece.text or "") for piece in pieces)
