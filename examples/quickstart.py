"""Branching prompts against a running Branchwise server: what they share is computed once.

    branchwise serve                                   # in one terminal
    python examples/quickstart.py http://127.0.0.1:8000   # in another

One question on a text; then two more at once; then two follow-ups on each answer. For each answer it prints how much of
its prompt was cached, and at the end the totals and the server's radix tree. Needs only Python's standard library. The
prompts are in ChatML, the format of the shipped model and of Qwen.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

TEXT = (
    "Anna lives in Harwick. Anna works as a painter. Anna is 52 years old. Anna collects stamps. "
    "Bruno lives in Milford. Bruno works as a baker. Bruno is 31 years old. Bruno collects shells. "
    "Clara lives in Penvale. Clara works as a judge. Clara is 47 years old. Clara collects clocks. "
    "David lives in Tarnby. David works as a pilot. David is 64 years old. David collects maps."
)
OPENING = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nRead this: {TEXT}\n"
ANSWER = "<|im_end|>\n<|im_start|>assistant\n"  # the question ends, the answer begins
NEXT = "<|im_end|>\n<|im_start|>user\n"  # the answer ends, the next question begins
QUESTIONS = ["Where does Bruno live?", "What is Clara's job?", "What does David collect?"]
FOLLOW_UPS = ["How old is Anna?", "Where does David live?"]

# Explanations of `meta_info.cache.reason`, where it says more than the numbers.
WHY = {
    "evicted": "the rest was evicted",
    "namespace": "nothing is cached yet under this salt",
    "disabled": "the cache is off",
}


def http(url: str, body: dict | None = None, timeout: float = 120) -> bytes:
    """A POST of ``body``, or a GET, with the API key of the environment, if there is one."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("BRANCHWISE_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, data=json.dumps(body).encode() if body else None, headers=headers)
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read()


def ask(url: str, prompt: str) -> dict:
    """One completion. `meta_info` in the reply says what was cached."""
    sampling = {"max_new_tokens": 24, "temperature": 0}
    body = {"text": prompt, "sampling_params": sampling, "return_prompt_token_ids": True}
    return json.loads(http(f"{url}/generate", body))


def printable(text: str, width: int = 40) -> str:
    """``text`` on one line of at most ``width`` characters; control characters become dots."""
    shown = "".join(char if char.isprintable() and char != "\ufffd" else "·" for char in " ".join(text.split()))
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def show(question: str, reply: dict) -> None:
    meta = reply["meta_info"]
    prompt, reused = meta["prompt_tokens"], meta["cached_tokens"]
    why = WHY.get(meta["cache"]["reason"])
    print(
        f"  {question:<49} {prompt:>4} = {reused:>4} reused + {prompt - reused:>4} computed   "
        f"{printable(reply['text'])}{f'  ({why})' if why else ''}"
    )


def distinct_tokens(prompts: list[list[int]]) -> int:
    """The number of distinct prefixes of all prompts: the fewest tokens that must be computed."""
    trie: dict = {}
    count = 0
    for prompt in prompts:
        node = trie
        for token in prompt:
            if token not in node:
                node[token] = {}
                count += 1
            node = node[token]
    return count


def main(url: str) -> None:
    http(f"{url}/health", timeout=10)  # fails early if there is no server
    with ThreadPoolExecutor(max_workers=8) as pool:
        prompts = [f"{OPENING}{question}{ANSWER}" for question in QUESTIONS]
        print("One question on a text of sixteen facts:           tokens of the prompt")
        answers = [ask(url, prompts[0])]
        show(QUESTIONS[0], answers[0])

        print("Two more on the same, asked at once:")
        answers += pool.map(lambda prompt: ask(url, prompt), prompts[1:])
        for question, reply in zip(QUESTIONS[1:], answers[1:], strict=True):
            show(question, reply)

        print("Two follow-ups on each answer, all asked at once:")
        branches = [
            (f"{question} … {follow_up}", f"{prompt}{reply['text']}{NEXT}{follow_up}{ANSWER}")
            for question, prompt, reply in zip(QUESTIONS, prompts, answers, strict=True)
            for follow_up in FOLLOW_UPS
        ]
        follow_ups = list(pool.map(lambda branch: ask(url, branch[1]), branches))
        for (label, _), reply in zip(branches, follow_ups, strict=True):
            show(label, reply)

    replies = answers + follow_ups
    sent = sum(reply["meta_info"]["prompt_tokens"] for reply in replies)
    reused = sum(reply["meta_info"]["cached_tokens"] for reply in replies)
    print(f"\n  {sent:>5} prompt tokens sent")
    print(f"  {sent - reused:>5} computed")
    if all(reply.get("prompt_token_ids") for reply in replies):
        distinct = distinct_tokens([reply["prompt_token_ids"] for reply in replies])
        print(f"  {distinct:>5} distinct tokens in all prompts (answers in follow-ups were cached when generated)")
    print(f"  {reused / sent:>5.0%} not computed again")

    print("\nThe server's radix tree (each line is a node; the lines below it continue it):")
    print(http(f"{url}/cache/tree?format=text&max_nodes=40").decode())


def reason(error: OSError) -> str:
    """Why a request failed, in one line: the server's message, or the system's."""
    if isinstance(error, urllib.error.HTTPError):
        try:
            return str(json.load(error)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return str(error)
    return str(getattr(error, "reason", error))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = "a Branchwise server (its key: BRANCHWISE_API_KEY); without: %(default)s"
    parser.add_argument("url", metavar="URL", nargs="?", default="http://127.0.0.1:8000", help=where)
    address = parser.parse_args().url.rstrip("/")
    address = address if "://" in address else f"http://{address}"
    try:
        main(address)
    except urllib.error.HTTPError as error:
        sys.exit(f"the server at {address} answered {error.code}: {reason(error)}")
    except OSError as error:  # URLError is one
        sys.exit(f"no server at {address} ({reason(error)}); start one with: branchwise serve")
