"""SGLang's response to ``/generate``: cumulative results and ``meta_info``."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from ....logprobs import TokenLogprob
from ....outputs import Output
from ....sampling_params import SamplingParams
from ....tokenizer.tokenizer import Tokenizer
from ..engine_client import Batch
from ..plumbing.sse import DONE, error_event, event


class GenerateReply:
    """The results of one request, in the order of its engine requests. Call `expect` for each first."""

    def __init__(self, tokenizer: Tokenizer, text_in_logprobs: bool, prompt_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._text_in_logprobs = text_in_logprobs
        self._prompt_token_ids = prompt_token_ids
        self._started = time.monotonic()
        self._samples: list[_Sample] = []
        self.outputs: list[Output] = []
        self.is_list = False

    def expect(self, id: str, params: SamplingParams) -> None:
        """Expect ``params.n`` more samples, whose id in the answer is ``id``."""
        sample = _Sample(id, params.logprobs, params.prompt_logprobs, params.prompt_logprob_start)
        self._samples += [sample] * params.n
        self.outputs += [Output() for _ in range(params.n)]

    def whole(self, batch: Batch) -> Any:
        self._feed(batch)
        results = [self.result(i) for i in range(len(self.outputs))]
        return results if self.is_list else results[0]

    def _feed(self, batch: Batch) -> list[int]:
        """Feed the outputs; the samples that have changed, in order."""
        for index, delta in batch:
            self.outputs[index].feed(delta)
        return sorted({index for index, _ in batch})

    def events(self, batch: Batch) -> Iterable[bytes]:
        for index in self._feed(batch):
            result = self.result(index)
            if self.is_list:
                result["index"] = index
            yield event(result)

    def end(self) -> Iterable[bytes]:
        return (DONE,)

    def fail(self, error: Exception) -> bytes:
        return error_event(error)

    def result(self, index: int) -> dict[str, Any]:
        """Cumulative, as in SGLang: a streamed event has everything so far."""
        output, sample = self.outputs[index], self._samples[index]
        meta: dict[str, Any] = {
            "id": sample.id,
            "finish_reason": _finish_reason(output),
            "prompt_tokens": output.prompt_tokens,
            "completion_tokens": output.completion_tokens,
            "cached_tokens": output.cached_tokens,
        }
        if output.cache is not None:
            report = output.cache
            meta["cache"] = {"hit_tokens": report.hit_tokens, "reason": report.reason}
            meta["cache"]["write_tokens"] = report.write_tokens
            meta["cache"] |= report.tiers()
            if output.finish is not None:
                meta["cache"]["pinned_tokens"] = report.pinned_tokens
            if output.cache.diverged_at is not None:
                meta["cache"]["diverged_at"] = output.cache.diverged_at
        if output.finish is not None:
            meta["num_retractions"] = output.finish.retractions
            if output.finish.jumped_tokens is not None:
                meta["forward_passes_saved"] = output.finish.jumped_tokens
            meta["queue_time"] = output.finish.queue_seconds
            meta["e2e_latency"] = time.monotonic() - self._started
        if sample.prompt_logprobs is not None:
            meta["cached_logprobs"] = 0 if output.cache is None else output.cache.cached_logprobs
        if sample.logprobs is not None:
            self._add_logprobs(meta, output, sample)
        result: dict[str, Any] = {"text": output.text, "output_ids": output.token_ids, "meta_info": meta}
        if self._prompt_token_ids:
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
        return [logprob, id, self._tokenizer.token_text(id) if self._text_in_logprobs else None]


class _Sample:
    """The options of one sample."""

    __slots__ = ("id", "logprobs", "prompt_logprobs", "start")

    def __init__(self, id: str, logprobs: int | None, prompt_logprobs: int | None, start: int) -> None:
        self.id = id
        self.logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs
        self.start = start


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
