"""What the command prints: errors about a request name its flags."""

from __future__ import annotations

import json
import sys

import pytest

from branchwise.frontend.cli import console
from branchwise.frontend.cli.console import in_flags
from branchwise.frontend.client import Client
from branchwise.frontend.errors import BackendError
from branchwise.runtime.errors import EngineDead, InvalidRequest


@pytest.mark.parametrize(
    ("path", "problem", "others", "said"),
    [
        ("temperature", "must be at least 0, got -1", (), "--temperature must be at least 0, got -1"),
        ("sampling_params.top_p", "must be", (), "--top-p must be"),
        ("sampling_params[1].stop", "must be", (), "--stop must be"),
        ("text[1]", "has 9 tokens, more than the 8", (), "prompt[1] has 9 tokens, more than the 8"),
        ("max_tokens", "20 + {0} 90 = 110 tokens", ("prompt",), "--max-tokens 20 + prompt 90 = 110 tokens"),
        ("min_tokens", "must be at most {0}", ("max_tokens",), "min_tokens must be at most --max-tokens"),
        ("sampling_seed", "must be an integer", (), "--seed must be an integer"),
        ("prompt", "must not be empty", (), "prompt must not be empty"),
        (None, "the temperature of the text may stop", (), "the temperature of the text may stop"),
    ],
)
def test_fields_become_flags(path: str | None, problem: str, others: tuple[str, ...], said: str) -> None:
    assert in_flags(InvalidRequest(path, problem, others=others)) == said


def test_a_servers_error_names_flags_too() -> None:
    body = {"error": {"message": "sampling_params.top_p must be at most 1", "param": "sampling_params.top_p"}}
    client = Client("http://h:1")
    error = client.refused(400, json.dumps(body).encode())
    assert str(error) == "http://h:1 answered 400: sampling_params.top_p must be at most 1"
    assert in_flags(error) == "http://h:1 answered 400: --top-p must be at most 1"
    assert in_flags(client.refused(500, b'{"detail": "stop"}')) == "http://h:1 answered 500: stop"


def test_other_errors_stay_as_they_are() -> None:
    assert in_flags(EngineDead("temperature is too high")) == "temperature is too high"
    assert in_flags(BackendError("no server answers")) == "no server answers"


def test_a_command_without_standard_output_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    console._console(stderr=False).print("unseen")
