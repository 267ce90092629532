"""Flags of vLLM's and SGLang's servers, and their equivalents here."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from .console import EXIT_UNUSABLE, fail

_CALLED = {
    "--model": ("--model-path",),
    "--tensor-parallel-size": ("-tp", "--tp", "--tp-size"),
    "--max-model-len": ("--context-length", "--max-context-len"),
    "--max-num-seqs": ("--max-running-requests",),
    "--max-num-batched-tokens": ("--chunked-prefill-size", "--max-prefill-tokens"),
    "--gpu-memory-utilization": ("--mem-fraction-static",),
    "--kv-cache-tokens": ("--max-total-tokens",),
    "--page-size": ("--block-size",),
    "--eviction-policy": ("--radix-eviction-policy",),
    "--schedule-policy": ("--scheduling-policy",),
    "--disable-radix-cache": ("--no-enable-prefix-caching",),
    "--no-cuda-graphs": ("--enforce-eager", "--disable-cuda-graph"),
    "--seed": ("--random-seed",),
    "--allow-origins": ("--allowed-origins",),
    "--host-cache": ("--hicache-size", "--kv-offloading-size", "--swap-space"),
    "--hang-timeout": ("--watchdog-timeout",),
    "--log-requests": ("--enable-log-requests",),
}
_SAID = {
    "always on: no flag is needed": (
        *("--enable-prefix-caching", "--enable-chunked-prefill", "--enable-auto-tool-choice", "--enable-metrics"),
        *("--enable-cache-report", "--enable-prompt-tokens-details"),
    ),
    "the tokenizer's own template is used; another one goes into the model's folder": ("--chat-template",),
    "the tokenizer of the model's folder is used": ("--tokenizer", "--tokenizer-path", "--tokenizer-mode"),
    "download that revision with hf download, and serve its folder": ("--revision",),
    "branchwise cluster runs several replicas (branchwise docs cluster)": (
        *("--data-parallel-size", "-dp", "--dp", "--dp-size"),
    ),
    "not there yet (README.md, what is not there yet)": (
        *("--pipeline-parallel-size", "-pp", "--pp-size", "--cpu-offload-gb"),
        *("--enable-lora", "--lora-modules", "--lora-paths", "--speculative-config", "--speculative-algorithm"),
        *("--ssl-keyfile", "--ssl-certfile"),
    ),
}
PEERS = {
    **{theirs: f"called {ours} here" for ours, names in _CALLED.items() for theirs in names},
    **{theirs: said for said, names in _SAID.items() for theirs in names},
}


class KnowsPeers(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for argument in args:
            if argument == "--":
                break
            name = argument.partition("=")[0]
            if name in PEERS:
                fail(f"{name}: {PEERS[name]}", EXIT_UNUSABLE)
        return super().parse_args(ctx, args)
