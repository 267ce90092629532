"""The metrics of all replicas on one page: each sample with the label ``replica``.

They are not added. A sum falls when a replica stops, which Prometheus takes for a counter that began again at 0, so
that ``rate`` would jump; ``sum without (replica) (rate(…))`` of labelled samples is right. SGLang's gateway labels them
likewise (``/engine_metrics``, ``worker_addr``).
"""

from __future__ import annotations

from collections.abc import Mapping

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"


def labelled(pages: Mapping[str, str]) -> str:
    """One page in Prometheus' text format of those of replicas, by name. All samples of a metric stand together, under
    the first replica's ``HELP`` and ``TYPE``, as the format demands."""
    comments: dict[str, dict[str, str]] = {}  # by metric and kind
    samples: dict[str, list[str]] = {}  # by metric
    for replica, page in pages.items():
        metric = ""
        for line in page.splitlines():
            if line.startswith("# "):
                _, kind, metric, *_ = line.split(" ", 3)
                comments.setdefault(metric, {}).setdefault(kind, line)
            elif line:
                samples.setdefault(metric, []).append(_with_label(line, replica))
    lines = (line for metric, found in samples.items() for line in (*comments.get(metric, {}).values(), *found))
    return "".join(f"{line}\n" for line in lines)


def _with_label(sample: str, replica: str) -> str:
    name, brace, rest = sample.partition("{")
    if not brace:
        name, _, rest = sample.partition(" ")
        return f'{name}{{replica="{replica}"}} {rest}'
    return f'{name}{{replica="{replica}",{rest}'
