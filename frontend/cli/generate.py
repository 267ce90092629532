"""``branchwise generate``: answers to prompts, from a model loaded here or from a running server."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated

import typer

from .console import err, expected_failures, out
from .options import (
    ApiKey,
    Device,
    DtypeFlag,
    MaxModelLen,
    MaxTokens,
    ModelFlag,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
    UrlFlag,
)


def generate(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT", help="One prompt or more; - reads one from standard input.")
    ],
    model: ModelFlag = "",
    url: UrlFlag = None,
    api_key: ApiKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a JSON list with text, tokens and cache facts.")
    ] = False,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Stop = None,
    max_model_len: MaxModelLen = None,
    dtype: DtypeFlag = "auto",
    device: Device = "auto",
) -> None:
    """Answer prompts, together: what they share is computed once.

    **branchwise generate --model Qwen/Qwen3-0.6B "The capital of France is" "The capital of Italy is"** loads a model
    here; with **--url** a running server answers. Prompts go in as they are: the model that ships with the package,
    which answers if neither is given, wants a chat template, so talk to it with **branchwise chat**.
    """
    with expected_failures():
        from .backends import open_backend, sampling

        texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        flags = {**drawn, "max_tokens": max_tokens, "stop": tuple(stop or ())}
        engine = {"max_model_len": max_model_len, "dtype": dtype, "device": device}
        with open_backend(url, api_key, model, **engine) as backend:
            answers = backend.generate(texts, sampling(backend, flags, temperature=0.0))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(answer) for answer in answers], indent=1, ensure_ascii=False))
            return
        for prompt, answer in zip(texts, answers, strict=True):
            if len(texts) > 1:
                out.print(prompt, style="bold", markup=False)
            out.print(answer.text, markup=False, soft_wrap=True)
            if not answer.text and answer.finish_reason == "stop" and not stop:
                err.print("nothing came: a chat model wants its chat template (branchwise chat)", style="dim")
            err.print(
                f"{answer.prompt_tokens} prompt tokens, {answer.cached_tokens} cached ({answer.cache_reason}); "
                f"{answer.completion_tokens} generated ({answer.finish_reason})",
                style="dim",
            )
