"""Names of requests and of who asked.

A request id is a UUID of version 7 (RFC 9562): its first 48 bits are the Unix time in milliseconds, so that the hour in
whose files a request lies is known from its id. A client may send an id of its own, which then tells nothing.
"""

import hashlib
import os
import time
import uuid
from collections.abc import Callable

LAST_MS = 253_402_300_799_999
"""The end of the year 9999: no calendar goes on."""


def new_request_id(clock: Callable[[], float] = time.time) -> str:
    """A new id: 36 characters, of which the first ones grow with time."""
    bits = int(clock() * 1000) << 80 | int.from_bytes(os.urandom(10), "big")
    # The version, 7, and the variant, binary 10, have places of their own among the random bits.
    digits = f"{bits & ~(0xF << 76 | 0x3 << 62) | 0x7 << 76 | 0x2 << 62:032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def time_of(request_id: str) -> float | None:
    """When an id was made, Unix seconds; None for one that does not say."""
    try:
        parsed = uuid.UUID(request_id)
    except ValueError:
        return None
    milliseconds = parsed.int >> 80
    if parsed.version != 7 or milliseconds > LAST_MS:
        return None
    return milliseconds / 1000


def is_kept(request_id: str, share: float) -> bool:
    """Whether a request is among the `share` that is kept: every replica says the same, and a larger share holds all of
    a smaller one."""
    if share >= 1:
        return True
    digest = hashlib.blake2b(request_id.encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def pseudonym(who: str | None) -> str | None:
    """What is written of a user or key: the first 16 hexadecimal digits of its SHA-256."""
    return None if who is None else hashlib.sha256(who.encode(errors="replace")).hexdigest()[:16]
