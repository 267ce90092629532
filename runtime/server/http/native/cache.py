"""``/cache/...``: statistics, explanations, warming and pinning. All of it concerns the caller's own part of the
cache."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from fastapi import Request, Response
from pydantic import Field

from ....chat.breaks import breaks
from ....chat.conversation import Conversation
from ....chat.volatile import part_at, volatile_parts
from ....config import parse_bytes
from ....errors import InvalidRequest, LoadError, renaming
from ....limits import check_text_length, fit
from ....messages import ControlWhat
from ....outputs import Output
from ....sampling_params import SamplingParams
from ..fields.cache import CacheFields, Partition, caching, seconds
from ..fields.parse import Prompts, Strict, parse
from ..fields.prompts import Ids, check_label, check_priority, check_prompts, make_prompt, split_prompts, token_bytes
from ..openai.chat.request import chat_text
from ..plumbing.auth import is_admin, require_admin
from ..plumbing.body import read_json_object
from ..plumbing.failures import NO_PIN, NOT_CACHED, PIN_QUOTA
from ..plumbing.routes import Routes
from ..plumbing.sse import json_response, wait
from ..state import AppState
from .tokens import token_ids

DEFAULT_TTL = 300.0  # seconds, of a pin
_WARM_TRIES = 2  # under memory pressure, computed pages may be evicted before they are pinned
_JOB_SECONDS = 0.02  # between questions after a job
_NO_TOKENS = SamplingParams(max_tokens=0)
_CODES = {409: "not_cached", 429: "pin_quota"}  # other routes have these statuses for branches

Text = str | Ids


class PromptRequest(CacheFields):
    """One prompt: ``prompt`` (text or token ids), ``input_ids``, or ``messages`` with the fields of a chat."""

    prompt: Prompts = Field(None, description="A string or a list of token ids.")
    input_ids: Prompts = Field(None, description="A list of token ids.")
    messages: list[Any] | None = None


class PinRequest(PromptRequest):
    ttl: str | float | int | None = Field(None, description="Seconds, or a number with s, m, h or d. Default: 300.")
    warm: bool = Field(False, description="Compute first what is not cached.")


class UnpinRequest(Strict):
    id: str


class SaveRequest(PromptRequest):
    file: str = Field(description="A name in the folder `saved` of the disk cache.")


class LoadRequest(CacheFields):
    file: str = Field(description="A name in the folder `saved` of the disk cache.")


class PruneRequest(Strict):
    size: str = Field(description="Bytes to keep, such as 50GiB; 0 deletes everything.")


class WarmRequest(CacheFields):
    """With ``prompt_cache_options.ttl`` or a breakpoint the prompts stay cached, as for any other request."""

    prompts: Prompts = Field(description="A list of strings, or a list of lists of token ids.")
    namespaces: list[list[str]] | None = Field(
        None, description="The part of the cache of each prompt, as /cache/hottest names it. Needs the admin key."
    )
    priority: int = 0


P = TypeVar("P", bound=PromptRequest)


class NamedPrompt(NamedTuple):
    """The prompt that a request names. ``field``: in which it was sent; ``tokens``: int32."""

    prompt: Text
    field: str
    conversation: Conversation | None
    namespace: tuple[str, str]
    tokens: bytes


def routes(state: AppState) -> Routes:
    routes = Routes("cache")

    @routes.add("GET", "/cache/stats")
    async def stats() -> Response:
        """Sums over the caller's requests, by reason and by namespace. ``everybody`` has the pool's pages and the sums
        of all keys: with the admin key only."""
        return json_response(await _ask(state, "cache_stats", state.namespaces.of(None), everything=is_admin()))

    @routes.add("POST", "/cache/explain", body=PromptRequest)
    async def explain(request: Request) -> Response:
        """How much of a prompt would be reused, why not more, and how much is safe from eviction. Changes nothing."""
        _, asked = await _asked(state, PromptRequest, request)
        tokens, conversation = asked.tokens, asked.conversation
        facts = await _ask(state, "cache_explain", asked.namespace, tokens=tokens)
        stopped = tokens[4 * facts["hit_tokens"] : 4 * facts["hit_tokens"] + 32]
        following = memoryview(stopped).cast("i").tolist()
        facts["continues_with"] = state.tokenizer.decode(following, skip_special_tokens=False)
        cached = memoryview(facts.pop("instead")).cast("i").tolist()
        facts["cached_instead"] = state.tokenizer.decode(cached, skip_special_tokens=False) or None
        facts["breaks"] = breaks(facts["continues_with"], facts["cached_instead"])
        if conversation is not None:
            reused = memoryview(tokens[: 4 * facts["hit_tokens"]]).cast("i").tolist()
            position = len(state.tokenizer.decode(reused, skip_special_tokens=False))
            facts["continues_in"] = part_at(conversation, str(asked.prompt), position)
            facts["volatile"] = volatile_parts(conversation)
        return json_response(facts)

    @routes.add("POST", "/cache/pin", body=PinRequest, errors=[NOT_CACHED, PIN_QUOTA])
    async def pin(request: Request) -> Response:
        """Keep what is cached of a prompt until its ``ttl`` is over, under memory pressure too.

        ``missing_tokens``: not cached, and so not kept; ``warm`` computes them first.
        """
        body, asked = await _asked(state, PinRequest, request)
        longest = state.config.engine.max_pin_ttl
        ttl = min(DEFAULT_TTL, longest) if body.ttl is None else seconds(body.ttl, longest, "ttl")
        where = {"namespace": asked.namespace, "add_special_tokens": asked.conversation is None}
        facts: dict[str, Any] = {}
        for _ in range(_WARM_TRIES if body.warm else 1):
            if facts:  # the first try kept less than all
                with contextlib.suppress(InvalidRequest):  # it has expired, or the cache was flushed
                    await _ask(state, "cache_unpin", asked.namespace, pin=facts["id"])
            if body.warm:
                await _compute(state, request, [asked.prompt], asked.field, where)
            facts = await _ask(state, "cache_pin", asked.namespace, tokens=asked.tokens, ttl=ttl)
            if not facts["missing_tokens"]:
                break
        return json_response(facts)

    @routes.add("POST", "/cache/unpin", body=UnpinRequest, errors=[NO_PIN])
    async def unpin(request: Request) -> Response:
        """End a pin."""
        body = parse(UnpinRequest, await read_json_object(request))
        if not body.id:
            raise InvalidRequest("id", "must not be empty")
        return json_response(await _ask(state, "cache_unpin", state.namespaces.of(None), pin=body.id))

    @routes.add("POST", "/cache/evict", body=PromptRequest, admin=True)
    async def evict(request: Request) -> Response:
        """Evict a prompt and all that begins with it. Pages of running requests, branches and pins stay, and those that
        other prompts share."""
        _, asked = await _asked(state, PromptRequest, request)
        return json_response(await _ask(state, "cache_evict", asked.namespace, tokens=asked.tokens))

    @routes.add("GET", "/cache/list", admin=True)
    async def list_() -> Response:
        """The pages of each memory tier, and the saved files. Needs ``--disk-cache``, as the four routes below do."""
        return json_response(await _ask(state, "cache_disk_list", state.namespaces.of(None)))

    @routes.add("POST", "/cache/verify", admin=True)
    async def verify() -> Response:
        """Read every page on the disk. Those that are damaged are deleted, with what continues them."""
        return json_response(await _job(state, "cache_disk_verify", state.namespaces.of(None)))

    @routes.add("POST", "/cache/prune", body=PruneRequest, admin=True)
    async def prune(request: Request) -> Response:
        """Delete the prefixes from the disk that were used longest ago, until the rest fits."""
        body = parse(PruneRequest, await read_json_object(request))
        try:
            keep = parse_bytes(body.size, "size")
        except LoadError as error:
            raise InvalidRequest("size", "must be a size such as 50GiB") from error
        return json_response(await _ask(state, "cache_disk_prune", state.namespaces.of(None), keep_bytes=keep))

    @routes.add("POST", "/cache/save", body=SaveRequest, admin=True)
    async def save(request: Request) -> Response:
        """Save the whole pages of a cached prompt to a file on the server, for another server of the same model."""
        body, asked = await _asked(state, SaveRequest, request)
        return json_response(await _job(state, "cache_disk_save", asked.namespace, tokens=asked.tokens, file=body.file))

    @routes.add("POST", "/cache/load", body=LoadRequest, admin=True)
    async def load(request: Request) -> Response:
        """Add the pages of a saved file to the disk tier, as the caller's. A file of another model, format, page size
        or kernel is refused, and so is a damaged one."""
        body = parse(LoadRequest, await read_json_object(request))
        return json_response(await _job(state, "cache_disk_load", _namespace(state, body), file=body.file))

    @routes.add("POST", "/cache/warm", body=WarmRequest, generates=True)
    async def warm(request: Request) -> Response:
        """Compute prompts without generating."""
        body = parse(WarmRequest, await read_json_object(request))
        prompts, is_list = split_prompts(body.prompts, "prompts")
        if not is_list:
            raise InvalidRequest("prompts", "must be a list of strings or of lists of token ids")
        where = caching(state, body) | {"priority": check_priority(body.priority)}
        if where.get("no_cache"):
            raise InvalidRequest("prompt_cache_options.mode", "off would cache nothing")
        namespaces = None
        if body.namespaces is not None:
            await require_admin()
            namespaces = _named(body, len(prompts))
        outputs = await _compute(state, request, prompts, "prompts", where, namespaces)
        return json_response({"results": [_warmed(output) for output in outputs]})

    return routes


async def _ask(state: AppState, what: ControlWhat, namespace: tuple[str, str], **question: Any) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = await state.client.control(what, {"namespace": namespace, **question})
    except InvalidRequest as error:
        error.code = _CODES.get(error.status)
        raise
    return answer


async def _job(state: AppState, what: ControlWhat, namespace: tuple[str, str], **question: Any) -> dict[str, Any]:
    """Starts a job and polls it until it is done."""
    number = (await _ask(state, what, namespace, **question))["job"]
    while not (facts := await _ask(state, "cache_disk_job", namespace, job=number)).pop("done"):
        await asyncio.sleep(_JOB_SECONDS)
    return facts


def _namespace(state: AppState, body: CacheFields) -> tuple[str, str]:
    where = caching(state, body)
    if where.get("no_cache") or where["breakpoints"]:
        field = "prompt_cache_options" if body.prompt_cache_options is not None else "prompt_cache_breakpoint"
        raise InvalidRequest(field, "has no meaning on this route, which computes nothing")
    namespace: tuple[str, str] = where["namespace"]
    return namespace


def _named(body: WarmRequest, prompts: int) -> list[tuple[str, str]]:
    """The namespaces that a request names: digests of a key and of a salt, for each prompt."""
    if any(getattr(body, name) for name in Partition.model_fields):
        raise InvalidRequest("namespaces", "cannot be combined with cache_salt, extra_key or prompt_cache_key")
    named = body.namespaces or []
    if len(named) != prompts or any(len(each) != 2 for each in named):
        raise InvalidRequest("namespaces", f"must hold two strings for each of the {prompts} prompts")
    for i, each in enumerate(named):
        for label in each:
            check_label(label, f"namespaces[{i}]")
    return [(owner, salt) for owner, salt in named]


async def _asked(state: AppState, kind: type[P], request: Request) -> tuple[P, NamedPrompt]:
    """The request's body, and the prompt that it names."""
    raw = await read_json_object(request)
    body = parse(kind, raw, unsupported=frozenset())
    given = [name for name in ("prompt", "input_ids", "messages") if raw.get(name) is not None]
    if len(given) != 1:
        raise InvalidRequest("prompt", "or input_ids or messages is required: give exactly one")
    [field] = given
    conversation: Conversation | None = None
    prompt: Text
    if field == "messages":
        prompt, conversation = await chat_text(state, raw)
    else:
        [prompt, *_], is_list = split_prompts(getattr(body, field), field, text=field == "prompt")
        if is_list:
            raise InvalidRequest(field, "must be one prompt")
        if not len(prompt):
            raise InvalidRequest(field, "must not be empty")
    tokens = await _tokens(state, prompt, field, add_special_tokens=conversation is None)
    return body, NamedPrompt(prompt, field, conversation, _namespace(state, body), tokens)


async def _tokens(state: AppState, prompt: Text, field: str, *, add_special_tokens: bool) -> bytes:
    """The prompt's token ids as int32 bytes."""
    limits = state.client.limits
    if not isinstance(prompt, str):
        fit(len(prompt), _NO_TOKENS, limits, path=field)  # first: it bounds the ids that are looked at
        return token_bytes(prompt, limits.vocab_size, field)
    check_text_length(prompt, state.tokenizer.longest_token, limits, field)
    ids = await token_ids(state, prompt, special=add_special_tokens)
    fit(len(ids), _NO_TOKENS, limits, path=field)
    return ids.astype("<i4", copy=False).tobytes()


async def _compute(
    state: AppState,
    request: Request,
    prompts: list[Text],
    field: str,
    where: Mapping[str, Any],
    namespaces: Sequence[tuple[str, str]] | None = None,
) -> list[Output]:
    """``namespaces``: of each prompt, instead of the one in ``where``."""
    check_prompts(len(prompts), 1, state.config, field)
    limits = state.client.limits
    called = [f"{field}[{i}]" if field == "prompts" else field for i in range(len(prompts))]
    call = state.client.open(
        [
            make_prompt(prompt, _NO_TOKENS, limits, name, stream=False, **{**where, "namespace": namespace})
            for prompt, name, namespace in zip(
                prompts, called, namespaces or [where["namespace"]] * len(prompts), strict=True
            )
        ]
    )
    outputs = [Output() for _ in prompts]
    with call, renaming({"prompt[]": f"{field}[]", "prompt": called[0]}):
        for index, delta in await wait(call, request.scope, call.all):
            outputs[index].feed(delta)
    return outputs


def _warmed(output: Output) -> dict[str, Any]:
    report = output.cache
    facts: dict[str, Any] = {"prompt_tokens": output.prompt_tokens, "cached_tokens": output.cached_tokens}
    if report is not None:
        facts |= {"cache_write_tokens": report.write_tokens, "pinned_tokens": report.pinned_tokens}
        facts["reason"] = report.reason
    return facts
