"""Requests to several replicas: splits them, and joins the answers."""

from __future__ import annotations

import json
from collections.abc import Collection, MutableMapping, Sequence
from typing import Any, NamedTuple

import msgspec

from ...runtime.fleet.instances import instance_of
from .forward import JSON_HEADERS, Headers

BATCH = ("POST", "/branches/batch")
# Sent to every replica; numbers in the answers are added.
EVERYWHERE = {
    ("POST", "/flush_cache"),
    ("GET", "/flush_cache"),
    ("POST", "/abort_request"),
    ("POST", "/cache/evict"),
    ("GET", "/branches"),
}


class Answer:
    """A whole answer, collected from the messages of an ASGI application."""

    def __init__(self, status: int = 0, headers: Headers | None = None, body: bytes = b"") -> None:
        self.status, self.headers, self.body = status, headers or [], body

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """An ASGI ``send``."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], message["headers"]
        else:
            self.body += message.get("body", b"")


def error_answer(status: int, problem: str) -> Answer:
    """An error of the cluster itself."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"error": {"message": problem, "type": kind, "param": None, "code": None}}
    headers = [*JSON_HEADERS, *([(b"retry-after", b"1")] if status == 503 else [])]
    return Answer(status, headers, json.dumps(error).encode())


def first_failed(answers: Collection[Answer]) -> Answer | None:
    """The first error among the answers of all replicas; an error if there is no answer."""
    if not answers:
        return error_answer(503, "no replica can take the request")
    return next((answer for answer in answers if answer.status >= 400), None)


def summed(answers: Collection[Answer]) -> Answer:
    """The answer of a request that went to every replica: the first error, or else the sums of all numbers."""
    failed = first_failed(answers)
    if failed is not None:
        return failed
    total: dict[str, Any] = {}
    for answer in answers:
        for name, value in (json.loads(answer.body) if answer.body else {}).items():
            both = isinstance(value, int) and isinstance(total.get(name), int)
            total[name] = total[name] + value if both else value
    return Answer(200, JSON_HEADERS, json.dumps(total).encode())


class BatchPart(NamedTuple):
    """The operations of a batch for one replica: their positions in the batch, and a body."""

    positions: list[int]
    body: bytes


class _Operation(msgspec.Struct):
    """The fields that may name an existing branch."""

    id: str = ""
    parent: str | None = None


def split_batch(body: bytes) -> list[BatchPart]:
    """The operations of a ``/branches/batch``, by the replica that made their branch.

    No operation can name a branch that the same batch creates, so operations on branches of different replicas do not
    depend on each other; those of one replica keep their order. New branches without a parent are one more part, as a
    batch usually creates them from one prefix. A part has null in place of the other parts' operations, so that errors
    name the client's positions. A body that is not a batch is returned whole: the replica says what is wrong with it.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        operations = msgspec.json.decode(fields["ops"], type=list[msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, KeyError):
        return [BatchPart([], body)]
    by_instance: dict[bytes | None, list[int]] = {}
    for position, operation in enumerate(operations):
        by_instance.setdefault(_instance(operation), []).append(position)
    if len(by_instance) <= 1:
        return [BatchPart(list(range(len(operations))), body)]
    parts = []
    for positions in by_instance.values():
        kept: list[msgspec.Raw | None] = [None] * len(operations)
        for position in positions:
            kept[position] = operations[position]
        parts.append(BatchPart(positions, msgspec.json.encode({**fields, "ops": kept})))
    return parts


def _instance(operation: msgspec.Raw) -> bytes | None:
    try:
        asked = msgspec.json.decode(operation, type=_Operation)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return instance_of(asked.id or asked.parent or "")


def joined_batch(parts: Sequence[BatchPart], answers: Sequence[Answer]) -> Answer:
    """The answer of a batch from those of its parts. A part that failed as a whole is an error of each operation of it;
    if every part failed, the first answer stands for all."""
    if all(answer.status != 200 for answer in answers):
        return answers[0]
    results: list[Any] = [None] * sum(len(part.positions) for part in parts)
    for part, answer in zip(parts, answers, strict=True):
        if answer.status == 200:
            found = msgspec.json.decode(answer.body, type=dict[str, list[msgspec.Raw]])["results"]
            for position in part.positions:
                results[position] = found[position]
            continue
        error = msgspec.json.decode(answer.body, type=dict[str, msgspec.Raw])
        for position in part.positions:
            results[position] = {**error, "status": answer.status}
    return Answer(200, JSON_HEADERS, msgspec.json.encode({"results": results}))
