"""``POST /v1/completions``: OpenAI's legacy completions, whole or streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Any

from fastapi import Request, Response

from ....errors import InvalidRequest, renaming
from ....logprobs import TokenLogprob
from ....messages import Delta
from ....outputs import Output
from ....sampling_params import SamplingParams
from ..fields.cache import caching
from ..fields.prompts import Ids, check_priority, check_prompts, make_prompt, prepare_params, split_prompts
from ..fields.requests import CompletionRequest, completion_sampling, parse
from ..plumbing.body import read_json_object
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..state import AppState
from .chunks import Choices
from .legacy_logprobs import LegacyLogprobs


def routes(state: AppState) -> Routes:
    routes = Routes("completions")

    @routes.add("POST", "/v1/completions", body=CompletionRequest, generates=True, fast=True)
    async def completions(request: Request) -> Response:
        """Go on from a prompt, or from several (OpenAI's)."""
        body = parse(CompletionRequest, await read_json_object(request))
        state.check_model(body.model)
        answer = _Answer(state, body)
        call = state.client.open(answer.prompts)
        return await respond(call, request, answer, stream=body.stream, n=body.n, names=answer.names)

    return routes


class _Answer(Choices):
    """One request: its prompts, and what has come of each of their samples."""

    def __init__(self, state: AppState, body: CompletionRequest) -> None:
        limits = state.client.limits
        raw, _ = split_prompts(body.prompt, "prompt")
        params, self.names = completion_sampling(body, state.preferred)
        with renaming(self.names):
            params = prepare_params(params, limits.vocab_size)
        check_prompts(len(raw), params.n, state.config, "prompt")
        where = caching(state, body)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options", "needs stream to be true")
        where |= {"priority": check_priority(body.priority), "stream": body.stream}
        with renaming(self.names):
            self.prompts = [
                make_prompt(prompt, params, limits, f"prompt[{i}]" if len(raw) > 1 else "prompt", **where)
                for i, prompt in enumerate(raw)
            ]
        echoes = [_echo_text(state, prompt, params) if body.echo else None for prompt in raw]
        choices = [_Choice(state, params, echo) for echo in echoes for _ in range(params.n)]
        head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_name,
        }
        super().__init__(head, choices, params.n, body.stream_options)


class _Choice:
    """One sample: what has come, and how much of it has been said."""

    def __init__(self, state: AppState, params: SamplingParams, echo: str | None) -> None:
        self.output = Output()
        self._echo = echo  # the prompt's text, until it has been said
        self._said = 0  # characters of the completion
        self._said_tokens = 0
        self._legacy = None
        if params.logprobs is not None:
            self._legacy = LegacyLogprobs(state.tokenizer, params.skip_special_tokens)

    def feed(self, delta: Delta) -> None:
        self.output.feed(delta)

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """What is new since last time, if anything is."""
        output = self.output
        new = len(output.text) > self._said or len(output.logprobs) > self._said_tokens
        if self._echo is not None:
            new = bool(output.token_ids)  # before, the prompt's logprobs may still be coming
        if new or output.finish is not None:
            yield self.whole(index)

    def whole(self, index: int) -> dict[str, Any]:
        """All that has not been said yet."""
        output = self.output
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
        return {
            "index": index,
            "text": text,
            "logprobs": None if self._legacy is None else self._legacy.add(tokens, rows, echoed),
            "finish_reason": output.finish_reason,
        }


def _echo_text(state: AppState, prompt: str | Ids, params: SamplingParams) -> str:
    if isinstance(prompt, str):
        return prompt
    return state.tokenizer.decode(prompt, skip_special_tokens=params.skip_special_tokens)
