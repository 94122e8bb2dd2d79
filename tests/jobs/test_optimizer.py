"""Learning rates over the steps of a training."""

import math

import pytest
import ray

from jobs.training.config import PretrainConfig
from jobs.training.optimizer import scaled_rate

STEPS, WARMUP, PEAK = 100, 10, 0.5


def _rates(kind: str, warmup: int) -> list[float]:
    from jobs.training.schedule import learning_rates

    return learning_rates(kind, PEAK, STEPS, warmup).tolist()


def _read() -> list[float]:
    """What an optimizer reads in steps 0, 19, 20, 24, 29 and after the last, of rates that were remedied at 20."""
    from jobs.training.schedule import Tabulated, learning_rates, remedied

    schedule = Tabulated(remedied(learning_rates("constant", PEAK, 30, 0), [(20, 0.5, 10), (25, 0.5, 0)]))
    return [float(schedule(step)) for step in (0, 19, 20, 24, 29, 99)]


@pytest.mark.parametrize("warmup", [0, WARMUP])
def test_rates_rise_to_the_peak_and_fall_as_the_schedule_says(ray_cluster: None, warmup: int) -> None:
    remote = ray.remote(num_cpus=0.5)(_rates)
    kinds = ("constant", "linear", "cosine", "one_cycle")
    rates = dict(zip(kinds, ray.get([remote.remote(kind, warmup) for kind in kinds]), strict=True))
    for kind in ("constant", "linear", "cosine"):
        assert rates[kind][warmup] == pytest.approx(PEAK)
        assert rates[kind][:warmup] == pytest.approx([PEAK * step / WARMUP for step in range(warmup)])
    half = warmup + (STEPS - warmup) // 2
    assert {kind: rates[kind][half] / PEAK for kind in kinds[:3]} == pytest.approx(
        {"constant": 1.0, "linear": 0.5, "cosine": 0.5}
    )
    # The step after the last would have none left.
    left = {"linear": 1 / (STEPS - warmup)}
    left |= {kind: (1 - math.cos(math.pi / n)) / 2 for kind, n in (("cosine", STEPS - warmup), ("one_cycle", 70))}
    assert {kind: rates[kind][-1] / PEAK for kind in kinds} == pytest.approx({"constant": 1.0, **left}, abs=1e-6)
    assert max(rates["one_cycle"]) == pytest.approx(PEAK)
    assert rates["one_cycle"].index(max(rates["one_cycle"])) == 30
    assert rates["one_cycle"][0] == pytest.approx(PEAK / 25)


def test_a_remedy_lowers_what_is_left_and_rises_to_it(ray_cluster: None) -> None:
    read = ray.get(ray.remote(num_cpus=0.5)(_read).remote())
    assert read == pytest.approx([PEAK, PEAK, PEAK * 0.05, PEAK * 0.25, PEAK * 0.25, PEAK * 0.25])


def test_the_rate_grows_with_the_batch_where_the_recipe_says_what_it_was_meant_for() -> None:
    def rate(optimizer: str, reference: int | None) -> float:
        config = {"optimizer": optimizer, "learning_rate": 0.1, "global_batch_size": 1024}
        return scaled_rate(PretrainConfig(**config, reference_batch_size=reference))

    assert [rate(optimizer, None) for optimizer in ("sgd", "lars", "adamw", "lamb")] == [0.1] * 4
    assert [rate(optimizer, 256) for optimizer in ("sgd", "lars")] == pytest.approx([0.4] * 2)
    assert [rate(optimizer, 256) for optimizer in ("adamw", "lamb")] == pytest.approx([0.2] * 2)
