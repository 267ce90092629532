"""``POST /generate``: SGLang's native request and response, plus what the cache did (``meta_info.cache``)."""

from __future__ import annotations

import uuid
from typing import TypeVar

from fastapi import Request, Response

from ....errors import InvalidRequest, renaming
from ....messages import Generate
from ..fields.cache import caching
from ..fields.known import ANSWER_FIELDS, UNSUPPORTED
from ..fields.parse import parse
from ..fields.prompts import (
    check_count,
    check_label,
    check_priority,
    check_prompts,
    make_prompt,
    prepare_params,
    split_prompts,
)
from ..plumbing.body import read_json_object
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..state import AppState
from .reply import GenerateReply
from .request import GenerateRequest, GenerateSampling, check_places, generate_names, generate_sampling

PATH = "/generate"

T = TypeVar("T")


def routes(state: AppState) -> Routes:
    routes = Routes("generate")

    @routes.add("POST", "/generate", body=GenerateRequest, generates=True, fast=True)
    async def generate(request: Request) -> Response:
        """Complete a prompt, or several (SGLang's)."""
        raw = await read_json_object(request)
        check_places(raw)
        body = parse(GenerateRequest, raw, unsupported=UNSUPPORTED | ANSWER_FIELDS)
        reply = _BatchReply(state, body)
        call = state.client.open(reply.prompts, reply.labels)
        return await respond(call, request, reply, stream=body.stream, names=reply.names)

    return routes


class _BatchReply(GenerateReply):
    """One request: its prompts, and a result for each of their samples."""

    def __init__(self, state: AppState, body: GenerateRequest) -> None:
        limits = state.client.limits
        super().__init__(state.tokenizer, body.return_text_in_logprobs, body.return_prompt_token_ids)
        if (body.text is None) == (body.input_ids is None):
            raise InvalidRequest("text", "or input_ids is required: give exactly one")
        field = "text" if body.text is not None else "input_ids"
        raw, is_list = split_prompts(getattr(body, field), field, text=field == "text")
        check_prompts(len(raw), 1, state.config, field)
        self.names = generate_names(field)
        options = caching(state, body) | {
            "priority": check_priority(body.priority),
            "echo_tokens": body.return_prompt_token_ids,
            "stream": body.stream,
        }
        sampling = _spread(
            body.sampling_params if body.sampling_params is not None else {}, len(raw), "sampling_params"
        )
        wanted = _spread(body.return_logprob, len(raw), "return_logprob")
        starts = _spread(body.logprob_start_len, len(raw), "logprob_start_len")
        tops = _spread(body.top_logprobs_num, len(raw), "top_logprobs_num")
        rids = _spread(body.rid if body.rid is not None else "", len(raw), "rid")
        self.prompts: list[Generate] = []
        self.labels: list[str | None] = [rid or None for rid in rids]
        for i, prompt in enumerate(raw):
            check_label(rids[i], "rid")
            where = f"sampling_params[{i}]" if isinstance(body.sampling_params, list) else "sampling_params"
            if starts[i] < -1:
                raise InvalidRequest("logprob_start_len", f"must be -1 or a prompt position, got {starts[i]}")
            params = generate_sampling(
                parse(GenerateSampling, sampling[i], f"{where}."),
                state.preferred,
                tops[i] if wanted[i] else None,
                starts[i],
            )
            with renaming(generate_names(f"{field}[{i}]" if is_list else field, where)):
                params = prepare_params(params, limits.vocab_size)
                self.prompts.append(make_prompt(prompt, params, limits, "prompt", **options))
            id = rids[i] or uuid.uuid4().hex
            self.expect(id, params)
            check_count(len(self.outputs), state.config.max_samples_per_request, field)
        self.is_list = is_list or len(self.outputs) > 1


def _spread(value: T | list[T], count: int, field: str) -> list[T]:
    """A value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(field, f"must have one element for each of the {count} prompts, got {len(value)}")
    return value
