"""Does pre-training still learn? What tells a collapse, from figures of `jobs.ssl.probe`."""

from collections.abc import Mapping

ALIKE, SHRUNK = 0.5, 0.5
"""Against the untrained network: the spread of what the loss compares, and its deviation."""
NARROW = 0.3
"""Spread below which projections that also shrink are dying; learning ones passed 0.5 in their first epoch."""
FLAT_RANK = 1.5
"""Effective rank of the backbone's features at which they have one direction."""
FLAT_SPREAD = 0.02
"""Spread of the backbone's features at which all images look the same."""


def collapse_sign(untrained: Mapping[str, float], now: Mapping[str, float]) -> str | None:
    """What shows that the features die, in words; None while nothing does.

    A collapse shows first in the projections, which the loss compares, and much later in the backbone.
    """
    spread, rank = now["embedding_spread"], now["embedding_rank"]
    if spread < FLAT_SPREAD:
        return f"all images have nearly the same features: embedding_spread {spread:.3f}"
    if rank < FLAT_RANK < untrained["embedding_rank"]:
        return f"the features have one direction left: embedding_rank {rank:.2f}"
    if "projection_spread" not in now:
        return None
    spread, before = now["projection_spread"], untrained["projection_spread"]
    if spread < ALIKE * before:
        return f"projections are more alike than untrained ones: projection_spread {spread:.3f}, untrained {before:.3f}"
    deviation, before = now["projection_std"], untrained["projection_std"]
    if spread < NARROW and deviation < SHRUNK * before:
        return (
            f"projections shrink to one point: projection_std {deviation:.3f}, untrained {before:.3f}, "
            f"projection_spread {spread:.3f}"
        )
    return None
