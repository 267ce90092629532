"""The detokenizer process: turns token ids into text and finds stop strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq

from ...config import ServerConfig
from ...messages import Delta, Deltas, Heartbeat, Message, Ready, Shutdown, StopMatched
from ...tokenizer.detokenizer import DetokenizerCore
from ...tokenizer.tokenizer import Tokenizer
from .channels import Inbox, Outbox, ToDetokenizer


class DetokenizerWorker:
    """Receives step outputs from the scheduler; sends deltas to HTTP, and stop-string matches to the scheduler."""

    def __init__(self, config: ServerConfig, context: zmq.Context[Any], run_dir: Path, http: Outbox) -> None:
        self._inbox: Inbox[ToDetokenizer] = Inbox(context, run_dir, "detokenizer")
        self._scheduler = Outbox(context, run_dir, "scheduler")
        self._http = http
        self._core = DetokenizerCore(Tokenizer.load(Path(config.engine.model)))
        http.send([Ready("detokenizer")])

    def run(self) -> None:
        """Serves until `Shutdown`. All that has arrived is answered in one frame to HTTP and one to the scheduler."""
        while True:
            deltas: list[Delta] = []
            stopped: list[int] = []
            leaving = False
            for message in self._inbox.receive(None):
                if isinstance(message, Shutdown):
                    leaving = True
                    continue
                if isinstance(message, Heartbeat):
                    self._http.send([Heartbeat(message.number, "detokenizer")])
                    continue
                new, matched = self._core.feed(message)
                deltas += new
                stopped += matched
            ends: list[Message] = [*self._core.take_settled(), *(StopMatched(id) for id in stopped)]
            self._scheduler.send(ends)
            if deltas:
                self._http.send([Deltas(deltas)])
            if leaving:
                self._scheduler.close()
                self._inbox.close()
                return
