"""What the cache did for whom: sums by key and by namespace."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from ....radix.node import Namespace
from ...messages import CacheReport

MAX_NAMESPACES = 4096  # those whose requests came last are remembered one by one; a key's own sums are never dropped
MAX_SHOWN = 256


class ReasonSum(msgspec.Struct):
    """Requests whose reuse ended for one reason: what they reused, and what they had to compute."""

    requests: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0


class Account(msgspec.Struct):
    """Prompts' tokens. ``reasons`` add up to the rest, but that what was computed uncached is not written."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    reasons: dict[str, ReasonSum] = {}

    def add(self, prompt_tokens: int, report: CacheReport) -> None:
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += report.hit_tokens
        self.cache_write_tokens += report.write_tokens
        reason = self.reasons.setdefault(report.reason, ReasonSum())
        reason.requests += 1
        reason.cached_tokens += report.hit_tokens
        reason.computed_tokens += prompt_tokens - report.hit_tokens

    def facts(self) -> dict[str, Any]:
        rate = self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
        return {"hit_rate": rate, **msgspec.to_builtins(self)}


class Accounts:
    """Every request is counted once, when its first chunk is scheduled. Keys are few: the server's own list."""

    def __init__(self) -> None:
        self.total = Account()
        self._owners: dict[str, Account] = {}
        self._namespaces: OrderedDict[Namespace, Account] = OrderedDict()  # the last to be used at the end

    def add(self, namespace: Namespace, prompt_tokens: int, report: CacheReport, *, no_cache: bool) -> None:
        """``no_cache``: of a request that shares nothing, whose namespace nobody will ask for."""
        accounts = [self.total, self._owners.setdefault(namespace[0], Account())]
        if not no_cache:
            accounts.append(self._namespaces.setdefault(namespace, Account()))
            self._namespaces.move_to_end(namespace)
            if len(self._namespaces) > MAX_NAMESPACES:
                self._namespaces.popitem(last=False)
        for account in accounts:
            account.add(prompt_tokens, report)

    def owner(self, owner: str) -> Account:
        return self._owners.get(owner) or Account()

    def namespaces(self, owner: str | None) -> list[dict[str, Any]]:
        """The owner's (None: everybody's) namespaces, the last used first."""
        shown: list[dict[str, Any]] = []
        for (whose, salt), account in reversed(self._namespaces.items()):
            if owner is None or whose == owner:
                shown.append({**({"owner": whose} if owner is None else {}), "salt": salt, **account.facts()})
                if len(shown) == MAX_SHOWN:
                    break
        return shown
