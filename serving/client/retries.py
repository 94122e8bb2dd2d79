"""When a request is sent again."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from cluster.errors import EndpointError
from serving.client.answers import Lost, NotReached, Reply

Outcome = Reply | EndpointError
"""What one try came to."""


@dataclass(frozen=True)
class Retries:
    """When a request is sent again. The same rules hold for every call of both clients.

    - 503, a connection that is refused, and 404 by a proxy that knows no endpoint yet: nothing has been begun. Again,
      up to `most` times; the last two until the deadline where the endpoint has answered this client before, since
      its proxy is then being started again.
    - 429: the same, if the answer names a time in `Retry-After` and that is at most `longest_wait_s`.
    - A connection lost on the way, or 502 or a 500 that is not the endpoint's, by which a proxy says the same: once
      more, since the request may have been what broke it. Nothing happens twice: a prediction changes nothing, a
      correction says the same again, and all tries carry the same `x-request-id`. Of a stream only the images that
      had no answer yet are asked for, as a request of their own. An order to a roll-out is not sent again.
    - Any other answer, and silence until the deadline: never.

    Before a try passes what `Retry-After` says (seconds or an HTTP date), and on top of it a back-off that doubles
    from `backoff_s` up to `longest_backoff_s`, drawn between a half and the whole of that. A call with all its tries
    keeps the client's `timeout_s`: a wait that would end later is not begun, and the last outcome is the call's.
    """

    most: int = 5
    """Tries after the first."""
    backoff_s: float = 0.1
    longest_backoff_s: float = 5.0
    longest_wait_s: float = 10.0
    """What a rate limit is waited out for."""


class Tries:
    """The tries of one request, which end at `deadline` on the clock of `time.monotonic`."""

    def __init__(
        self,
        rules: Retries,
        deadline: float,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        known: bool = False,
        once: bool = False,
    ) -> None:
        """`known`: the endpoint has answered before. `once`: what may have been carried out is not sent again."""
        self._rules = rules
        self._deadline = deadline
        self._clock = clock
        self._wall = wall
        self._known = known
        self._again = 0
        self._counted = 0
        self._lost = once

    def wait_s(self, outcome: Outcome) -> float | None:
        """How long to wait before the next try; None when there is none, and `outcome` is the call's."""
        status = outcome.status if isinstance(outcome, Reply) else None
        named = outcome.retry_after_s(self._wall) if isinstance(outcome, Reply) else None
        away = isinstance(outcome, NotReached) or (isinstance(outcome, Reply) and _knows_none(outcome))
        if isinstance(outcome, Lost) or (isinstance(outcome, Reply) and _says_lost(outcome)):
            again, self._lost = not self._lost, True
        elif status == 429:
            again = named is not None and named <= self._rules.longest_wait_s
        else:
            again = away or status == 503
        self._counted += not (away and self._known)
        if not again or self._counted > self._rules.most:
            return None
        backoff = min(self._rules.backoff_s * 2 ** min(self._again, 30), self._rules.longest_backoff_s)
        self._again += 1
        # A crowd that was refused in one moment must not come back in one.
        wait = (named or 0.0) + backoff * random.uniform(0.5, 1.0)
        return wait if self._clock() + wait < self._deadline else None


def _says_lost(reply: Reply) -> bool:
    """HAProxy, as Ray Serve sets it up, says 500 for what has no answer; the endpoint's own are JSON."""
    return reply.status == 502 or (reply.status == 500 and reply.refusal() is None)


def _knows_none(reply: Reply) -> bool:
    """Ray Serve's proxy names this path, and answers so for a moment after its start."""
    return reply.status == 404 and reply.refusal() is None and b"/-/routes" in reply.body
