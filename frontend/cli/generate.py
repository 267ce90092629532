"""``branchwise generate``: answers to prompts, from a model loaded here or from a running server."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Any

import typer

from .config_flags import config_flags
from .console import err, expected_failures, out
from .options import ENGINE_FLAGS, ApiKey, MaxTokens, ModelFlag, Seed, Stop, Temperature, TopK, TopP, UrlFlag


@config_flags(*ENGINE_FLAGS)
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
    **settings: Any,
) -> None:
    """Answer prompts, together: what they share is computed once.

    **branchwise generate --model Qwen/Qwen3-0.6B "The capital of France is" "The capital of Italy is"** loads a model
    here; with **--url** a running server answers. Prompts are not put into a chat template. The model that ships with
    the package, which answers if neither is given, needs one: use **branchwise chat** to talk to it.
    """
    with expected_failures():
        from .models import open_model

        texts = [sys.stdin.read() if prompt == "-" else prompt for prompt in prompts]
        flags: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "seed": seed}
        flags |= {"max_tokens": max_tokens, "stop": tuple(stop or ())}
        with open_model(model, url, api_key, **settings) as asked:
            answers = asked.generate(texts, asked.sampling(flags, temperature=0.0))
        if as_json:
            typer.echo(json.dumps([dataclasses.asdict(answer) for answer in answers], indent=1, ensure_ascii=False))
            return
        for prompt, answer in zip(texts, answers, strict=True):
            if len(texts) > 1:
                out.print(prompt, style="bold", markup=False)
            out.print(answer.text, markup=False, soft_wrap=True)
            if not answer.text and answer.finish_reason == "stop" and not stop:
                err.print("the answer is empty: a chat model needs its chat template (branchwise chat)", style="dim")
            err.print(
                f"{answer.prompt_tokens} prompt tokens, {answer.cached_tokens} cached ({answer.cache_reason}); "
                f"{answer.completion_tokens} generated ({answer.finish_reason})",
                style="dim",
            )
