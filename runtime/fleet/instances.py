"""The replica's tag in the ids of its branches and pins: every router can tell which replica made an id."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64decode

TAG_BYTES = 6
PIN = "pin-"  # before the id of a pin
_ID_BYTES = 24  # of a branch's or a pin's id: see `scheduler.branches.ids`


def instance_tag(name: str) -> bytes:
    """The tag of a replica in its ids: 6 bytes of the digest of its name; empty for an engine without a name."""
    return hashlib.blake2b(name.encode(), digest_size=TAG_BYTES).digest() if name else b""


def instance_of(id: str) -> bytes | None:
    """The tag in the id of a branch or pin; None if it is no such id. Ids of an engine without a name have random bytes
    there."""
    text = id.removeprefix(PIN) if id.startswith(PIN) else id[1:]
    try:
        data = urlsafe_b64decode(text.encode("ascii"))
    except ValueError:  # also UnicodeEncodeError and binascii.Error
        return None
    return data[:TAG_BYTES] if len(data) == _ID_BYTES else None
