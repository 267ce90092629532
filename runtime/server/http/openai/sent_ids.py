"""The token ids of one sample that a client has not been sent (vLLM's ``return_token_ids``)."""

from __future__ import annotations

from ....outputs import Output


class SentIds:
    """Counts what was sent of ``output``: each id once, in a whole answer or over the chunks of a stream."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._sent = 0
        self._prompt_sent = False

    @property
    def pending(self) -> bool:
        """Whether there are output ids that have not been sent."""
        return len(self._output.token_ids) > self._sent

    def take(self) -> list[int]:
        """The output ids since the last call."""
        new = self._output.token_ids[self._sent :]
        self._sent += len(new)
        return new

    def take_prompt(self) -> list[int] | None:
        """The prompt's ids the first time, None afterwards."""
        if self._prompt_sent:
            return None
        self._prompt_sent = True
        return self._output.prompt
