"""Names of replicas within the ids that they make, so that every router knows who made one."""

from __future__ import annotations

import hashlib
from base64 import urlsafe_b64decode

TAG_BYTES = 6
PIN = "pin-"  # before the id of a pin
_ID_BYTES = 24  # of a branch's or a pin's id: see `scheduler.branches.ids`


def instance_tag(name: str) -> bytes:
    """A replica's name within the ids that it makes: 6 bytes; none for an engine without a name."""
    return hashlib.blake2b(name.encode(), digest_size=TAG_BYTES).digest() if name else b""


def instance_of(id: str) -> bytes | None:
    """The tag of the replica that made a branch's or a pin's id; None if it is no such id. Of an engine without a name:
    random bytes."""
    text = id.removeprefix(PIN) if id.startswith(PIN) else id[1:]
    try:
        data = urlsafe_b64decode(text.encode("ascii"))
    except ValueError:  # also UnicodeEncodeError and binascii.Error
        return None
    return data[:TAG_BYTES] if len(data) == _ID_BYTES else None
