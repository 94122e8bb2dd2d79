"""What the sentinel reads from the probe's figures."""

import math

import pytest

from jobs.ssl.sentinel import collapse_sign

UNTRAINED = {"embedding_spread": 0.14, "embedding_rank": 20.0, "projection_spread": 0.2, "projection_std": 0.02}
HEALTHY = {"embedding_spread": 0.45, "embedding_rank": 35.0, "projection_spread": 0.7, "projection_std": 0.1}


@pytest.mark.parametrize(
    ("figures", "holds_scale", "sign"),
    [
        ({}, True, None),
        ({"embedding_spread": math.nan, "embedding_rank": math.nan}, False, "the features are no numbers"),
        ({"embedding_spread": 0.01}, False, "all images have nearly the same features"),
        ({"embedding_rank": 1.1}, False, "the features have one direction left"),
        ({"projection_spread": 0.05}, False, "projections are more alike than untrained ones"),
        ({"projection_spread": 0.25}, False, "projections become alike"),
        ({"projection_std": 0.01}, True, "projections shrink to a point"),
        # Where the loss does not hold the scale, a small one means nothing.
        ({"projection_std": 0.01}, False, None),
    ],
)
def test_a_collapse_is_told_by_its_sign(figures: dict[str, float], holds_scale: bool, sign: str | None) -> None:
    told = collapse_sign([UNTRAINED, HEALTHY, HEALTHY | figures], holds_scale)
    assert told is None if sign is None else told is not None and told.startswith(sign)
