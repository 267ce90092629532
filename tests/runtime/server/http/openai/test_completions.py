"""What rendering the chunks of many choices costs: everybody waits for the loop that does it."""

from __future__ import annotations

import time
from collections.abc import Callable

from branchwise.runtime.messages import Delta
from branchwise.runtime.server.http.fields.parse import StreamOptions
from branchwise.runtime.server.http.openai.completions import CompletionRequest, _CompletionReply
from branchwise.runtime.server.http.state import AppState


def test_running_usage_of_many_choices_is_summed_once_a_step(make_state: Callable[..., AppState]) -> None:
    """It was summed over all choices for each of their chunks: more than a second of every step, for 1,024."""
    options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    body = CompletionRequest(prompt=[[7]] * 1024, stream=True, stream_options=options)
    answer = _CompletionReply(make_state(), body)
    for step in (1, 2):
        batch = [(i, Delta(i + 1, "a", b"\1\0\0\0", prompt_tokens=1)) for i in range(1024)]
        started = time.thread_time()
        chunks = list(answer.events(batch))
        assert time.thread_time() - started < 0.4
        assert len(chunks) == 1024
        assert b'"completion_tokens":%d,' % (1024 * step) in chunks[0]
        assert b'"prompt_tokens":1024,' in chunks[0]
