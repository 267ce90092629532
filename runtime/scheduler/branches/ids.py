"""Branch ids: unguessable, and recognisable as made by this server without a list of them (404 or 410)."""

from __future__ import annotations

import hashlib
import hmac
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode

from ...fleet.instances import instance_tag

_NONCE, _PROOF = 12, 12  # bytes: each 16 characters


class BranchIds:
    """An id is a random nonce and its keyed digest, with the owner's name. Of an engine with a name among replicas, the
    nonce begins with its tag (`fleet.instances`)."""

    def __init__(self, instance: str = "") -> None:
        self._key = os.urandom(32)
        self._tag = instance_tag(instance)

    def make(self, owner: str, n: int) -> list[str]:
        size = _NONCE - len(self._tag)
        noise = os.urandom(size * n)
        nonces = (self._tag + noise[i : i + size] for i in range(0, len(noise), size))
        return ["b" + urlsafe_b64encode(nonce + self._proof(nonce, owner)).decode() for nonce in nonces]

    def made(self, id: str, owner: str) -> bool:
        """Whether `make` ever made this id for this owner."""
        try:
            data = urlsafe_b64decode(id[1:].encode("ascii"))
        except ValueError:  # also UnicodeEncodeError and binascii.Error
            return False
        return hmac.compare_digest(data[_NONCE:], self._proof(data[:_NONCE], owner)) and id[:1] == "b"

    def _proof(self, nonce: bytes, owner: str) -> bytes:
        return hashlib.blake2b(nonce + owner.encode(), digest_size=_PROOF, key=self._key).digest()
