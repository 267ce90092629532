"""The JSON schemas of pydantic's field types: outputs validate as the model, or the schema is refused by its path."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import ipaddress
import json
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Optional, Union

import jsonschema
import pydantic
import pytest
from pydantic import Field, create_model

from branchwise.runtime.constraint import ConstraintError


class Colour(enum.Enum):
    RED = "red"
    TWO = 2


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Point(NamedTuple):
    x: int
    y: float


class Cat(pydantic.BaseModel):
    kind: Literal["cat"]
    lives: int = Field(ge=0, le=9)


class Dog(pydantic.BaseModel):
    kind: Literal["dog"]
    name: str | None = None


class Node(pydantic.BaseModel):
    value: int
    children: list[Node] = []


Text = Annotated[str, Field(max_length=6)]
Price = Annotated[decimal.Decimal, Field(max_digits=5, decimal_places=2)]

SERVED: list[Any] = [
    *[str, int, float, bool, None, bytes, list, list[int], tuple[int, str], tuple[int, ...], Sequence[int]],
    *[dict, dict[str, int], dict[int, str], dict[Literal["a", "b"], int], dict[Colour, int], Mapping[str, float]],
    *[dict[Annotated[str, Field(pattern="^x[0-9]+$")], int], dict[Annotated[str, Field(max_length=3)], int]],
    *[collections.deque[int], collections.OrderedDict[str, int], collections.Counter[str], Point],
    *[Optional[int], Union[int, str], Literal["a", 1, None], Any, object, Colour, Level, pydantic.JsonValue],  # noqa: UP007, UP045
    *[pathlib.Path, pydantic.NewPath, pydantic.SecretStr, pydantic.SecretBytes, pydantic.ImportString],
    *[datetime.datetime, datetime.date, datetime.time, datetime.timedelta, pydantic.AwareDatetime],
    *[decimal.Decimal, Price, fractions.Fraction],
    *[uuid.UUID, pydantic.UUID4, pydantic.AnyUrl, pydantic.HttpUrl, pydantic.FileUrl, pydantic.PostgresDsn],
    *[ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network],
    *[ipaddress.IPv4Interface, pydantic.IPvAnyAddress, pydantic.IPvAnyNetwork, pydantic.Base64Str],
    *[pydantic.Base64Bytes, pydantic.Base64UrlStr, re.Pattern, pydantic.Json, pydantic.ByteSize, complex],
    *[pydantic.conint(gt=0, lt=10, multiple_of=3), pydantic.confloat(ge=0, allow_inf_nan=False)],
    *[pydantic.constr(min_length=1, max_length=5, pattern="^[a-z]+$"), pydantic.conlist(int, min_length=1)],
    *[pydantic.PositiveInt, pydantic.StrictBool, Annotated[Cat | Dog, Field(discriminator="kind")], Cat | Dog, Node],
]

# What their JSON schemas do not say: a format that llguidance does not know is an annotation, and some have no format.
LOOSE_FORMATS = frozenset(
    {"binary", "path", "uuid4", "multi-host-uri", "base64", "base64url", "regex", "json-string", "fraction"}
    | {"ipv4network", "ipv6network", "ipv4interface", "ipvanyaddress", "ipvanynetwork", "duration", "uri"}
)
LOOSE: list[Any] = [
    dict[int, str],
    decimal.Decimal,
    Price,
    pydantic.Json,
    pydantic.ByteSize,
    pydantic.ImportString,
    complex,
]
REFUSED: list[tuple[Any, str]] = [
    (set[int], "uniqueItems"),
    (frozenset[Text], "uniqueItems"),
    (pydantic.conset(int, min_length=1, max_length=3), "uniqueItems"),
    (dict[uuid.UUID, int], "propertyNames"),
    (dict[datetime.date, int], "propertyNames"),
]


@pytest.mark.parametrize("type", SERVED, ids=[re.sub(r"[^\w.,\[\]]+", "-", str(type))[:60] for type in SERVED])
def test_a_field_of_this_type_is_served(compiled: Any, type: Any) -> None:
    model = create_model("Model", f=(type, ...))
    schema = model.model_json_schema()
    grammar = compiled.compile(schema)
    texts = [text for seed in range(8) if (text := compiled.write(grammar, seed, most=300)) is not None]
    assert texts
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        if type not in LOOSE and not any(f"'format': '{format}'" in str(schema) for format in LOOSE_FORMATS):
            model.model_validate_json(text)


@pytest.mark.parametrize(("type", "keyword"), REFUSED, ids=[str(type)[:50] for type, _ in REFUSED])
def test_a_field_of_this_type_is_refused_by_its_path(compiled: Any, type: Any, keyword: str) -> None:
    schema = create_model("Model", f=(type, ...)).model_json_schema()
    with pytest.raises(ConstraintError, match=rf"uses {keyword} at properties\.f\.{keyword}, which cannot be enforced"):
        compiled.compile(schema)
    outer = create_model("Outer", inner=(list[create_model("Inner", f=(type, ...))], ...)).model_json_schema()
    with pytest.raises(ConstraintError, match=rf"uses {keyword} at \$defs\.Inner\.properties\.f\.{keyword}"):
        compiled.compile(outer)
