"""``POST /v1/completions``: OpenAI's legacy completions, whole or streamed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import Request, Response
from pydantic import Field

from ....errors import InvalidRequest, renaming
from ....logprobs import TokenLogprob
from ....messages import Delta
from ....outputs import Output
from ....sampling_params import SamplingParams
from ..fields.cache import caching
from ..fields.known import ANSWER_FIELDS, UNSUPPORTED
from ..fields.parse import Prompts, StreamOptions, parse
from ..fields.prompts import (
    Ids,
    check_label,
    check_prompts,
    make_prompt,
    openai_priority,
    prepare_params,
    split_prompts,
)
from ..fields.sampling import (
    OpenAIFields,
    ParsedSampling,
    check_prompt_logprobs,
    openai_sampling,
    prompt_logprobs_field,
)
from ..plumbing.body import read_json_object
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..state import AppState
from .chunks import Choices
from .legacy_logprobs import LegacyLogprobs, TokenTexts
from .logprobs import describe_prompt_logprobs
from .sent_ids import SentIds


class CompletionRequest(OpenAIFields):
    """OpenAI's ``/v1/completions``."""

    prompt: Prompts = Field(description="A string, a list of strings, a list of token ids, or a list of such lists.")
    max_tokens: int = 16
    n: int = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = prompt_logprobs_field()
    add_special_tokens: bool = Field(True, description="Begin a text as the tokenizer begins texts (<bos>).")


def routes(state: AppState) -> Routes:
    routes = Routes("completions")

    @routes.add("POST", "/v1/completions", body=CompletionRequest, generates=True, fast=True)
    async def completions(request: Request) -> Response:
        """Complete a prompt, or several (OpenAI's)."""
        body = parse(CompletionRequest, await read_json_object(request), unsupported=UNSUPPORTED | ANSWER_FIELDS)
        state.check_model(body.model)
        reply = _CompletionReply(state, body)
        call = state.client.open(reply.prompts, [body.rid] * len(reply.prompts))
        return await respond(call, request, reply, stream=body.stream, n=body.n, names=reply.names)

    return routes


def completion_sampling(request: CompletionRequest, preferred: Mapping[str, float]) -> ParsedSampling:
    if request.best_of is not None and request.best_of != request.n:
        problem = f"must equal n ({request.n}): choosing the best of more samples is not supported"
        raise InvalidRequest("best_of", f"{problem}, got {request.best_of}")
    prompt_logprobs = check_prompt_logprobs(request.prompt_logprobs, stream=request.stream)
    echoed = request.logprobs if request.echo else None
    if echoed is not None and prompt_logprobs not in (None, echoed):
        raise InvalidRequest("prompt_logprobs", f"must equal logprobs ({echoed}) or be left out, with echo")
    return openai_sampling(
        request,
        preferred,
        {"include_stop": "include_stop_str_in_output"},
        max_tokens=request.max_tokens,
        n=request.n,
        skip_special_tokens=request.skip_special_tokens,
        logprobs=request.logprobs,
        prompt_logprobs=prompt_logprobs if echoed is None else echoed,
    )


class _CompletionReply(Choices):
    """One request: its prompts, and a choice for each of their samples."""

    def __init__(self, state: AppState, body: CompletionRequest) -> None:
        limits = state.client.limits
        raw, _ = split_prompts(body.prompt, "prompt")
        params, self.names = completion_sampling(body, state.preferred)
        with renaming(self.names):
            params = prepare_params(params, limits.vocab_size)
        check_prompts(len(raw), params.n, state.config, "prompt")
        check_label(body.rid, "rid")
        options = caching(state, body)
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options", "needs stream to be true")
        options |= {"priority": openai_priority(body.priority), "stream": body.stream}
        options |= {"echo_tokens": body.return_token_ids, "add_special_tokens": body.add_special_tokens}
        with renaming(self.names):
            self.prompts = [
                make_prompt(prompt, params, limits, f"prompt[{i}]" if len(raw) > 1 else "prompt", **options)
                for i, prompt in enumerate(raw)
            ]
        echoes = [_echo_text(state, prompt, params) if body.echo else None for prompt in raw]
        texts = TokenTexts(state.tokenizer, as_ids=body.return_tokens_as_token_ids)
        choices = [_Choice(texts, body, params, echo) for echo in echoes for _ in range(params.n)]
        head = {
            "id": f"cmpl-{os.urandom(16).hex()}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_name,
        }
        super().__init__(head, choices, params.n, body.stream_options)


class _Choice:
    """One sample: its output so far, and how much of that has been sent."""

    def __init__(self, texts: TokenTexts, body: CompletionRequest, params: SamplingParams, echo: str | None) -> None:
        self.output = Output()
        self._echo = echo  # the prompt's text, until it has been sent
        self._sent = 0  # characters of the completion
        self._sent_tokens = 0
        self._ids = SentIds(self.output) if body.return_token_ids else None
        self._prompt_logprobs = body.prompt_logprobs is not None
        self._tokenizer = texts.tokenizer
        self._legacy = None
        if params.logprobs is not None:
            self._legacy = LegacyLogprobs(texts, params.skip_special_tokens)

    def feed(self, delta: Delta) -> None:
        self.output.feed(delta)

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        """The output that has not been sent yet, if there is any."""
        output = self.output
        new = len(output.text) > self._sent or len(output.logprobs) > self._sent_tokens
        if self._ids is not None:
            new = new or self._ids.pending
        if self._echo is not None:
            new = bool(output.token_ids)  # before, the prompt's logprobs may still be coming
        if new or output.finish is not None:
            yield self.whole(index)

    def whole(self, index: int) -> dict[str, Any]:
        """Everything that has not been sent yet."""
        output = self.output
        text = output.text[self._sent :]
        self._sent = len(output.text)
        tokens: list[int] = []
        rows: list[TokenLogprob | None] = []
        echoed = self._echo or ""
        if self._echo is not None:
            text = self._echo + text
            self._echo = None
            tokens = list(output.prompt)
            rows = [output.prompt_logprobs.get(position) for position in range(len(tokens))]
        tokens += [row.token for row in output.logprobs[self._sent_tokens :]]
        rows += output.logprobs[self._sent_tokens :]
        self._sent_tokens = len(output.logprobs)
        choice = {
            "index": index,
            "text": text,
            "logprobs": None if self._legacy is None else self._legacy.add(tokens, rows, echoed),
            "finish_reason": output.finish_reason,
        }
        if self._prompt_logprobs:
            choice["prompt_logprobs"] = describe_prompt_logprobs(self._tokenizer, output)
        if self._ids is not None:
            choice |= {"prompt_token_ids": self._ids.take_prompt(), "token_ids": self._ids.take()}
        return choice


def _echo_text(state: AppState, prompt: str | Ids, params: SamplingParams) -> str:
    if isinstance(prompt, str):
        return prompt
    return state.tokenizer.decode(prompt, skip_special_tokens=params.skip_special_tokens)
