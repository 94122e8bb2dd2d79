"""Pre-training for Prometheus: what the driver hears of its workers, as metrics (`cluster.metrics`)."""

from collections.abc import Mapping
from typing import Any

from cluster.metrics import FAMILIES, Metrics
from jobs.data.order import Order

PARTS = ("compute", "all_reduce", "input")
"""What the time of a step goes to, in the order in which worker 0 tells it; input is the wait for its images."""


class PretrainMetrics:
    """Counts the events of the workers, from the beginning of an attempt; each comes from one thread."""

    def __init__(self, metrics: Metrics, order: Order, remedies: int) -> None:
        """`order` is that of the training images, `remedies` how often the run went back before."""
        self._metrics, self._order = metrics, order
        self._step = self._begins = self._lost = 0
        self._timed: tuple[int, list[float]] = (0, [0.0] * len(PARTS))
        """The step up to which times are known, and these, s, since the workers began."""
        for name, value in (("remedies", remedies), ("restarts", 0), ("checkpoints_lost", 0)):
            metrics.set(f"helio_pretrain_{name}", value)

    def add(self, kind: str, step: int, event: Mapping[str, Any]) -> None:
        """What a worker has told at a step."""
        if kind == "began":
            self._begin(step, event["workers"])
        elif kind == "step":
            self._go_on(step)
            self._time(step, event["spent_s"])
            self._metrics.set("helio_pretrain_loss", event["loss"])
        elif kind == "epoch":
            self._go_on(step)
            for name, value in event.items():
                if (metric := f"helio_pretrain_{name}") in FAMILIES:
                    self._metrics.set(metric, value)
        elif kind == "checkpoint":
            self._checkpoint(event["seconds"])

    def _begin(self, step: int, workers: int) -> None:
        """All workers begin, or begin again, at `step`."""
        self._metrics.set("helio_pretrain_restarts", self._begins)
        self._begins += 1
        self._metrics.set("helio_pretrain_workers", workers)
        self._step, self._timed = step, (step, [0.0] * len(PARTS))
        self._go_on(step)

    def _go_on(self, step: int) -> None:
        self._metrics.count("helio_pretrain_images_total", (step - self._step) * self._order.global_batch_size)
        self._step = step
        self._metrics.set("helio_pretrain_step", step)
        self._metrics.set("helio_pretrain_epoch", self._order.epoch_of(step))

    def _time(self, step: int, spent_s: list[float]) -> None:
        (known, before_s), self._timed = self._timed, (step, spent_s)
        if step == known:
            return
        for part, now, before in zip(PARTS, spent_s, before_s, strict=True):
            self._metrics.set("helio_pretrain_step_seconds", (now - before) / (step - known), part=part)
        self._metrics.count("helio_pretrain_data_wait_seconds_total", spent_s[-1] - before_s[-1])

    def _checkpoint(self, seconds: float | None) -> None:
        if seconds is None:
            self._lost += 1
            self._metrics.set("helio_pretrain_checkpoints_lost", self._lost)
        else:
            self._metrics.count("helio_pretrain_checkpoints_total")
            self._metrics.set("helio_pretrain_checkpoint_seconds", seconds)
