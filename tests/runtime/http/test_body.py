"""Bodies with token ids: arrays where that is exact, and otherwise what JSON says, word for word."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import numpy as np
import pytest
from fastapi import Request

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.http.body import read_json_object
from branchwise.runtime.http.prompts import make_prompt, split_prompts
from branchwise.runtime.messages import Limits
from branchwise.runtime.sampling_params import SamplingParams

LIMITS = Limits(vocab_size=400, max_model_len=512, pool_tokens=1024)


async def read(body: bytes) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await read_json_object(Request({"type": "http", "method": "POST", "headers": []}, receive))


@pytest.mark.parametrize("name", ["prompt", "input_ids"])
@pytest.mark.parametrize("ids", ["[7]", "[0, 399,1]", "[ 5 ,\n6\t, 7\r]", "[" + "12345, " * 33_000 + "1]"])
async def test_a_flat_list_of_ids_is_an_array(name: str, ids: str) -> None:
    value = (await read(f'{{"model": "m", "{name}": {ids}, "n": 1}}'.encode()))[name]
    assert isinstance(value, np.ndarray)
    assert value.dtype == np.int64
    assert value.tolist() == json.loads(ids)


@pytest.mark.parametrize(
    "value",
    [
        *('"text"', "[]", "[ ]", "[-1]", "[1.5]", "[1e3]", "[true]", "[null]", '["a"]', "[[1, 2]]", "[1, [2]]", "7"),
        *("{}", f"[{2**62}]", f"[1, {2**63 - 1}]", f"[{2**64}]", "[" + "9" * 500 + "]"),
    ],
)
async def test_everything_else_is_what_json_says(value: str) -> None:
    assert await read(f'{{"prompt": {value}}}'.encode()) == {"prompt": json.loads(value)}


async def test_no_body_is_called_that() -> None:
    with pytest.raises(InvalidRequest, match="the body is empty"):
        await read(b"")


async def test_other_fields_are_left_alone() -> None:
    body = await read(b'{"prompt": [1], "stop_token_ids": [1, 2], "text": "\\u00e4", "prompt": [2, 3]}')
    assert body["prompt"].tolist() == [2, 3], "the last of two fields of one name, as ever"
    assert body["stop_token_ids"] == [1, 2]
    assert body["text"] == "ä"


async def test_any_body_means_and_fails_as_without_arrays() -> None:
    """Random bodies, most of them a little broken, against the plain decoder: values and messages."""
    rng = random.Random(5)
    odd = [b"1.5", b"-0", b"00", b"01", b"1 2", b"", b"true", b'"a"', b"\xff", b"+1", b"99999999999999999999", b"[1]"]
    seen_arrays = 0
    for _ in range(5000):
        ids = [rng.choice(odd) if rng.random() < 0.1 else b"%d" % rng.randrange(10**5) for _ in range(rng.randrange(5))]
        ends = rng.choice([(b"[", b"]"), (b"[", b"]"), (b"[", b",]"), (b"[", b""), (b"", b"")])
        more = rng.choice([b"", b', "x": 1', b', "x": NaN', b', "x": "\xff"', b', "x": "\\ud800"', b",", b"}"])
        field = rng.choice([b"prompt", b"input_ids", b"other"])
        body = b'{"%s": %s%s}' % (field, rng.choice([b",", b", "]).join(ids).join(ends), more)
        try:
            expected: Any = msgspec.json.decode(body)
        except UnicodeDecodeError:
            expected = "the body is not valid UTF-8"
        except msgspec.DecodeError as error:
            expected = f"the body is not valid JSON: {error}"
        try:
            got: Any = await read(body)
            seen_arrays += any(isinstance(value, np.ndarray) for value in got.values())
            got = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in got.items()}
        except InvalidRequest as error:
            got = error.message
        assert got == expected, body
    assert seen_arrays > 100


@pytest.mark.parametrize("ids", [[0], [399, 0, 5], [400], [1, 2, 2**40], [3] * 600])
def test_an_array_is_checked_as_a_list_is(ids: list[int]) -> None:
    def outcome(prompt: Any) -> object:
        ((one,), is_list) = split_prompts(prompt, "prompt")
        assert not is_list
        try:
            return make_prompt(one, SamplingParams(max_tokens=4), LIMITS, "prompt", {})
        except InvalidRequest as error:
            return (error.message, error.field, error.status)

    assert outcome(np.array(ids, np.int64)) == outcome(ids)
