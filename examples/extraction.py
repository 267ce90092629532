"""Structured extraction: texts into JSON with given fields. The schema constrains the answer."""

import json

from accounting import show

import branchwise as bw

TEXTS = [
    "Hanno is 41 years old, works as a baker, lives in Zemol and owns a red cat.",
    "I met Ketil Ranor, who is 29, comes from Dorvan, is a pilot by trade and walks a white dog every day.",
    "Luma, aged 63, said hello, has a house in Brenk, works as a farmer and owns a black goat.",
]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "job": {"type": "string"}},
    "required": ["name", "age", "job"],
}


@bw.function
def extract(s, text):
    s += bw.user(f"Extract name, age and job as JSON.\n\nText: {text}")
    s += bw.assistant(bw.gen("json", max_tokens=60, json_schema=SCHEMA))
    return json.loads(s["json"])


def work() -> str:
    return "\n".join(f"  {state.ret_value}" for state in extract.run_batch(TEXTS, temperature=0))


if __name__ == "__main__":
    show("Structured extraction", work)
