"""Typed access to the values of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import LoadError


class Fields:
    """Typed access to a config's values; every error names the file and the key."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def count(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if value is None:
            raise LoadError(f"{self.where}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise LoadError(f"{self.where}: {key} must be a positive integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise LoadError(f"{self.where}: {key} must be a positive number, got {value!r}")
        return value

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)
