"""Sums of cache reuse, by API key and by namespace."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

from ....radix.node import Namespace
from ...messages import CacheReport

MAX_NAMESPACES = 4096  # the least recently used are dropped beyond this; a key's own sums never are
MAX_SHOWN = 256


class ReasonSum(msgspec.Struct):
    """Requests whose reuse ended for one reason: tokens reused and tokens computed."""

    requests: int = 0
    cached_tokens: int = 0
    computed_tokens: int = 0


class Account(msgspec.Struct):
    """Sums over prompts, in tokens. ``cache_write_tokens`` leaves out what was computed with the cache off; the other
    sums are those of ``reasons`` together."""

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
    """Counts every request once, when its first chunk is scheduled. The server's list bounds the number of keys."""

    def __init__(self) -> None:
        self.total = Account()
        self._owners: dict[str, Account] = {}
        self._namespaces: OrderedDict[Namespace, Account] = OrderedDict()  # least recently used first

    def add(self, namespace: Namespace, prompt_tokens: int, report: CacheReport, *, no_cache: bool) -> None:
        """``no_cache``: the request has a namespace of its own, which is not recorded."""
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
        """Namespaces of ``owner`` (None: of all), most recently used first, at most `MAX_SHOWN`."""
        shown: list[dict[str, Any]] = []
        for (whose, salt), account in reversed(self._namespaces.items()):
            if owner is None or whose == owner:
                shown.append({**({"owner": whose} if owner is None else {}), "salt": salt, **account.facts()})
                if len(shown) == MAX_SHOWN:
                    break
        return shown
