"""The tests of a roll-out hold what they promise: exactly for one block, and at every look for many."""

from itertools import product
from math import comb, exp, log

import numpy as np
import pytest

from serving.rollout.sequential import Counts, Evidence, bounds, log_e

GUESSES = [(0.01, 0.2), (0.02, 0.9), (0.3, 0.5), (0.95, 0.999), (0.0004, 0.0007), (0.1, 0.1), (0.6, 0.05)]
TOLERANCES = [0.02, 0.1, 0.25]


def binomial(n: int, k: int, rate: float) -> float:
    return comb(n, k) * rate**k * (1 - rate) ** (n - k)


def mean_e(m: int, n: int, a: float, b: float, p: float, q: float, tolerance: float) -> float:
    """E's mean, exactly, over all outcomes of a block."""
    return sum(
        binomial(m, x, a) * binomial(n, y, b) * exp(log_e(m, x, n, y, p, q, tolerance))
        for x, y in product(range(m + 1), range(n + 1))
    )


@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (7, 1), (99, 1), (3, 5), (1, 40)])
def test_no_hypothesis_that_holds_is_expected_to_lose(m: int, n: int, tolerance: float) -> None:
    for p, q in GUESSES:
        harmful = q > p + tolerance
        for a in np.linspace(0, 1, 11):
            for b in np.linspace(0, 1, 11):
                if (b <= a + tolerance) if harmful else (b >= a + tolerance):
                    assert mean_e(m, n, a, b, p, q, tolerance) <= 1 + 1e-9
        # On the border the test gives nothing away.
    edge = mean_e(m, n, 0.1, 0.1 + tolerance, 0.1, 0.5, tolerance)
    assert 0.5 < edge <= 1 + 1e-9


def test_what_a_guess_foresees_is_expected_to_win() -> None:
    for p, q in GUESSES:
        if abs(q - p - 0.02) > 0.01:
            assert mean_e(5, 5, p, q, p, q, 0.02) > 1


def test_rates_that_drift_within_a_block_are_no_evidence() -> None:
    """Both arms go from 5 % to 90 % in the middle of a block, one request earlier or later."""
    calm, storm, tolerance = 0.05, 0.9, 0.1
    for p, q in [(0.05, 0.3), (0.05, 0.05), (0.3, 0.6)]:
        total = 0.0
        for outcome in product((0, 1), repeat=8):
            rates = [calm, calm, storm, storm] * 2
            if q < p + tolerance:
                rates[4:] = [calm + tolerance, calm + tolerance, 1.0, 1.0]
            chance = np.prod([rate if k else 1 - rate for rate, k in zip(rates, outcome, strict=True)])
            total += float(chance) * exp(log_e(4, sum(outcome[:4]), 4, sum(outcome[4:]), p, q, tolerance))
        assert total <= 1 + 1e-9


def test_copies_that_fail_together_are_no_evidence() -> None:
    """Both arms get the same images, and fail at the same ones."""
    for p, q in [(0.01, 0.2), (0.05, 0.3)]:
        for rate in (0.01, 0.2, 0.5, 0.9):
            together = sum(binomial(6, k, rate) * exp(log_e(6, k, 6, k, p, q, 0.02)) for k in range(7))
            assert together <= 1 + 1e-9


@pytest.mark.parametrize(("a", "tolerance", "per_candidate"), [(0.0, 0.05, 1), (0.05, 0.10, 9), (0.3, 0.10, 1)])
def test_at_the_tolerance_both_errors_stay_below_alpha_at_every_look(
    a: float, tolerance: float, per_candidate: int
) -> None:
    """The candidate is exactly as much worse as it may be: neither harm nor its absence may be found too often."""
    rng = np.random.default_rng(7)
    alpha, paths, looks = 0.1, 200, 250
    harm = safe = 0
    for _ in range(paths):
        evidence = Evidence()
        xs = rng.binomial(per_candidate, a, looks)
        ys = rng.binomial(1, a + tolerance, looks)
        most_harm = most_safe = 0.0
        for x, y in zip(xs.tolist(), ys.tolist(), strict=True):
            evidence = evidence.add(Counts(per_candidate, x), Counts(1, y), tolerance)
            most_harm, most_safe = max(most_harm, evidence.log_harm), max(most_safe, evidence.log_safe)
        harm += most_harm >= log(1 / alpha)
        safe += most_safe >= log(1 / alpha)
    # 200 paths of a chance of 0.1 are above 32 once in 500 times.
    assert harm <= 32
    assert safe <= 32


def test_a_block_waits_for_both_arms() -> None:
    alone = Evidence().add(Counts(50, 1), Counts(), 0.02).add(Counts(49, 0), Counts(), 0.02)
    assert alone.log_harm == alone.log_safe == 0
    assert alone.champion == Counts()
    both = alone.add(Counts(), Counts(1, 0), 0.02)
    assert both == Evidence().add(Counts(99, 1), Counts(1, 0), 0.02)
    assert both.champion == Counts(99, 1)


def test_harm_is_remembered_and_safety_is_not() -> None:
    evidence = Evidence()
    for _ in range(10):
        evidence = evidence.add(Counts(5, 0), Counts(1, 1), 0.02)
    assert evidence.log_harm > 10
    later = evidence.next_stage()
    assert later.log_harm == evidence.log_harm
    assert later.log_safe == 0
    assert later.candidate == Counts()


def test_bounds_hold_at_all_times_together() -> None:
    rng = np.random.default_rng(3)
    missed = 0
    for _ in range(100):
        seen = np.cumsum(rng.random(60) < 0.1)
        missed += any(
            not low <= 0.1 <= high for low, high in (bounds(Counts(n, int(k)), 0.1) for n, k in enumerate(seen, 1))
        )
    assert missed <= 18  # 100 of a chance of 0.1 are above 18 once in 200 times.


def test_bounds_close_in_on_the_rate() -> None:
    assert bounds(Counts(), 0.05) == (0.0, 1.0)
    low, high = bounds(Counts(1000, 100), 0.05)
    assert 0.06 < low < 0.1 < high < 0.15
    assert bounds(Counts(500, 0), 0.05)[0] == 0
    assert bounds(Counts(500, 0), 0.05)[1] == pytest.approx(1 - (0.05 / 501) ** (1 / 500), rel=1e-6)
    assert bounds(Counts(500, 500), 0.05)[1] == 1
