"""Tests of a candidate against the champion that may be looked at after every request.

Requests either show a fault (an error, say) or do not. They are taken in blocks that hold some of both arms from the
same time. Let a and b be the rates of faults that champion and candidate have in a block (the means, if they change
within it), and d the tolerance. Two hypotheses are tested:

- harmless: b <= a + d in every block. Evidence against it rolls the candidate back.
- harmful: b >= a + d in every block. Evidence against it earns a step.

The evidence is an e-process: the product over blocks of a likelihood ratio

    E = L(p, q) / L(p0, q0),        L(a, b) = a^x (1 - a)^(m - x) b^y (1 - b)^(n - y)

for x faults in m requests of the champion and y in n of the candidate. The alternative (p, q) is guessed from earlier
blocks only; (p0, q0) is the point of the hypothesis that is nearest to it: least m KL(p, p0) + n KL(q, q0).

Turner, Ly and Grünwald (Generic E-variables for exact sequential k-sample tests that allow for optional stopping,
Journal of Statistical Planning and Inference 230, 2024) show that E is an e-variable for a = b; Turner and Grünwald
(Exact anytime-valid confidence intervals for contingency tables and beyond, Statistics and Probability Letters 198,
2023) for any closed convex hypothesis, as both here are. The proof is short and also covers rates that drift. A
request of the champion with rate a has a factor of mean 1 + g (a - p0), g = (p - p0) / (p0 (1 - p0)), one of the
candidate with rate b one of 1 + h (b - q0), h = (q - q0) / (q0 (1 - q0)). As 1 + z <= exp(z), E has a mean of at most
exp(m g (a - p0) + n h (b - q0)) with a and b the means of the block. (-m g, -n h) is the gradient of the divergence
at its least point on a convex set, so that the exponent is at most 0 for each (a, b) of the hypothesis.

So under the hypothesis the product is a nonnegative supermartingale. By Ville's inequality (Étude critique de la notion
de collectif, 1939) it ever reaches 1 / alpha with a chance of at most alpha, however often it is looked at. Nothing is
assumed of how rates change, or of the shares of the arms: what makes both arms slow at once is no evidence, and no
correction is due for stages. Assumed is that the requests of a block are independent of each other; where the arms
answer copies of one request, faults that come together only make E smaller on average.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """Requests, and how many of them show a fault."""

    n: int = 0
    k: int = 0

    def plus(self, other: "Counts") -> "Counts":
        """Both together."""
        return Counts(self.n + other.n, self.k + other.k)


NONE = Counts()
LIKE_CHAMPION = 30.0
"""Requests that the guess for harmful, a candidate like the champion, is worth. With more a healthy candidate earns its
steps sooner, and one that is a little worse, but within the tolerance, later."""
MEMORY = 500.0
"""Requests of the candidate that guesses rest on: a version that turns bad late is found as soon as others."""


@dataclass(frozen=True)
class Evidence:
    """What is known of one kind of fault."""

    champion: Counts = NONE
    candidate: Counts = NONE
    """Of this stage, in whole blocks."""
    recent: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """The same in one, and what is long past forgotten: requests and faults of the champion, then of the candidate."""
    waiting_champion: Counts = NONE
    waiting_candidate: Counts = NONE
    """Of a block that has only one arm yet."""
    log_harm: float = 0.0
    """Log of the e-value against harmless, of the whole roll-out."""
    log_safe: float = 0.0
    """Log of the e-value against harmful, of this stage."""

    def add(self, champion: Counts, candidate: Counts, tolerance: float) -> "Evidence":
        """With what both arms have seen in the same time."""
        m, x = champion = self.waiting_champion.plus(champion)
        n, y = candidate = self.waiting_candidate.plus(candidate)
        if not m or not n:
            return replace(self, waiting_champion=champion, waiting_candidate=candidate)
        recent = self.recent
        p = (recent[1] + 0.5) / (recent[0] + 1)
        harmful = (recent[3] + 0.5) / (recent[2] + 1)
        safe = (recent[3] + LIKE_CHAMPION * p) / (recent[2] + LIKE_CHAMPION)
        log_harm, log_safe = self.log_harm, self.log_safe
        # A guess that itself belongs to the hypothesis is its own nearest point: E is 1.
        if harmful > p + tolerance:
            log_harm += log_e(m, x, n, y, p, harmful, tolerance)
        if safe < p + tolerance:
            log_safe += log_e(m, x, n, y, p, safe, tolerance)
        keep = min(1.0, MEMORY / (recent[2] + n))
        return Evidence(
            self.champion.plus(champion),
            self.candidate.plus(candidate),
            (keep * (recent[0] + m), keep * (recent[1] + x), keep * (recent[2] + n), keep * (recent[3] + y)),
            log_harm=log_harm,
            log_safe=log_safe,
        )

    def next_stage(self) -> "Evidence":
        """A step must be earned anew; what speaks for harm stays."""
        return Evidence(log_harm=self.log_harm)

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Evidence":
        """What `dataclasses.asdict` has described, also by way of JSON."""
        counts = ("champion", "candidate", "waiting_champion", "waiting_candidate")
        return cls(
            **{**document, "recent": tuple(document["recent"]), **{name: Counts(*document[name]) for name in counts}}
        )


def log_e(m: int, x: int, n: int, y: int, p: float, q: float, tolerance: float) -> float:
    """log E of one block against the hypothesis that (p, q), both inside 0 to 1, does not belong to."""
    p0 = _nearest(m, n, p, q, tolerance)
    q0 = p0 + tolerance
    return (
        x * math.log(p / p0)
        + (m - x) * math.log((1 - p) / (1 - p0))
        + y * math.log(q / q0)
        + (n - y) * math.log((1 - q) / (1 - q0))
    )


def _nearest(m: int, n: int, p: float, q: float, d: float) -> float:
    """p0 of the point (p0, p0 + d) with the least m KL(p, p0) + n KL(q, p0 + d).

    It lies between p, the best for the champion alone, and q - d, the best for the candidate alone. There the
    derivative, times what makes it a polynomial, changes its sign once.
    """
    low, high = sorted((min(p, 1 - d), max(q - d, 0.0)))
    for _ in range(50):
        middle = (low + high) / 2
        if m * (middle - p) * (middle + d) * (1 - middle - d) + n * (middle + d - q) * middle * (1 - middle) > 0:
            high = middle
        else:
            low = middle
    return (low + high) / 2


def bounds(counts: Counts, alpha: float) -> tuple[float, float]:
    """Bounds of a rate that does not change: they hold at all times together with a chance of at least 1 - alpha.

    For people to look at: no step and no roll-back rests on them. Robbins' mixture over a uniform prior (Annals of
    Mathematical Statistics 41, 1970), as in Waudby-Smith and Ramdas, Confidence sequences for sampling without
    replacement (NeurIPS 2020): a rate is out where its prior is 1 / alpha times its posterior or more.
    """
    n, k = counts
    # log of the posterior's density without the rate's own part
    constant = math.lgamma(n + 2) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    def is_out(rate: float) -> bool:
        inside = (k * math.log(rate) if k else 0.0) + ((n - k) * math.log1p(-rate) if n > k else 0.0)
        return constant + inside <= math.log(alpha)

    def edge(outer: float, inner: float) -> float:
        for _ in range(40):
            middle = (outer + inner) / 2
            outer, inner = (middle, inner) if is_out(middle) else (outer, middle)
        return outer

    mean = k / n if n else 0.5
    return (edge(0.0, mean) if k else 0.0), (edge(1.0, mean) if k < n else 1.0)
