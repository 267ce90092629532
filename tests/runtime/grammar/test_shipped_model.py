"""The shipped model, asked for JSON of a few hundred schemas: whatever it has to say, what it ends is valid."""

from __future__ import annotations

import json
import re
from collections import Counter

import jsonschema
import pytest

from branchwise import Engine, SamplingParams

FORMATS = jsonschema.Draft202012Validator.FORMAT_CHECKER
QUESTION = [{"role": "user", "content": "Bruno lives in Milford. Bruno is 31 years old. Write it as JSON."}]


@pytest.fixture(scope="module")
def shipped():
    with Engine(device="cpu", kv_cache_tokens=32_768, max_num_seqs=64, check_when_idle=True) as engine:
        yield engine


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_answer_that_ends_is_valid(shipped, generated, temperature):
    schemas = generated.schemas(200, seed=5 + int(temperature))
    prompt = shipped.tokenizer.apply_chat_template(QUESTION)
    params = [
        SamplingParams(json_schema=schema, temperature=temperature, seed=i, max_tokens=160)
        for i, schema in enumerate(schemas)
    ]
    outputs = shipped.generate([prompt] * len(params), params)
    ends = Counter(output.finish_reason for output in outputs)
    assert ends["stop"] + ends["length"] == len(schemas)
    assert ends["stop"] >= 0.8 * len(schemas)  # greedy, it may go on and on in what recurs
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            jsonschema.Draft202012Validator(schema, format_checker=FORMATS).validate(json.loads(output.text))
        else:  # cut, and right as far as it goes: no whitespace to fall into
            assert not re.search(r"[ \t\n]{45}", output.text)
