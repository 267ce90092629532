"""``/branches``: prompts that the server keeps, so that a client sends only new text."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from fastapi import Request, Response
from pydantic import Field

from ....errors import BranchwiseError, InvalidRequest, renaming
from ....limits import fit
from ....messages import BranchOp, BranchRun, Piece
from ....sampling_params import SamplingParams
from ....scheduler.branches.registry import MAX_FORK
from ....scheduler.branches.scores import Score, ScoreCollector
from ....tokenizer.pieces import check_no_special, rendered_piece
from ..fields.cache import Partition, namespace_of, seconds
from ..fields.known import ANSWER_FIELDS, UNSUPPORTED
from ..fields.parse import Strict, parse
from ..fields.prompts import check_count, check_label, check_priority, prepare_params, token_bytes
from ..openai.chat.request import chat_text
from ..plumbing.body import read_json_object
from ..plumbing.connection import connection_of
from ..plumbing.errors import describe
from ..plumbing.failures import BRANCH_BUSY, BRANCH_GONE, NO_BRANCH, TOO_MANY_BRANCHES
from ..plumbing.respond import respond
from ..plumbing.routes import Routes, flag, read_query
from ..plumbing.sse import json_response, wait
from ..sglang.reply import GenerateReply
from ..sglang.request import GenerateSampling, check_places, generate_names, generate_sampling
from ..state import AppState
from .admin import sees_all

MAX_OPS = 1024  # of one batch
_NO_TOKENS = SamplingParams(max_tokens=0)
_RUN_NAMES = generate_names("branch")
_GET_QUERY = {"text": flag("Add its text."), "input_ids": flag("Add its tokens.")}
_GONE = (NO_BRANCH, BRANCH_GONE)
_BUSY = (*_GONE, BRANCH_BUSY)

Tokens = Any  # list[int], or an array: checked with the vocabulary at hand


class ExtendRequest(Strict):
    """Exactly one of ``text`` and ``input_ids``."""

    text: str | None = None
    input_ids: Tokens = Field(None, description="A list of token ids.")
    parse_special: bool | None = Field(None, description="Whether special tokens may be spelled out in the text.")


class CreateRequest(ExtendRequest, Partition):
    """A branch of a text, of token ids, of messages, of another branch, or of nothing yet."""

    messages: list[Any] | None = Field(
        None, description="A conversation, with the chat fields that shape its prompt, such as tools."
    )
    parent: str | None = None
    ttl: str | float | int | None = Field(
        None, description="Seconds it lives after each use, or a number with s, m, h or d. Default: the server's."
    )


# A branch's part of the cache is set when it is created, and it keeps its own pages.
_CREATE_UNSUPPORTED = UNSUPPORTED | {"prompt_cache_options", "prompt_cache_breakpoint"}
_UNSUPPORTED = _CREATE_UNSUPPORTED | {*Partition.model_fields, "text", "input_ids"}


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


class BatchRequest(Strict):
    ops: list[Any] = Field(
        description=f"1 to {MAX_OPS} operations: each has op (create, fork, extend or delete), id but for create, and "
        "the fields of its own route."
    )


class BatchOperation(Strict):
    """One of a batch: the fields of its own route, what it is, and the branch's id where the route has one."""

    op: Literal["create", "fork", "extend", "delete"]
    id: str = ""


def routes(state: AppState) -> Routes:
    routes = Routes("branches")

    @routes.add("POST", "/branches", body=CreateRequest, errors=[*_BUSY, TOO_MANY_BRANCHES])
    async def create(request: Request) -> Response:
        """A new branch: of a text, of token ids, of messages, of another branch, or of nothing yet."""
        made = await _create(state, await read_json_object(request))
        return _answer(state, request, made, [made])

    @routes.add("GET", "/branches")
    async def counts() -> Response:
        """How many branches there are, and the pages they hold. Where several tenants have keys, the caller's own."""
        owner = None if sees_all(state) else state.namespaces.of(None)[0]
        facts = await state.client.control("branches", owner)
        engine = state.config.engine
        return json_response(
            facts | {"max_branches": engine.max_branches if owner is None else engine.max_branches_per_key}
        )

    @routes.add("POST", "/branches/batch", body=BatchRequest)
    async def batch(request: Request) -> Response:
        """Creates, forks, extensions and deletions in one round trip, done in order. An operation that fails has its
        error as its result; the others are still done."""
        ops = parse(BatchRequest, await read_json_object(request)).ops
        if not 1 <= len(ops) <= MAX_OPS:
            raise InvalidRequest("ops", f"must hold 1 to {MAX_OPS} operations, got {len(ops)}")
        results = await asyncio.gather(*(_one(state, i, op) for i, op in enumerate(ops)))
        made = [each for each in results if "status" not in each and ("ids" in each or "id" in each)]
        return _answer(state, request, {"results": results}, made)

    @routes.add("GET", "/branches/{id}", query=_GET_QUERY, errors=_GONE)
    async def get(id: str, request: Request) -> Response:
        """The state of a branch; its text and tokens only on request."""
        with_text, with_ids = read_query(request, _GET_QUERY)
        facts = await state.client.operate(_about(state, id, "get", tokens=with_text or with_ids))
        tokens = np.frombuffer(facts.pop("tokens", b""), "<i4").tolist()
        if with_text:
            facts["text"] = state.tokenizer.decode(tokens, skip_special_tokens=False) + facts["pending_text"]
        if with_ids:
            facts["input_ids"] = tokens
        return json_response(facts)

    @routes.add("DELETE", "/branches/{id}", errors=_GONE)
    async def delete(id: str) -> Response:
        """Delete a branch, and abort what it is generating."""
        return json_response(await state.client.operate(_about(state, id, "delete")))

    @routes.add("POST", "/branches/{id}/fork", body=ForkRequest, errors=[*_BUSY, TOO_MANY_BRANCHES])
    async def fork(id: str, request: Request) -> Response:
        """Create ``n`` copies of a branch as it is now."""
        made = await _fork(state, id, await read_json_object(request))
        return _answer(state, request, made, [made])

    @routes.add("POST", "/branches/{id}/extend", body=ExtendRequest, errors=_BUSY)
    async def extend(id: str, request: Request) -> Response:
        """Append text, tokenized by itself, or token ids, to a branch."""
        return json_response(await _extend(state, id, await read_json_object(request)))

    @routes.add("POST", "/branches/{id}/generate", body=RunRequest, errors=_BUSY, generates=True)
    async def generate(id: str, request: Request) -> Response:
        """Generate on a branch. The returned text stays in it, without stop tokens and stop strings. Of ``n`` samples
        the first stays."""
        raw = await read_json_object(request)
        check_places(raw)
        body = parse(RunRequest, raw, unsupported=_UNSUPPORTED | ANSWER_FIELDS)
        params = generate_sampling(
            parse(GenerateSampling, body.sampling_params or {}, "sampling_params."),
            state.preferred,
            body.top_logprobs_num if body.return_logprob else None,
            body.logprob_start_len,
        )
        with renaming(_RUN_NAMES):
            params = prepare_params(params, state.client.limits.vocab_size)
        check_label(body.rid, "rid")
        reply = _BranchReply(state, body, id, params)
        run = BranchRun(
            [],
            id,
            state.namespaces.of(None),
            params,
            None if body.extend is None else _piece(state, body.extend, body.parse_special, "extend"),
            priority=check_priority(body.priority),
            echo_tokens=body.return_prompt_token_ids,
            stream=body.stream,
        )
        call = state.client.open_run(run, params.n, body.rid or None)
        return await respond(call, request, reply, stream=body.stream, names=_RUN_NAMES)

    @routes.add("POST", "/branches/{id}/score", body=ScoreRequest, errors=_BUSY, generates=True)
    async def score(id: str, request: Request) -> Response:
        """Logprobs of the tokens of continuations of a branch, which is left unchanged. ``unconditional``: also those
        of the same tokens by themselves."""
        body = parse(ScoreRequest, await read_json_object(request), unsupported=_UNSUPPORTED)
        if not body.continuations:
            raise InvalidRequest("continuations", "must not be empty")
        requests = len(body.continuations) * (1 + body.unconditional)
        check_count(requests, state.config.max_samples_per_request, "continuations")
        pieces = [
            _piece(state, continuation, body.parse_special, f"continuations[{i}]")
            for i, continuation in enumerate(body.continuations)
        ]
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        run = BranchRun([], id, state.namespaces.of(None), params, continuations=pieces, stream=False)
        run.unconditional, run.priority = body.unconditional, check_priority(body.priority)
        collector = ScoreCollector(requests, unconditional=body.unconditional)
        call = state.client.open_run(run, requests)
        with call:
            for index, delta in await wait(call, request.scope, call.all):
                if delta.finish is not None and delta.finish.reason == "abort":
                    raise InvalidRequest("branch", "was deleted while it was being scored", status=410)
                collector.feed(index, delta)
        return json_response({"scores": [_described(score) for score in collector.scores]})

    return routes


class _BranchReply(GenerateReply):
    """Adds to ``meta_info``: ``cache.refilled``, tokens computed again because their pages had been evicted; at the end
    ``branch``, how many of ``output_ids`` stay, and the text after them that has no tokens yet."""

    def __init__(self, state: AppState, body: RunRequest, branch: str, params: SamplingParams) -> None:
        super().__init__(state.tokenizer, body.return_text_in_logprobs, body.return_prompt_token_ids)
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


def _answer(state: AppState, request: Request, answer: Any, made: Sequence[Mapping[str, Any]]) -> Response:
    """Deletes the branches that were ``made`` if the client has left: nobody has their ids."""
    if connection_of(request.scope).is_lost:
        for each in made:
            state.client.delete_branches(state.namespaces.of(None), each)
    return json_response(answer)


async def _one(state: AppState, i: int, raw: Any) -> Any:
    try:
        if not isinstance(raw, dict):
            raise InvalidRequest(f"ops[{i}]", f"must be an object, got {type(raw).__name__}")
        op = parse(BatchOperation, raw, f"ops[{i}].")
        match op.op:
            case "create":
                return await _create(state, raw, f"ops[{i}].")
            case "fork":
                return await _fork(state, op.id, raw, f"ops[{i}].")
            case "extend":
                return await _extend(state, op.id, raw, f"ops[{i}].")
            case "delete":
                return await state.client.operate(_about(state, op.id, "delete"))
    except BranchwiseError as error:
        status, body = describe(error)
        return body | {"status": status}


async def _create(state: AppState, raw: Mapping[str, Any], within: str = "") -> Any:
    body = parse(CreateRequest, raw, within, _CREATE_UNSUPPORTED)
    if sum(given is not None for given in (body.text, body.input_ids, body.messages)) > 1:
        raise InvalidRequest(f"{within}text", "cannot be combined with input_ids or messages: give one of the three")
    namespace = namespace_of(state, body, within)
    for name in (*Partition.model_fields, "messages"):
        if body.parent and getattr(body, name):
            raise InvalidRequest(f"{within}{name}", "is inherited from the parent: leave it out")
    if body.messages is not None:
        piece: Piece | None = await _conversation(state, raw, within, bool(body.parse_special))
    else:
        # A prompt is parsed as in /generate; text appended to a parent, as in /extend.
        trusted = not body.parent if body.parse_special is None else body.parse_special
        piece = _given(state, body, trusted, within)
    longest = state.config.engine.branch_ttl
    ttl = None if body.ttl is None else seconds(body.ttl, longest, f"{within}ttl", "--branch-ttl")
    op = BranchOp(0, "create", namespace, body.parent or "", piece, ttl=ttl)
    return await state.client.operate(op)


async def _conversation(state: AppState, raw: Mapping[str, Any], within: str, parse_special: bool) -> Piece:
    """The prompt of a chat with the same fields. Messages may spell out special tokens only with ``parse_special``."""
    text, _ = await chat_text(state, raw, within)
    if not parse_special:
        check_no_special(state.tokenizer, raw["messages"])
    return rendered_piece(text)


async def _fork(state: AppState, id: str, raw: Mapping[str, Any], within: str = "") -> Any:
    n = parse(ForkRequest, raw, within, _UNSUPPORTED).n
    if not 1 <= n <= MAX_FORK:  # before it is put into a message, which has 64-bit integers
        raise InvalidRequest(f"{within}n", f"must be between 1 and {MAX_FORK}, got {n}")
    return await state.client.operate(_about(state, id, "fork", n=n))


async def _extend(state: AppState, id: str, raw: Mapping[str, Any], within: str = "") -> Any:
    body = parse(ExtendRequest, raw, within, _UNSUPPORTED)
    piece = _given(state, body, bool(body.parse_special), within)
    if piece is None:
        raise InvalidRequest(f"{within}text", "or input_ids is required: give exactly one")
    return await state.client.operate(_about(state, id, "extend", piece=piece))


def _given(state: AppState, body: ExtendRequest, parse_special: bool, within: str) -> Piece | None:
    if body.text is not None and body.input_ids is not None:
        raise InvalidRequest(f"{within}text", "or input_ids is required: give exactly one")
    if body.text is not None:
        return _piece(state, body.text, parse_special, f"{within}text")
    if isinstance(body.input_ids, str):
        raise InvalidRequest(f"{within}input_ids", "must hold token ids, got str")
    return None if body.input_ids is None else _piece(state, body.input_ids, False, f"{within}input_ids")


def _piece(state: AppState, value: Any, parse_special: bool, field: str) -> Piece:
    """Raises `InvalidRequest` unless ``value`` is text or token ids of the vocabulary."""
    if isinstance(value, str):
        return Piece(value, parse_special=parse_special)
    if not isinstance(value, (list, np.ndarray)):
        raise InvalidRequest(field, f"must be a string or a list of token ids, got {type(value).__name__}")
    if not len(value):
        return Piece(tokens=b"")
    limits = state.client.limits
    fit(len(value), _NO_TOKENS, limits, path=field)  # first: it bounds the ids that are looked at
    return Piece(tokens=token_bytes(value, limits.vocab_size, field))


def _about(state: AppState, id: str, what: Literal["fork", "extend", "get", "delete"], **fields: Any) -> BranchOp:
    if not id:
        raise InvalidRequest("id", "must name a branch")
    return BranchOp(0, what, state.namespaces.of(None), id, **fields)


def _described(score: Score) -> dict[str, Any]:
    described: dict[str, Any] = {
        "token_ids": score.token_ids,
        "logprobs": score.logprobs,
        "sum": score.sum,
        "mean": score.mean,
        "cached_tokens": score.cached_tokens,
        "cached_logprobs": score.cached_logprobs,
        "prompt_tokens": score.prompt_tokens,
    }
    if score.unconditional is not None:
        alone = score.unconditional
        described["unconditional"] = {"logprobs": alone.logprobs, "sum": alone.sum, "mean": alone.mean}
    return described
