"""``POST /inference/v1/generate``: vLLM's token ids in, token ids out."""

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
from ....tokenizer.tokenizer import Tokenizer
from ..engine_client import Batch
from ..fields import known
from ..fields.cache import caching
from ..fields.parse import parse
from ..fields.prompts import check_count, check_label, make_prompt, openai_priority, prepare_params, split_prompts
from ..openai.chunks import Choices
from ..openai.logprobs import LEAST_LOGPROB, describe_logprob, describe_prompt_logprobs
from ..openai.sent_ids import SentIds
from ..plumbing.body import read_json_object
from ..plumbing.respond import respond
from ..plumbing.routes import Routes
from ..state import AppState
from .request import UNSUPPORTED, InferenceRequest, inference_sampling

_UNSUPPORTED = known.UNSUPPORTED | known.ANSWER_FIELDS | UNSUPPORTED


def routes(state: AppState) -> Routes:
    routes = Routes("inference")

    @routes.add("POST", "/inference/v1/generate", body=InferenceRequest, generates=True, fast=True)
    async def generate(request: Request) -> Response:
        """Complete token ids, in token ids (vLLM's)."""
        body = parse(InferenceRequest, await read_json_object(request), unsupported=_UNSUPPORTED)
        state.check_model(body.model)
        limits = state.client.limits
        check_label(body.request_id, "request_id")
        if body.stream_options is not None and not body.stream:
            raise InvalidRequest("stream_options", "needs stream to be true")
        prompts, several = split_prompts(body.token_ids, "token_ids", text=False)
        if several:
            raise InvalidRequest("token_ids", "must be one list of token ids")
        params, names = inference_sampling(body.sampling_params, state.preferred, stream=body.stream)
        with renaming(names):
            params = prepare_params(params, limits.vocab_size)
            check_count(params.n, state.config.max_samples_per_request, "n")
            prompt = make_prompt(
                prompts[0],
                params,
                limits,
                "token_ids",
                priority=openai_priority(body.priority),
                stream=body.stream,
                echo_tokens=body.return_token_ids,
                **caching(state, body),
            )
        reply = _InferenceReply(state, body, params)
        call = state.client.open([prompt], [body.request_id])
        return await respond(call, request, reply, stream=body.stream, n=params.n, names=names)

    return routes


class _InferenceReply(Choices):
    """The choices of one request."""

    def __init__(self, state: AppState, body: InferenceRequest, params: SamplingParams) -> None:
        text = body.output_mode == "text"
        self._samples = [_Choice(state.tokenizer, params, text=text) for _ in range(params.n)]
        self._first = self._samples[0].output
        self._prompt_ids = SentIds(self._first) if body.return_token_ids else None
        self._prompt_logprobs = params.prompt_logprobs is not None
        self._tokenizer = state.tokenizer
        self._model = state.model_name
        head = {"request_id": body.request_id or uuid.uuid4().hex, "output_mode": body.output_mode}
        super().__init__(head, self._samples, params.n, body.stream_options)

    def whole(self, batch: Batch) -> dict[str, Any]:
        answer = super().whole(batch) | {"model": self._model, "created": int(time.time())}
        answer["prompt_logprobs"] = None
        if self._prompt_logprobs:
            answer["prompt_logprobs"] = describe_prompt_logprobs(self._tokenizer, self._first)
        answer["prompt_token_ids"] = None if self._prompt_ids is None else self._prompt_ids.take_prompt()
        return answer

    def _chunk(self, piece: dict[str, Any]) -> dict[str, Any]:
        chunk = super()._chunk(piece)
        prompt = None if self._prompt_ids is None else self._prompt_ids.take_prompt()
        return chunk if prompt is None else {**chunk, "prompt_token_ids": prompt}


class _Choice:
    """One sample. Implements `chunks.Choice`."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, text: bool) -> None:
        """``text``: with the output's text, and texts in logprobs."""
        self.output = Output()
        self._tokenizer = tokenizer
        self._params = params
        self._text = text
        self._ids = SentIds(self.output)
        self._sent = self._sent_text = 0  # logprobs; characters

    def feed(self, delta: Delta) -> None:
        self.output.feed(delta)

    def pieces(self, index: int) -> Iterable[dict[str, Any]]:
        output = self.output
        held_back = self._text and len(output.text) > self._sent_text
        if self._ids.pending or held_back or output.finish is not None:
            yield self.whole(index)

    def whole(self, index: int) -> dict[str, Any]:
        """Everything that has not been sent yet."""
        output = self.output
        stopped = isinstance(output.matched, str) or output.matched in self._params.stop_token_ids
        choice = {
            "index": index,
            "token_ids": self._ids.take(),
            "logprobs": self._logprobs(),
            "finish_reason": output.finish_reason,
            "stop_reason": output.matched if stopped else None,
        }
        if self._text:
            choice["text"] = output.text[self._sent_text :]
            self._sent_text = len(output.text)
        return choice

    def _logprobs(self) -> dict[str, Any] | None:
        k = self._params.logprobs
        if k is None:
            return None
        rows = self.output.logprobs[self._sent :]
        self._sent += len(rows)
        if self._text:
            return {"content": [describe_logprob(self._tokenizer, row, k) for row in rows]}
        return {"content": [_by_id(row) for row in rows]}


def _by_id(row: TokenLogprob) -> dict[str, Any]:
    """The sampled token, and the alternatives with it first."""
    listed = [
        {"token_id": id, "logprob": max(logprob, LEAST_LOGPROB), "rank": rank}
        for id, (logprob, rank) in row.by_likelihood.items()
    ]
    return {**listed[0], "top_logprobs": listed}
