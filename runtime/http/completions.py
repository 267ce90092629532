"""``POST /v1/completions``: OpenAI's legacy completions, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request, Response

from ..logprobs import TokenLogprob
from ..messages import Delta
from ..outputs import Output
from ..sampling_params import SamplingParams
from .body import read_json_object
from .cache_fields import caching
from .errors import bad
from .legacy_logprobs import LegacyLogprobs
from .openapi import takes
from .prompts import Ids, check_priority, check_prompts, make_prompt, prepare_params, split_prompts
from .requests import COMPLETION_NAMES, CompletionRequest, completion_sampling, parse
from .shortcut import Handler
from .site import Site
from .sse import DONE, Batch, EventStream, event, json_response, wait
from .usage import cache_headers, usage

PATH = "/v1/completions"


def handler(site: Site) -> Handler:
    async def completions(request: Request) -> Response:
        """Go on from a prompt, or from several (OpenAI's)."""
        body = parse(CompletionRequest, await read_json_object(request))
        site.check_model(body.model)
        answer = _Answer(site, body)
        call = site.client.open(answer.prompts)
        if body.stream:
            first = await wait(call, request.receive, call.batch)
            return EventStream(call, first, answer.events, answer.end, answer.headers(request, first))
        with call:
            batch = await wait(call, request.receive, call.all)
        return json_response(answer.whole(batch), headers=answer.headers(request, batch))

    return completions


class _Answer:
    """One request: its prompts, and what has come of each of its choices."""

    def __init__(self, site: Site, body: CompletionRequest) -> None:
        limits = site.client.limits
        raw, _ = split_prompts(body.prompt, "prompt")
        params = prepare_params(completion_sampling(body), limits, COMPLETION_NAMES, site.config)
        check_prompts(len(raw), params.n, site.config, "prompt")
        where = caching(site, body)
        if body.stream_options is not None and not body.stream:
            raise bad("stream_options", "needs stream to be true")
        self.prompts = [
            make_prompt(
                prompt,
                params,
                limits,
                f"prompt[{i}]" if len(raw) > 1 else "prompt",
                COMPLETION_NAMES,
                priority=check_priority(body.priority),
                whole=not body.stream,
                **where,
            )
            for i, prompt in enumerate(raw)
        ]
        self._n = params.n
        options = body.stream_options
        self._include_usage = options is not None and bool(options.include_usage)
        self._running_usage = self._include_usage and options is not None and bool(options.continuous_usage_stats)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": site.model_name,
        }
        echoes = [_echo_text(site, prompt, params) if body.echo else None for prompt in raw]
        self._choices = [_Choice(site, params, echo) for echo in echoes for _ in range(params.n)]

    def whole(self, batch: Batch) -> dict[str, Any]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        choices = [choice.piece(index) for index, choice in enumerate(self._choices)]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def events(self, batch: Batch) -> Iterable[bytes]:
        for index, delta in batch:
            self._choices[index].feed(delta)
        running = self._usage() if self._running_usage else None  # once: it looks at every choice
        for index in sorted({index for index, _ in batch}) if len(batch) > 1 else (batch[0][0],):
            piece = self._choices[index].piece(index)
            if piece is not None:
                chunk: dict[str, Any] = {**self._head, "choices": [piece]}
                if self._include_usage:
                    chunk["usage"] = running
                yield event(chunk)

    def end(self) -> Iterable[bytes]:
        if self._include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def headers(self, request: Request, batch: Batch) -> Mapping[str, str] | None:
        found = ((index, delta.prompt_tokens, delta.cache) for index, delta in batch)
        return cache_headers(request.headers, found, self._n)

    def _usage(self) -> dict[str, Any]:
        return usage([choice.output for choice in self._choices], self._n)


class _Choice:
    """One sample: what has come, and how much of it has been said."""

    def __init__(self, site: Site, params: SamplingParams, echo: str | None) -> None:
        self.output = Output()
        self._echo = echo  # the prompt's text, until it has been said
        self._said = 0  # characters of the completion
        self._said_tokens = 0
        self._legacy = None
        if params.logprobs is not None:
            self._legacy = LegacyLogprobs(site.tokenizer, params.skip_special_tokens)

    def feed(self, delta: Delta) -> None:
        self.output.feed(delta)

    def piece(self, index: int) -> dict[str, Any] | None:
        """What is new since last time, as a choice; None when there is nothing to say."""
        output = self.output
        if self._echo is not None and not output.token_ids and output.finish is None:
            return None  # the prompt's logprobs may still be coming
        text = output.text[self._said :]
        self._said = len(output.text)
        tokens: list[int] = []
        rows: list[TokenLogprob | None] = []
        echoed = self._echo or ""
        if self._echo is not None:
            text = self._echo + text
            self._echo = None
            tokens = list(output.prompt)
            rows = [output.prompt_logprobs.get(position) for position in range(len(tokens))]
        tokens += [row.token for row in output.logprobs[self._said_tokens :]]
        rows += output.logprobs[self._said_tokens :]
        self._said_tokens = len(output.logprobs)
        if not text and not tokens and output.finish is None:
            return None
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._legacy is None else self._legacy.add(tokens, rows, echoed),
            "finish_reason": output.finish_reason,
        }


def _echo_text(site: Site, prompt: str | Ids, params: SamplingParams) -> str:
    if isinstance(prompt, str):
        return prompt
    return site.tokenizer.decode(prompt, skip_special_tokens=params.skip_special_tokens)


def schema() -> dict[str, Any]:
    return takes(CompletionRequest)
