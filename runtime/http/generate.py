"""``POST /generate``: SGLang's native request and response, plus what the cache did (``meta_info.cache``)."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Response

from ..errors import InvalidRequest
from ..logprobs import TokenLogprob
from ..outputs import Output
from .body import read_json_object
from .client import Call, Prompt
from .prompts import check_count, check_label, check_priority, make_prompt, prepare_params, split_prompts
from .requests import GENERATE_NAMES, GenerateRequest, GenerateSampling, generate_sampling, parse
from .site import Site
from .sse import DONE, Batch, EventStream, event, json_response, wait

T = TypeVar("T")


def router(site: Site) -> APIRouter:
    routes = APIRouter()

    @routes.post("/generate", openapi_extra=_schema())
    async def generate(request: Request) -> Response:
        raw = await read_json_object(request)
        for misplaced in sorted(raw.keys() & GenerateSampling.model_fields.keys()):
            raise InvalidRequest(f"{misplaced} belongs in sampling_params", field=misplaced)
        body = parse(GenerateRequest, raw)
        answer = _Answer(site, body)
        call = site.client.open(answer.prompts, answer.labels)
        answer.call = call
        if body.stream:
            first = await wait(call, request.receive, call.batch)
            return EventStream(call, first, answer.events, lambda: (DONE,))
        with call:
            batch = await wait(call, request.receive, call.all)
        answer.feed(batch)
        results = [answer.result(i) for i in range(len(answer.outputs))]
        return json_response(results if answer.is_list else results[0])

    return routes


class _Answer:
    """One request: its prompts, and what has come of each of its samples."""

    call: Call

    def __init__(self, site: Site, body: GenerateRequest) -> None:
        limits = site.client.limits
        self._tokenizer = site.tokenizer
        self._body = body
        self._started = time.monotonic()
        if (body.text is None) == (body.input_ids is None):
            raise InvalidRequest("give exactly one of text and input_ids", field="text")
        field = "text" if body.text is not None else "input_ids"
        raw, is_list = split_prompts(body.text if body.text is not None else body.input_ids, field)
        if field == "input_ids" and any(isinstance(prompt, str) for prompt in raw):
            raise InvalidRequest("input_ids must hold token ids, got str", field=field)
        for name in ("cache_salt", "extra_key"):
            check_label(getattr(body, name), name)
        namespace = site.namespaces.of(body.cache_salt, body.extra_key)
        priority = check_priority(body.priority)
        sampling = _spread(
            body.sampling_params if body.sampling_params is not None else {}, len(raw), "sampling_params"
        )
        wanted = _spread(body.return_logprob, len(raw), "return_logprob")
        starts = _spread(body.logprob_start_len, len(raw), "logprob_start_len")
        tops = _spread(body.top_logprobs_num, len(raw), "top_logprobs_num")
        rids = _spread(body.rid if body.rid is not None else "", len(raw), "rid")
        self.prompts: list[Prompt] = []
        self.labels: list[str | None] = [rid or None for rid in rids]
        self._samples: list[_Sample] = []
        for i, prompt in enumerate(raw):
            check_label(rids[i], "rid")
            where = f"sampling_params[{i}]." if isinstance(body.sampling_params, list) else "sampling_params."
            if starts[i] < -1:
                raise InvalidRequest(
                    f"logprob_start_len must be -1 or a prompt position, got {starts[i]}", field="logprob_start_len"
                )
            params = prepare_params(
                generate_sampling(
                    parse(GenerateSampling, sampling[i], where), tops[i] if wanted[i] else None, starts[i]
                ),
                limits,
                GENERATE_NAMES,
            )
            self.prompts.append(
                make_prompt(
                    prompt,
                    params,
                    limits,
                    f"{field}[{i}]" if is_list else field,
                    GENERATE_NAMES,
                    namespace=namespace,
                    priority=priority,
                    echo_tokens=body.return_prompt_token_ids,
                )
            )
            id = rids[i] or uuid.uuid4().hex
            self._samples += [
                _Sample(id, params.logprobs, params.prompt_logprobs, params.prompt_logprob_start)
            ] * params.n
            check_count(len(self._samples), site.config.max_prompts_per_request, field)
        self.outputs = [Output() for _ in self._samples]
        self.is_list = is_list or len(self.outputs) > 1

    def feed(self, batch: Batch) -> list[int]:
        """The samples that have news, in order."""
        for index, delta in batch:
            self.outputs[index].feed(delta)
        return sorted({index for index, _ in batch})

    def events(self, batch: Batch) -> Iterable[bytes]:
        for index in self.feed(batch):
            result = self.result(index)
            if self.is_list:
                result["index"] = index
            yield event(result)

    def result(self, index: int) -> dict[str, Any]:
        """Cumulative, as SGLang's are: a streamed event holds everything so far."""
        output, sample = self.outputs[index], self._samples[index]
        meta: dict[str, Any] = {
            "id": sample.id,
            "finish_reason": _finish_reason(output),
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
        }
        if output.cache is not None:
            meta["cache"] = {"hit_tokens": output.cache.hit_tokens, "reason": output.cache.reason}
            if output.cache.diverged_at is not None:
                meta["cache"]["diverged_at"] = output.cache.diverged_at
        if output.finish is not None:
            meta["num_retractions"] = output.finish.retractions
            meta["queue_time"] = output.finish.queue_seconds
            meta["e2e_latency"] = time.monotonic() - self._started
        if sample.logprobs is not None:
            self._add_logprobs(meta, output, sample)
        result: dict[str, Any] = {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}
        if self._body.return_prompt_token_ids:
            result["prompt_token_ids"] = output.prompt
        return result

    def _add_logprobs(self, meta: dict[str, Any], output: Output, sample: _Sample) -> None:
        prompt: list[tuple[int, TokenLogprob | None]] = []
        if sample.prompt_logprobs is not None:
            prompt = [
                (output.prompt[p], output.prompt_logprobs.get(p)) for p in range(sample.start, len(output.prompt))
            ]
        meta["input_token_logprobs"] = [self._entry(None if row is None else row.logprob, id) for id, row in prompt]
        meta["output_token_logprobs"] = [self._entry(row.logprob, row.token) for row in output.logprobs]
        if sample.logprobs:
            meta["input_top_logprobs"] = [None if row is None else self._top(row) for _, row in prompt]
            meta["output_top_logprobs"] = [self._top(row) for row in output.logprobs]

    def _top(self, row: TokenLogprob) -> list[list[Any]]:
        return [self._entry(logprob, id) for id, logprob in row.top]

    def _entry(self, logprob: float | None, id: int) -> list[Any]:
        return [logprob, id, self._tokenizer.token_text(id) if self._body.return_text_in_logprobs else None]


class _Sample:
    """What was asked for about one sample."""

    __slots__ = ("id", "logprobs", "prompt_logprobs", "start")

    def __init__(self, id: str, logprobs: int | None, prompt_logprobs: int | None, start: int) -> None:
        self.id = id
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.start = start


def _spread(value: T | list[T], count: int, field: str) -> list[T]:
    """A value for all prompts, or a list with one for each."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise InvalidRequest(
            f"{field} must have one element for each of the {count} prompts, got {len(value)}", field=field
        )
    return value


def _finish_reason(output: Output) -> dict[str, Any] | None:
    match output.finish_reason:
        case None:
            return None
        case "stop":
            return {"type": "stop", "matched": output.matched}
        case "length":
            return {"type": "length", "length": output.completion_tokens}
        case reason:
            return {"type": reason, "message": "the request was aborted"}


def _schema() -> dict[str, Any]:
    return {"requestBody": {"content": {"application/json": {"schema": GenerateRequest.model_json_schema()}}}}
