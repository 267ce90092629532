"""``/branches``: prompts the server remembers, so that a client sends only what is new."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import Field

from ..branches.pieces import chat_piece
from ..branches.registry import MAX_FORK
from ..branches.scores import Score, ScoreCollector
from ..errors import BranchwiseError, InvalidRequest
from ..messages import BranchOp, BranchRun, Piece
from ..sampling_params import SamplingParams
from .answer import Answer
from .body import read_json_object
from .errors import describe
from .prompts import check_count, check_label, check_priority, prepare_params, token_bytes
from .requests import GENERATE_NAMES, GenerateSampling, Strict, generate_sampling, parse
from .site import Site
from .sse import json_response, wait

MAX_OPS = 1024  # of one batch

Tokens = Any  # list[int], or an array: checked with the vocabulary at hand


class _Text(Strict):
    text: str | None = None
    input_ids: Tokens = Field(None, description="A list of token ids.")
    parse_special: bool | None = Field(None, description="Whether special tokens may be spelled out in the text.")


class CreateRequest(_Text):
    """A branch of a text, of token ids, of messages, of another branch, or of nothing yet."""

    parent: str | None = None
    cache_salt: str | None = None
    ttl: float | None = None


class ForkRequest(Strict):
    n: int = 1


class RunRequest(Strict):
    """SGLang's ``/generate`` on a branch: the same fields, the same answer. ``extend`` is appended first."""

    extend: str | Tokens = None
    parse_special: bool = False
    sampling_params: dict[str, Any] | None = None
    stream: bool = False
    rid: str | None = None
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    priority: int = 0


class ScoreRequest(Strict):
    """``continuations``: texts or lists of token ids."""

    continuations: list[Any]
    parse_special: bool = False
    unconditional: bool = False
    priority: int = 0


class Operation(Strict):
    """One of a batch: the fields of its own route, what it is, and the branch's id where the route has one."""

    op: Literal["create", "fork", "extend", "delete"]
    id: str = ""


def router(site: Site) -> APIRouter:
    routes = APIRouter()

    @routes.post("/branches", openapi_extra=_schema(CreateRequest))
    async def create(request: Request) -> Response:
        """A new branch, of `CreateRequest`."""
        return json_response(await _create(site, await read_json_object(request)))

    @routes.get("/branches")
    async def counts() -> Response:
        """How many there are and what they hold."""
        facts = await site.client.control("branches")
        return json_response(facts | {"max_branches": site.config.engine.max_branches})

    @routes.post("/branches/batch")
    async def batch(request: Request) -> Response:
        """``{"ops": [...]}``: creates, forks, extensions and deletions in one round trip, done in order. One that fails
        has its error in its place, and the others go on."""
        body = await read_json_object(request)
        ops = body.get("ops")
        if not isinstance(ops, list) or not 1 <= len(ops) <= MAX_OPS:
            raise InvalidRequest(f"ops must be a list of 1 to {MAX_OPS} operations", field="ops")
        return json_response({"results": await asyncio.gather(*(_one(site, i, op) for i, op in enumerate(ops)))})

    @routes.get("/branches/{id}")
    async def get(id: str, request: Request) -> Response:
        """What it is; ``?text=true`` and ``?input_ids=true`` add all of its text and tokens."""
        with_text, with_ids = (_flag(request, name) for name in ("text", "input_ids"))
        facts = await site.client.operate(_about(site, id, "get", tokens=with_text or with_ids))
        tokens = np.frombuffer(facts.pop("tokens", b""), "<i4").tolist()
        if with_text:
            facts["text"] = site.tokenizer.decode(tokens, skip_special_tokens=False) + facts["pending_text"]
        if with_ids:
            facts["input_ids"] = tokens
        return json_response(facts)

    @routes.delete("/branches/{id}")
    async def delete(id: str) -> Response:
        """Ends it, and what it is generating."""
        return json_response(await site.client.operate(_about(site, id, "delete")))

    @routes.post("/branches/{id}/fork", openapi_extra=_schema(ForkRequest))
    async def fork(id: str, request: Request) -> Response:
        """``n`` branches that are as this one is now."""
        return json_response(await _fork(site, id, await read_json_object(request)))

    @routes.post("/branches/{id}/extend", openapi_extra=_schema(_Text))
    async def extend(id: str, request: Request) -> Response:
        """Appends text, tokenized by itself, or token ids."""
        return json_response(await _extend(site, id, await read_json_object(request)))

    @routes.post("/branches/{id}/generate", openapi_extra=_schema(RunRequest))
    async def generate(id: str, request: Request) -> Response:
        """Generates; what is returned stays in the branch, but for stop tokens and stop strings. Of ``n`` samples the
        first one stays."""
        body = parse(RunRequest, await read_json_object(request))
        params = prepare_params(
            generate_sampling(
                parse(GenerateSampling, body.sampling_params or {}, "sampling_params."),
                body.top_logprobs_num if body.return_logprob else None,
                body.logprob_start_len,
            ),
            site.client.limits,
            GENERATE_NAMES,
            site.config,
        )
        check_label(body.rid, "rid")
        answer = _BranchAnswer(site, body, id, params)
        run = BranchRun(
            [],
            id,
            site.namespaces.of(None),
            params,
            None if body.extend is None else _piece(site, body.extend, body.parse_special, "extend"),
            priority=check_priority(body.priority),
            echo_tokens=body.return_prompt_token_ids,
            max_tokens=GENERATE_NAMES["max_tokens"],
            whole=not body.stream,
        )
        call = site.client.open_run(run, params.n, body.rid or None)
        return await answer.respond(call, request.receive, body.stream)

    @routes.post("/branches/{id}/score", openapi_extra=_schema(ScoreRequest))
    async def score(id: str, request: Request) -> Response:
        """Logprobs of every continuation's tokens after the branch, which stays as it is. ``unconditional``: also those
        of the same tokens by themselves."""
        body = parse(ScoreRequest, await read_json_object(request))
        if not body.continuations:
            raise InvalidRequest("continuations must not be empty", field="continuations")
        requests = len(body.continuations) * (1 + body.unconditional)
        check_count(requests, site.config.max_samples_per_request, "continuations")
        pieces = [
            _piece(site, continuation, body.parse_special, f"continuations[{i}]")
            for i, continuation in enumerate(body.continuations)
        ]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        run = BranchRun([], id, site.namespaces.of(None), params, continuations=pieces, whole=True)
        run.unconditional, run.priority = body.unconditional, check_priority(body.priority)
        collector = ScoreCollector(requests, unconditional=body.unconditional)
        call = site.client.open_run(run, requests)
        with call:
            for index, delta in await wait(call, request.receive, call.all):
                if delta.finish is not None and delta.finish.reason == "abort":
                    raise InvalidRequest("the branch was deleted while it was scored", field="branch", status=410)
                collector.feed(index, delta)
        return json_response({"scores": [_described(score) for score in collector.scores]})

    return routes


class _BranchAnswer(Answer):
    """``meta_info.cache`` has ``refilled`` too: tokens computed again, for their pages were lost to memory pressure.
    ``meta_info.branch`` in the end: how many of ``output_ids`` stay, and the text after them that has no tokens yet."""

    def __init__(self, site: Site, body: RunRequest, branch: str, params: SamplingParams) -> None:
        super().__init__(site.tokenizer, body.return_text_in_logprobs, body.return_prompt_token_ids)
        self._branch = branch
        self.expect(body.rid or uuid.uuid4().hex, params)
        self.is_list = params.n > 1

    def result(self, index: int) -> dict[str, Any]:
        result, output = super().result(index), self.outputs[index]
        if output.cache is not None:
            result["meta_info"]["cache"]["refilled"] = output.cache.refilled
        if output.settled is not None:
            settled = output.settled
            result["meta_info"]["branch"] = {
                "id": self._branch,
                "num_tokens": output.prompt_tokens + settled.kept,
                "kept_tokens": settled.kept,
                "pending_text": settled.rest,
            }
        return result


async def _one(site: Site, i: int, raw: Any) -> Any:
    try:
        if not isinstance(raw, dict):
            raise InvalidRequest(f"ops[{i}] must be an object, got {type(raw).__name__}", field=f"ops[{i}]")
        op = parse(Operation, raw, f"ops[{i}].")
        match op.op:
            case "create":
                return await _create(site, raw, f"ops[{i}].")
            case "fork":
                return await _fork(site, op.id, raw, f"ops[{i}].")
            case "extend":
                return await _extend(site, op.id, raw, f"ops[{i}].")
            case "delete":
                return await site.client.operate(_about(site, op.id, "delete"))
    except BranchwiseError as error:
        status, body = describe(error)
        return body | {"status": status}


async def _create(site: Site, raw: Mapping[str, Any], within: str = "") -> Any:
    body = parse(CreateRequest, {name: value for name, value in raw.items() if name != "messages"}, within)
    messages = raw.get("messages")
    if sum(given is not None for given in (body.text, body.input_ids, messages)) > 1:
        raise InvalidRequest(f"{within}give one of text, input_ids and messages", field=f"{within}text")
    check_label(body.cache_salt, f"{within}cache_salt")
    if body.parent and (body.cache_salt or messages is not None):
        field = "cache_salt" if body.cache_salt else "messages"
        raise InvalidRequest(f"{within}{field} is its parent's; leave it out", field=f"{within}{field}")
    if messages is not None:
        _ = site.client.limits  # raises until there is a tokenizer
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise InvalidRequest(f"{within}messages must be a list of objects", field=f"{within}messages")
        piece: Piece | None = chat_piece(site.tokenizer, messages, bool(body.parse_special))
    else:
        # A prompt is read as /generate reads it; what goes on from another branch, as /extend does.
        trusted = not body.parent if body.parse_special is None else body.parse_special
        piece = _given(site, body, trusted, within)
    op = BranchOp(0, "create", site.namespaces.of(body.cache_salt), body.parent or "", piece, ttl=body.ttl)
    return await site.client.operate(op)


async def _fork(site: Site, id: str, raw: Mapping[str, Any], within: str = "") -> Any:
    n = parse(ForkRequest, raw, within).n
    if not 1 <= n <= MAX_FORK:  # before it is a message: not every number fits into one
        raise InvalidRequest(f"{within}n must be between 1 and {MAX_FORK}, got {n}", field=f"{within}n")
    return await site.client.operate(_about(site, id, "fork", n=n))


async def _extend(site: Site, id: str, raw: Mapping[str, Any], within: str = "") -> Any:
    body = parse(_Text, raw, within)
    piece = _given(site, body, bool(body.parse_special), within)
    if piece is None:
        raise InvalidRequest(f"{within}give exactly one of text and input_ids", field=f"{within}text")
    return await site.client.operate(_about(site, id, "extend", piece=piece))


def _given(site: Site, body: _Text, parse_special: bool, within: str) -> Piece | None:
    if body.text is not None and body.input_ids is not None:
        raise InvalidRequest(f"{within}give exactly one of text and input_ids", field=f"{within}text")
    if body.text is not None:
        return _piece(site, body.text, parse_special, f"{within}text")
    if isinstance(body.input_ids, str):
        raise InvalidRequest(f"{within}input_ids must hold token ids, got str", field=f"{within}input_ids")
    return None if body.input_ids is None else _piece(site, body.input_ids, False, f"{within}input_ids")


def _piece(site: Site, value: Any, parse_special: bool, field: str) -> Piece:
    """Raises `InvalidRequest` unless it is text or token ids of the model's vocabulary."""
    if isinstance(value, str):
        return Piece(value, parse_special=parse_special)
    if not isinstance(value, (list, np.ndarray)):
        raise InvalidRequest(
            f"{field} must be a string or a list of token ids, got {type(value).__name__}", field=field
        )
    return Piece(tokens=token_bytes(value, site.client.limits.vocab_size, field) if len(value) else b"")


def _about(site: Site, id: str, what: Literal["fork", "extend", "get", "delete"], **fields: Any) -> BranchOp:
    if not id:
        raise InvalidRequest("a branch must be named", field="id")
    return BranchOp(0, what, site.namespaces.of(None), id, **fields)


def _described(score: Score) -> dict[str, Any]:
    described: dict[str, Any] = {
        "token_ids": score.token_ids,
        "logprobs": score.logprobs,
        "sum": score.sum,
        "mean": score.mean,
        "cached_tokens": score.cached_tokens,
        "prompt_tokens": score.prompt_tokens,
    }
    if score.unconditional is not None:
        alone = score.unconditional
        described["unconditional"] = {"logprobs": alone.logprobs, "sum": alone.sum, "mean": alone.mean}
    return described


def _flag(request: Request, name: str) -> bool:
    value = request.query_params.get(name, "false")
    if value not in ("true", "false", "1", "0"):
        raise InvalidRequest(f"{name} must be true or false, got {value[:40]!r}", field=name)
    return value in ("true", "1")


def _schema(body: type[Strict]) -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": body.model_json_schema()}}}}
