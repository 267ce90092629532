"""Bodies with token ids: arrays where that is exact, and otherwise what JSON says, word for word."""

from __future__ import annotations

import gzip
import json
import random
import re
from typing import Any

import msgspec
import numpy as np
import pytest
from fastapi import Request

from branchwise.runtime.errors import InvalidRequest
from branchwise.runtime.messages import Limits
from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.server.http.fields.prompts import make_prompt, split_prompts
from branchwise.runtime.server.http.plumbing import body as bodies
from branchwise.runtime.server.http.plumbing import id_arrays
from branchwise.runtime.server.http.plumbing.body import ESCAPES, IDS, MAX_VALUES, read_json_object

MEGABYTES = 16 * 1024 * 1024
LIMITS = Limits(vocab_size=400, max_model_len=512, pool_tokens=1024)


async def read(body: bytes, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return await read_json_object(Request({"type": "http", "method": "POST", "headers": list(headers)}, receive))


@pytest.mark.parametrize("name", ["prompt", "input_ids", "tokens", "extend"])
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


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "br", "zstd", "identity, gzip"])
async def test_a_compressed_body_is_refused_by_name(encoding: str) -> None:
    """Not as invalid JSON: the client is told what to change."""
    body = gzip.compress(b'{"prompt": "a"}')
    with pytest.raises(InvalidRequest, match=f"Content-Encoding {encoding} is not supported") as refused:
        await read(body, (b"content-encoding", encoding.encode()))
    assert refused.value.status == 415
    assert await read(b'{"prompt": "a"}', (b"content-encoding", b"identity")) == {"prompt": "a"}


@pytest.mark.parametrize("name", ["prompt", "input_ids", "prompts", "continuations"])
async def test_a_list_of_long_lists_of_ids_is_a_list_of_arrays(name: str) -> None:
    lists = [[*range(100)], [7], [2**40] * 200]
    value = (await read(json.dumps({name: lists, "n": 1}, indent=1).encode()))[name]
    assert [ids.dtype for ids in value] == [np.int64] * 3
    assert [ids.tolist() for ids in value] == lists


@pytest.mark.parametrize(
    "value",
    [
        *("[[1],[2]]", "[[1, 2], []]", "[[1, 2], 3]", "[3, [1, 2]]", "[[[1]]]", "[[1],[[2]]]", "[[-1]]", '[["a"]]'),
        *("[[]]", "[[ ], [ ]]", f"[[1],[{2**62}]]", "[[1.5],[1]]", "[[1],[2],null]"),
    ],
)
@pytest.mark.parametrize("long", [0, 1])
async def test_other_lists_of_lists_are_what_json_says(value: str, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(id_arrays, "_LONG", long)
    [got] = (await read(f'{{"prompt": {value}}}'.encode())).values()
    assert [ids.tolist() if isinstance(ids, np.ndarray) else ids for ids in got] == json.loads(value)


@pytest.mark.parametrize("name", ["extend", "tokens"])
async def test_where_no_list_of_lists_belongs_it_is_none_of_arrays(name: str) -> None:
    lists = [[*range(100)]] * 2
    assert await read(json.dumps({name: lists}).encode()) == {name: lists}


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
            return make_prompt(one, SamplingParams(max_tokens=4), LIMITS, "prompt")
        except InvalidRequest as error:
            return (error.message, error.path, error.status)

    assert outcome(np.array(ids, np.int64)) == outcome(ids)


def full(start: bytes, unit: bytes, end: bytes, size: int = MEGABYTES) -> bytes:
    times = (size - len(start) - len(end)) // (len(unit) + 1)
    return b"".join((start, (unit + b",") * (times - 1), unit, end))


NEST = b"[" * 60 + b"]" * 60
OBJECTS = [b"{}", b"[]", b'""', b"0", b"-1", b"1.5", b"null", b'{"a":0}', b'{"\\"":","}', NEST]


@pytest.mark.parametrize("unit", OBJECTS, ids=lambda unit: unit[:8].decode())
@pytest.mark.parametrize(
    ("start", "end"),
    [
        (b'{"metadata":[', b"]}"),
        (b'{"prompt":[1],"input_ids":[', b"]}"),
        (b'{"messages":[{"content":[', b"]}]}"),
        (b'{"tools":[', b""),
        (b"[", b"]"),
    ],
)
async def test_millions_of_values_are_refused_before_any_is_made(
    unit: bytes, start: bytes, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They held the loop for up to seven seconds: being made, looked at, let go of."""
    monkeypatch.setattr(bodies, "_decoded", None)
    if unit == b"0" and b"input_ids" in start:
        unit = b"0.0"  # else they are ids
    with pytest.raises(InvalidRequest) as caught:
        await read(full(start, unit, end))
    if end or caught.value.status == 413:  # numbers are few enough to say that the end is missing
        assert re.fullmatch(r"the body must have at most \d+ .*, got \d+", caught.value.message)
        assert caught.value.status == 413
    else:
        assert caught.value.message == "the body is not valid JSON: Input data was truncated"


async def test_names_are_counted_and_an_escaped_quote_ends_no_string(monkeypatch: pytest.MonkeyPatch) -> None:
    half = b'{"x":{' + b",".join(b'"k%d":1' % i for i in range(MAX_VALUES // 2 - 2)) + b"}}"
    assert len((await read(half))["x"]) == MAX_VALUES // 2 - 2
    with pytest.raises(InvalidRequest, match=f"got {MAX_VALUES + 4}"):
        await read(half.replace(b'"k1"', b'"k,":1,"k1"').replace(b"}}", b',"\\"{":1}}'))


@pytest.mark.parametrize("unit", [b"a", "語".encode(), b"f({a, b}) [c]: ", b"\\n                  "])
async def test_megabytes_of_text_are_no_values(unit: bytes) -> None:
    start, end = b'{"messages":[{"content":"', b'"}]}'
    text = unit * ((MEGABYTES - len(start) - len(end)) // len(unit))
    value = await read(start + text + end)
    assert value == {"messages": [{"content": json.loads(b'"' + text + b'"')}]}


async def test_ids_of_prompts_are_no_values_and_others_are() -> None:
    prompts = [[i] * 2500 for i in range(1000)]
    assert sum(map(len, prompts)) > 9 * MAX_VALUES
    body = json.dumps({"prompt": prompts, "n": 1}).encode()
    value = await read(body)
    assert [ids.tolist() for ids in value["prompt"]] == prompts
    flat = (await read(json.dumps({"tokens": [7] * 10**6}).encode()))["tokens"]
    assert len(flat) == 10**6 and set(flat.tolist()) == {7}
    with pytest.raises(InvalidRequest, match=f"at most {MAX_VALUES} names and values .* beside token ids"):
        await read(body.replace(b'"prompt"', b'"others"'))


async def test_ids_and_escapes_have_bounds_of_their_own() -> None:
    most = IDS * MAX_VALUES
    assert len((await read(b'{"prompt":[' + b"7," * (most - 5) + b"7]}"))["prompt"]) == most - 4
    with pytest.raises(InvalidRequest, match=f"at most {most} names, values and token ids, got {most + 1}"):
        await read(b'{"prompt":[' + b"7," * (most - 4) + b"7]}")
    most = ESCAPES * MAX_VALUES
    assert len((await read(b'{"a":"' + b"\\n" * most + b'"}'))["a"]) == most
    with pytest.raises(InvalidRequest, match=f"at most {most} backslashes in its strings, got {most + 1}"):
        await read(b'{"a":"' + b"\\n" * (most + 1) + b'"}')


@pytest.mark.parametrize("broken", [b'"\\ud800"', b"NaN", b'"\xff"', b"1e999"])
async def test_what_is_wrong_beside_many_ids_is_said(broken: bytes) -> None:
    body = b'{"prompt":[' + b"12345," * 400_000 + b'1],"x":' + broken + b"}"
    with pytest.raises(InvalidRequest, match="the body is not valid") as caught:
        await read(body)
    assert caught.value.status == 400


async def test_others_have_their_turn_while_a_large_body_is_read(turns_during: Any) -> None:
    for body in (b'{"prompt":[' + b"12345," * 2_000_000 + b"1]}", b'{"prompt":"' + b"a" * 10**7 + b'"}'):
        assert await turns_during(read(body)) > 40, "once for each quarter of a megabyte, and between the steps"
