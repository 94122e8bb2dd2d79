"""Does pre-training still learn? What tells a collapse, from figures of `jobs.ssl.probe`.

A collapse shows in the projections, which the loss compares, long before it shows in the backbone's features. The
thresholds were set by runs of every method, healthy ones and such as were made to collapse: `make bench-methods`.
"""

import math
from collections.abc import Mapping, Sequence

ALIKE = 0.5
"""Spread of the projections, of what it was in the untrained network; healthy runs stay above 0.9."""
FALLEN, LOW = 0.6, 0.3
"""Spread of the projections, of the largest that it was; it tells only below LOW, which learning runs pass in their
first epoch."""
SHRUNK = 0.5
"""Deviation of the projections, of the largest that it was, where the loss holds it to a figure."""
FLAT_RANK = 1.5
"""Effective rank of the backbone's features at which they have one direction."""
FLAT_SPREAD = 0.02
"""Spread of the backbone's features at which all images look the same."""


def collapse_sign(figures: Sequence[Mapping[str, float]], holds_scale: bool) -> str | None:
    """What shows that the features die, in words; None while nothing does.

    `figures` are the probe's of the untrained network and then of each epoch; `holds_scale` is the method's.
    """
    untrained, now = figures[0], figures[-1]
    if not math.isfinite(now["embedding_spread"]):
        return "the features are no numbers"
    if now["embedding_spread"] < FLAT_SPREAD:
        return f"all images have nearly the same features: embedding_spread {now['embedding_spread']:.3f}"
    if now["embedding_rank"] < FLAT_RANK < untrained["embedding_rank"]:
        return f"the features have one direction left: embedding_rank {now['embedding_rank']:.2f}"
    if "projection_spread" not in now:
        return None
    spread, first = now["projection_spread"], untrained["projection_spread"]
    peak = max(record["projection_spread"] for record in figures)
    if spread < ALIKE * first:
        return f"projections are more alike than untrained ones: projection_spread {spread:.3f}, untrained {first:.3f}"
    if spread < LOW and spread < FALLEN * peak:
        return f"projections become alike: projection_spread {spread:.3f}, {peak:.3f} before"
    deviation, largest = now["projection_std"], max(record["projection_std"] for record in figures)
    if holds_scale and deviation < SHRUNK * largest:
        return f"projections shrink to a point: projection_std {deviation:.3f}, {largest:.3f} before"
    return None
