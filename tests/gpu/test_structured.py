"""Constraints on the device: steps overlap, masks come while one runs, forced tokens are jumped over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from branchwise import Engine, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "description_of_the_problem": {"type": "string", "maxLength": 6},
        "number_of_occurrences": {"type": "integer", "minimum": 1, "maximum": 99},
        "severity_of_the_problem": {"enum": ["negligible_severity", "intolerable_severity"]},
    },
    "required": ["description_of_the_problem", "number_of_occurrences", "severity_of_the_problem"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("graphs", [True, False])
def test_answers_are_valid_beside_free_ones(gpu_checkpoint: Callable[[str], Path], graphs: bool) -> None:
    constrained = [SamplingParams(json_schema=SCHEMA, seed=i, max_tokens=200) for i in range(48)]
    free = [SamplingParams(seed=i, max_tokens=40, ignore_eos=True) for i in range(16)]
    settings = {"device": "cuda", "dtype": "bfloat16", "kv_cache_tokens": 32_768, "max_num_seqs": 64}
    with Engine(str(gpu_checkpoint("llama-gqa")), cuda_graphs=graphs, **settings) as engine:
        prompts = [f"Report {i}: " for i in range(64)]
        outputs = engine.generate(prompts, constrained + free)
        alone = engine.generate(prompts[0], constrained[0])
        engine.check()
    for output in outputs[:48]:
        assert output.finish_reason == "stop"
        jsonschema.validate(json.loads(output.text), SCHEMA)
        assert output.outputs[0].finish is not None and (output.outputs[0].finish.jumped_tokens or 0) > 10
    assert all(len(output.token_ids) == 40 for output in outputs[48:])
    jsonschema.validate(json.loads(alone.text), SCHEMA)


def test_an_unsatisfied_limit_and_an_abort_leave_nothing_behind(gpu_checkpoint: Callable[[str], Path]) -> None:
    settings = {"device": "cuda", "dtype": "bfloat16", "kv_cache_tokens": 4096, "max_num_seqs": 16}
    with Engine(str(gpu_checkpoint("llama-gqa")), **settings) as engine:
        cut = engine.generate(["a", "b"], SamplingParams(json_schema=SCHEMA, max_tokens=9))
        assert [output.finish_reason for output in cut] == ["length", "length"]
        for _ in zip(engine.stream("c", SamplingParams(regex="[a-z]{500}", max_tokens=400)), range(3), strict=False):
            pass
        engine.check()
        assert engine.stats().running == 0
