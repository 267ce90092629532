"""A step's derived arrays, and its byte form."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from branchwise.runtime.sampling_params import SamplingParams
from branchwise.runtime.step import RowStart, StepPlan
from branchwise.runtime.step_codec import decode_plan, encode

int32 = st.integers(-(2**31), 2**31 - 1)
ids = arrays.arrays(np.int32, st.integers(0, 20), elements=int32)
pairs = arrays.arrays(np.int32, st.tuples(st.integers(0, 5), st.just(2)), elements=int32)
params = st.builds(
    SamplingParams,
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(st.integers(0, 9), st.floats(-100, 100), max_size=3),
    stop=st.lists(st.text(max_size=4), max_size=3).map(tuple),
    json_schema=st.none() | st.just({"type": "object", "properties": {"é": {}}}),
    logprobs=st.none() | st.integers(0, 20),
)
starts = st.builds(RowStart, st.integers(0, 99), params, st.integers(0, 2**64 - 1), ids, st.integers(0, 99))
plans = st.builds(
    StepPlan,
    st.integers(0, 2**40),
    *[ids] * 4,
    st.integers(0, 9),
    *[ids] * 4,
    pairs,
    starts=st.lists(starts, max_size=3),
    prompt_logprobs=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20), st.integers(0, 99)), max_size=3),
    constrained=ids,
)


def same(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, np.ndarray):
        return mine.dtype == theirs.dtype and np.array_equal(mine, theirs) and theirs.flags.writeable
    if isinstance(mine, StepPlan | RowStart):
        return type(mine) is type(theirs) and all(
            same(getattr(mine, field.name), getattr(theirs, field.name)) for field in fields(mine)
        )
    if isinstance(mine, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(same(value, theirs[key]) for key, value in mine.items())
    return bool(mine == theirs)


@settings(max_examples=150, deadline=None)
@given(plans)
def test_a_plan_survives_its_byte_form(plan: StepPlan) -> None:
    assert same(plan, decode_plan(encode(plan)))


def test_bytes_that_are_no_plan_are_refused() -> None:
    none = np.empty(0, np.int32)
    plan = StepPlan(1, none, none, none, none, 0, none, none, none, none, none.reshape(0, 2))
    whole = msgspec.msgpack.decode(encode(plan))
    for rows in (["<i8", [1], b"12345678"], ["<i4", [2], b"1234"], ["<i4", [-1, -1], b"1234"], ["O", [0], b""], "x"):
        with pytest.raises(msgspec.ValidationError):
            decode_plan(msgspec.msgpack.encode(whole | {"rows": rows}))
    with pytest.raises(msgspec.ValidationError):
        decode_plan(msgspec.msgpack.encode({"tokens": 1}))
    with pytest.raises(msgspec.DecodeError):
        decode_plan(encode(plan)[:-1])
    plan.rows = [1, 2]  # type: ignore[assignment]
    plan.token_ids = object()  # type: ignore[assignment]
    with pytest.raises(NotImplementedError, match="cannot hold a object"):
        encode(plan)


def test_samples_know_their_request_and_position() -> None:
    none = np.empty(0, np.int32)
    q_lens, kv_lens = np.array([1, 1, 4, 2], np.int32), np.array([9, 1, 20, 2], np.int32)
    samples = np.array([0, 1, 3, 5, 7], np.int32)
    rows, tokens = np.array([5, 3, 8, 0], np.int32), np.zeros(8, np.int32)
    plan = StepPlan(1, rows, q_lens, kv_lens, tokens, 2, samples, none, none, none, none.reshape(0, 2))
    assert plan.query_starts.tolist() == [0, 1, 2, 6]
    assert plan.sampled_requests.tolist() == [0, 1, 2, 2, 3]
    assert plan.sample_positions.tolist() == [9, 1, 18, 20, 2]
