"""What the page at /ui costs, and how fast it is.

    python tests/benchmarks/bench_ui.py [--nodes 100000] [--pairs 8] [--model null|shipped]

Throughput and the server's CPU seconds a token with nobody looking and with one reader of ``/ui/events``, in turn on
one server, so that both see the same machine: medians of the pairs' ratios. The CPU of a null model is small: a per
cent of a core is several per cent of it. Then, where there is a Chromium, the time
from opening the page to its first paint and to its first drawing of the tree, and from a click to a node's details.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from bench_http import ROLES, load, server, write_tokenizer

BATCH = 1024  # prompts of one request, the most that a server takes
WATCH = "import sys, urllib.request as u\nfor _ in u.urlopen(sys.argv[1], timeout=60): pass"
# A step of 20 ms fixes the rate: steps are alike, and CPU a token can be compared on a machine with other work.
STEP_SECONDS = {"null": 0.02, "shipped": 0.0}
LOAD = {
    "null": ("streams", {"connections": 128, "prompt_tokens": 300, "max_tokens": 400}),
    "shipped": ("requests", {"connections": 8, "prompt_tokens": 300, "max_tokens": 32, "total": 96, "vocab": 4096}),
}
CLICK = """new Promise((done) => {
  const strip = document.querySelector('button.strip');
  if (strip) strip.click();
  requestAnimationFrame(() => {
    const begun = performance.now();
    (document.querySelector('.listed button') || [...document.querySelectorAll('button.cell')].pop()).click();
    const look = () =>
      document.querySelector('aside .full') ? done(performance.now() - begun) : requestAnimationFrame(look);
    look();
  });
})"""


def fill(url: str, nodes: int) -> None:
    """Caches ``nodes`` prompts of one page each: a node each."""
    for first in range(0, nodes, BATCH):
        numbers = range(first, min(nodes, first + BATCH))
        prompts = [[3 + i // 4096 % 64, 3 + i // 64 % 64, 3 + i % 64, *range(3, 16)] for i in numbers]
        body = json.dumps({"prompts": prompts}).encode()
        request = urllib.request.Request(f"{url}/cache/warm", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=300).read()


@contextmanager
def reader(url: str) -> Iterator[None]:
    """A process that reads the events, as a page does."""
    process = subprocess.Popen([sys.executable, "-c", WATCH, f"{url}/ui/events"])
    time.sleep(1.0)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def pairs(running: Any, url: str, count: int, what: str, options: dict[str, int]) -> dict[str, Any]:
    """Ratios open over closed, of tokens/s and of the CPU of all of the server's processes a token."""
    speed, cpu, seen = [], [], []
    for i in range(count):
        found = {}
        for opened in (False, True) if i % 2 else (True, False):
            with reader(url) if opened else nullcontext():
                found[opened] = load(running, what, 1, **options)
        speed.append(found[True]["tokens_per_s"] / found[False]["tokens_per_s"])
        used = {opened: sum(one["us_per_token"][role] for role in ROLES) for opened, one in found.items()}
        cpu.append(used[True] / used[False])
        seen.append(found[False]["tokens_per_s"])
        print(f"pair {i + 1}: throughput {speed[-1]:.3f}, CPU a token {cpu[-1]:.3f}", file=sys.stderr)
    return {
        "pairs": count,
        "tokens_per_s": round(median(seen)),
        "speed": round(median(speed), 4),
        "cpu_per_token": round(median(cpu), 4),
        "of_each": [[round(a, 3), round(b, 3)] for a, b in zip(speed, cpu, strict=True)],
    }


async def paint(url: str) -> dict[str, float]:
    """Milliseconds in a Chromium; {} without one."""
    spec = importlib.util.spec_from_file_location("browser", Path(__file__).parents[1] / "e2e" / "test_ui_browser.py")
    assert spec is not None and spec.loader is not None
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    if driver.PROGRAM is None:
        return {}
    with tempfile.TemporaryDirectory() as profile:
        async with driver.browser(Path(profile)) as page:
            await page.open(f"{url}/ui")
            await page.until("performance.getEntriesByName('first snapshot').length", 60)
            times = "performance.getEntriesByName({!r})[0].startTime"
            found = {
                "first paint": await page.js(times.format("first-contentful-paint")),
                "tree drawn": await page.js(times.format("first snapshot")),
                "click to details": await page.js(CLICK),
            }
    return {name: round(value) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--model", choices=["null", "shipped"], default="null")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tokenizer(Path(folder), "words") if args.model == "null" else None
        room = 16 * args.nodes + (1_000_000 if model else 20_000)
        with server(model, STEP_SECONDS[args.model], None, kv_cache_tokens=room) as running:
            url = f"http://127.0.0.1:{running.port}"
            what, options = LOAD[args.model]
            load(running, what, 1, **options)  # warm
            fill(url, args.nodes)
            found = {
                "model": args.model,
                "nodes": args.nodes,
                **asyncio.run(paint(url)),
                **pairs(running, url, args.pairs, what, options),
            }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
