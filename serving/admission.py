"""Whether a request gets in: what a key is good for, what it has used, and the answer to whoever is refused."""

import hashlib
import hmac
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

SCOPES = ("predict", "feedback", "status", "admin")
"""What a key may be good for. None includes another."""
PERIODS = {"day": "a day", "month": "a month", "total": "in total"}
"""What a quota counts over. Days and months begin at 00:00 UTC."""
DAY_S = 86_400
TOLERANCE = 1e-6
"""Of a request: so much may lack in the bucket, because a clock's floats are that coarse. It is owed, not given."""
_SEND = "send it in the header `Authorization: Bearer helio_…`"
_ASK_FOR_NEW = "ask whoever runs the endpoint for a new one"


@dataclass(frozen=True)
class Rate:
    """Requests that a key may send: a bucket that holds `burst` and gains `per_s` each second."""

    per_s: float
    burst: int

    def __str__(self) -> str:
        return f"{self.per_s:g}/s, {self.burst:,} at once"


@dataclass(frozen=True)
class Quota:
    """Images that a key may send in each period, one of PERIODS."""

    images: int
    per: str

    def __str__(self) -> str:
        return f"{self.images:,} images {PERIODS[self.per]}"

    def period(self, now: float) -> tuple[float, float]:
        """Start and end of the period that runs at `now`, Unix seconds."""
        if self.per == "total":
            return 0.0, math.inf
        if self.per == "day":
            start = now // DAY_S * DAY_S
            return start, start + DAY_S
        first = datetime.fromtimestamp(now, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        return first.timestamp(), (first + timedelta(days=31)).replace(day=1).timestamp()


UNLIMITED = Quota(0, "total")
"""Stands for no quota where only its period matters: what such a key uses is counted all the same."""


@dataclass(frozen=True)
class Key:
    """One key, without its secret. All times are Unix seconds."""

    id: str
    name: str
    scopes: tuple[str, ...]
    created: float
    created_by: str
    expires: float | None
    """From then on it is refused."""
    rate: Rate | None
    quota: Quota | None
    used: int
    """Images, in the quota's period that runs now; ever, where there is no quota."""
    revoked: float | None = None
    revoked_by: str | None = None
    revoked_why: str | None = None

    def __str__(self) -> str:
        return f"key {self.id} ({self.name})"

    def state(self, now: float) -> str:
        """`active`, `expired` or `revoked`."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and now >= self.expires else "active"


@dataclass(frozen=True)
class Ask:
    """A request that wants in."""

    secret: str | None = field(repr=False)
    """What came behind `Authorization: Bearer `, None where nothing did."""
    scope: str
    images: int = 0

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"images must not be negative, got {self.images}")


@dataclass(frozen=True)
class Admission:
    """Whether a request gets in, and what to answer where it does not."""

    granted: bool
    status: int
    """200, 401, 403 or 429, as HTTP has them."""
    code: str
    message: str
    """What to do, for whoever has asked."""
    at: float
    """When it was decided, Unix seconds."""
    retry_after_s: float | None = None
    """The same request may get in after that long; None where waiting does not help."""
    key_id: str | None = None
    name: str | None = None
    remaining: int | None = None
    """Images left of the quota; None where there is none."""


class Account:
    """What a key has used, less what time has given back until `now`."""

    def __init__(self, key: Key, digest: bytes, since: float, tokens: float, filled: float, now: float) -> None:
        """`key.used` counts from `since`, the start of a period; the bucket held `tokens` at the time `filled`."""
        self.key, self.digest = key, digest
        # A clock that was set back neither begins a period again nor fills the bucket.
        self.since, self.until = (key.quota or UNLIMITED).period(max(now, since))
        self.used = key.used if self.since == since else 0
        self.tokens = tokens
        if key.rate:
            self.tokens = min(key.rate.burst, tokens + max(0.0, now - filled) * key.rate.per_s)
        self.changed = now < filled
        """Whether it has to be written."""

    @property
    def remaining(self) -> int | None:
        """Images left of the quota."""
        return self.key.quota.images - self.used if self.key.quota else None

    def decide(self, ask: Ask, now: float) -> Admission:
        """Let a request with the right secret in, and take what it uses, or refuse it and take nothing."""
        key, left = self.key, self.remaining
        if key.revoked is not None:
            return self._refuse(now, 401, "revoked_key", f"was revoked on {moment(key.revoked)}: {_ASK_FOR_NEW}")
        if key.expires is not None and now >= key.expires:
            return self._refuse(now, 401, "expired_key", f"expired on {moment(key.expires)}: {_ASK_FOR_NEW}")
        if ask.scope not in key.scopes:
            scopes = ", ".join(key.scopes)
            message = f"is good for {scopes}, and this request needs {ask.scope}: use a key with that scope"
            return self._refuse(now, 403, "missing_scope", message)
        if key.quota and left is not None and ask.images > left:
            return self._refuse_images(now, ask.images, key.quota, left)
        if key.rate and self.tokens < 1 - TOLERANCE:
            wait_s = (1 - self.tokens) / key.rate.per_s
            return self._refuse(now, 429, "rate_limited", f"may send {key.rate}: wait {wait_s:.3g} s", wait_s)
        self.used += ask.images
        self.tokens -= 1 if key.rate else 0
        self.changed = True
        return Admission(True, 200, "granted", "", now, None, key.id, key.name, self.remaining)

    def _refuse(
        self, now: float, status: int, code: str, message: str, retry_after_s: float | None = None
    ) -> Admission:
        key = self.key
        return Admission(False, status, code, f"{key} {message}", now, retry_after_s, key.id, key.name, self.remaining)

    def _refuse_images(self, now: float, images: int, quota: Quota, left: int) -> Admission:
        ends, fits = self.until < math.inf, images <= quota.images
        wait = f"wait until {moment(self.until)}" if ends else _ASK_FOR_NEW
        if ends and not fits:
            wait += f" and send at most {quota.images:,}"
        mend = f"send at most {left:,}, or {wait}" if left else wait
        message = f"has {left:,} left of its {quota}, and the request has {images:,}: {mend}"
        return self._refuse(now, 429, "quota_exceeded", message, self.until - now if ends and fits else None)


def decide(ask: Ask, account: Account | None, now: float) -> Admission:
    """Decide on a request; `account` is of the key that its secret names, None where there is no such key."""
    if ask.secret is None:
        message = f"this endpoint wants a key: {_SEND}; whoever runs the endpoint can make one"
        return Admission(False, 401, "no_key", message, now)
    # The time that this takes does not tell a wrong id from a wrong secret, nor how much of a secret is right.
    right = hmac.compare_digest(account.digest if account else bytes(32), digest_of(ask.secret))
    if account is None or not right:
        return Admission(False, 401, "unknown_key", f"the endpoint does not know this key: {_SEND}, all of it", now)
    return account.decide(ask, now)


def bearer(authorization: str) -> str | None:
    """The secret in the header `Authorization`."""
    kind, _, secret = authorization.partition(" ")
    return secret.strip() if kind.lower() == "bearer" else None


def digest_of(secret: str) -> bytes:
    """What is kept of a secret."""
    # A slow, salted hash guards passwords, which can be guessed. 256 random bits cannot, however fast the hash is; and
    # it is computed for each request.
    return hashlib.sha256(secret.encode(errors="replace")).digest()


def moment(when: float) -> str:
    """A Unix time for a reader."""
    return f"{datetime.fromtimestamp(when, UTC):%Y-%m-%d %H:%M:%S} UTC"
