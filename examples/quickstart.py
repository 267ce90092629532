"""Branching prompts against a running Branchwise server: what they share is computed once.

    branchwise serve                                   # in one terminal
    python examples/quickstart.py http://127.0.0.1:8000   # in another

One system prompt; three questions branch off it, asked at the same moment; two follow-ups branch off each answer.
Every answer says how many tokens of its prompt were already there, and why not more. Then the server draws its tree.
Needs nothing but Python: plain HTTP.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

SYSTEM = (
    "You are a patient assistant at the front desk of a small public library. Answer in one or two short sentences. "
    "The library is open from nine to six, except on Sundays. Books may be kept for four weeks and renewed twice. "
    "If you do not know the answer, say so and name the person who does.\n\n"
)
QUESTIONS = ["When do you open on Saturday?", "How long may I keep a book?", "Where do I find the maps?"]
FOLLOW_UPS = ["Are you sure?", "And on holidays?"]


def ask(url: str, prompt: str) -> dict:
    """One completion. `meta_info` in the reply says what the tree saved."""
    body = {"text": prompt, "sampling_params": {"max_new_tokens": 24, "temperature": 0}}
    request = urllib.request.Request(
        f"{url}/generate", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


# Why reuse ended where it did: the words of `meta_info.cache.reason`.
WHY = {
    "hit": "all there was to reuse",
    "cold": "what follows is new",
    "diverged": "there another branch goes its own way",
    "evicted": "what follows was forgotten for want of memory",
    "namespace": "it belongs to another namespace",
    "disabled": "the cache is off",
}


def show(question: str, reply: dict) -> None:
    meta = reply["meta_info"]
    reason = meta["cache"]["reason"]
    print(f"  {question}")
    print(f"    {' '.join(reply['text'].split())[:100]!r}")
    print(f"    {meta['prompt_tokens']} prompt tokens, {meta['cached_tokens']} cached ({reason}: {WHY[reason]})")


def main(url: str) -> None:
    with ThreadPoolExecutor(max_workers=8) as pool:
        print("Three questions on one system prompt, asked at once:")
        prompts = [f"{SYSTEM}Question: {question}\nAnswer:" for question in QUESTIONS]
        answers = list(pool.map(lambda prompt: ask(url, prompt), prompts))
        for question, reply in zip(QUESTIONS, answers, strict=True):
            show(question, reply)

        print("\nTwo follow-ups on each answer, asked at once:")
        branches = [
            (f"{question} … {follow_up}", f"{prompt}{reply['text']}\nQuestion: {follow_up}\nAnswer:")
            for question, prompt, reply in zip(QUESTIONS, prompts, answers, strict=True)
            for follow_up in FOLLOW_UPS
        ]
        follow_ups = list(pool.map(lambda branch: ask(url, branch[1]), branches))
        for (label, _), reply in zip(branches, follow_ups, strict=True):
            show(label, reply)

    replies = answers + follow_ups
    prompt_tokens = sum(reply["meta_info"]["prompt_tokens"] for reply in replies)
    cached = sum(reply["meta_info"]["cached_tokens"] for reply in replies)
    print(f"\n{prompt_tokens} prompt tokens sent, {cached} ({cached / prompt_tokens:.0%}) not computed again.")

    print("\nWhat the server remembers:")
    with urllib.request.urlopen(f"{url}/cache/tree?format=text", timeout=30) as response:
        print(response.read().decode())


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
