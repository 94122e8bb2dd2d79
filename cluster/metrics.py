"""What a run counts for Prometheus, published through Ray's own metrics from the driver.

Every node's agent exports what processes on it have recorded (`cluster.monitoring` says where, and who reads it), each
name with `ray_` before it, which the scrape configuration takes off again. A gauge is there while its stage runs; a
counter stays until its node goes. Ray sends what was recorded every ten seconds, and the last of it as the driver
ends. Where nobody gathers metrics, as with a Ray on this machine, recording does nothing, and takes a few microseconds.
"""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

OF_ALL = ("run", "recipe")
"""Labels that every metric has."""
AGAIN_S = 5.0
"""Ray forgets a gauge that was not set for twenty seconds, and an epoch may take hours."""
EPOCH_BUCKETS_S = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


@dataclass(frozen=True)
class Family:
    """A metric: what it is, and the names of its labels beside those of all."""

    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


FAMILIES = {
    "helio_stage_running": Family("gauge", "1 while a stage runs, then 0 for a moment.", ("stage",)),
    "helio_stages_total": Family(
        "counter", "Stages that have ended: finished, failed or interrupted.", ("stage", "outcome")
    ),
    "helio_ingest_images_total": Family("counter", "Images of the source that were read, also by an ingest before."),
    "helio_ingest_rejected_total": Family("counter", "Images of the source that were refused.", ("reason",)),
    "helio_ingest_written_total": Family("counter", "Images written into shards, also by an ingest before."),
    "helio_pretrain_images_total": Family("counter", "Images that all workers have trained on."),
    "helio_pretrain_data_wait_seconds_total": Family("counter", "Time that worker 0 has waited for images."),
    "helio_pretrain_step_seconds": Family(
        "gauge", "Time of a step at worker 0 by what it goes to: compute, all_reduce, input.", ("part",)
    ),
    "helio_pretrain_workers": Family("gauge", "Workers that train."),
    "helio_pretrain_restarts": Family("gauge", "How often all workers have begun again after a loss."),
    "helio_pretrain_remedies": Family("gauge", "How often the run went back with a lower learning rate."),
    "helio_pretrain_step": Family("gauge", "Steps that are done."),
    "helio_pretrain_epoch": Family("gauge", "Epochs that are done, with the part of the one under way."),
    "helio_pretrain_loss": Family("gauge", "Mean loss of the epoch so far."),
    "helio_pretrain_learning_rate": Family("gauge", "Learning rate at the end of the last epoch."),
    "helio_pretrain_gradient_norm": Family("gauge", "Mean norm of the gradient in the last epoch."),
    "helio_pretrain_skipped_steps": Family("gauge", "Steps of the last epoch whose gradient was no number."),
    "helio_pretrain_corrupt_images": Family("gauge", "Images of the last epoch that another stood in for."),
    "helio_pretrain_cache_hit_share": Family("gauge", "Part of the last epoch's row groups that were in a cache."),
    "helio_pretrain_knn_accuracy": Family("gauge", "Accuracy of kNN on frozen features."),
    "helio_pretrain_embedding_rank": Family("gauge", "Effective rank of the backbone's features."),
    "helio_pretrain_embedding_spread": Family("gauge", "Spread of the backbone's features: 0 is a collapse."),
    "helio_pretrain_projection_spread": Family("gauge", "Spread of what the loss compares: 0 is a collapse."),
    "helio_pretrain_alignment": Family("gauge", "Mean squared distance of two views of an image."),
    "helio_pretrain_uniformity": Family("gauge", "How far features keep from each other: less is farther."),
    "helio_pretrain_checkpoints_total": Family("counter", "Checkpoints that were written."),
    "helio_pretrain_checkpoint_seconds": Family("gauge", "Time that writing the last checkpoint took."),
    "helio_pretrain_checkpoints_lost": Family("gauge", "Checkpoints that could not be written in this command."),
    "helio_trials": Family(
        "gauge", "Trials by state: running (from the first epoch on), complete, pruned, failed.", ("stage", "state")
    ),
    "helio_trial_epochs_total": Family("counter", "Epochs of all trials.", ("stage",)),
    "helio_trial_epoch_seconds": Family("histogram", "Time of an epoch of a trial.", ("stage",), EPOCH_BUCKETS_S),
    "helio_trial_retries_total": Family("counter", "Attempts at trials that failed and were begun again.", ("stage",)),
    "helio_search_best": Family("gauge", "Best value of the metric so far.", ("stage", "metric")),
    "helio_predict_images_total": Family("counter", "Images labelled without an endpoint, also by a command before."),
    "helio_predict_failed_total": Family("counter", "Images of them that could not be read or decoded."),
}
"""By name."""


class Metrics:
    """Where one run, or one command without a run, records. Any thread may."""

    def __init__(self, run: str, recipe: str) -> None:
        self._of_all = {"run": run, "recipe": recipe}
        self._lock = threading.Lock()
        self._gauges: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}

    def count(self, name: str, more: float = 1, **labels: str) -> None:
        """Add `more`, 0 or above, to a counter."""
        if more:
            self._record(name, "inc", more, labels)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Say what a gauge is until the stage ends, or it is set again."""
        with self._lock:
            self._gauges[name, frozenset(labels.items())] = value
            self._record(name, "set", value, labels)

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._record(name, "observe", value, labels)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """For the length of a stage: that it runs, and then how it has ended."""
        self.set("helio_stage_running", 1, stage=name)
        ended, outcome = threading.Event(), "failed"
        again = threading.Thread(target=self._set_again, args=(ended,), name="metrics", daemon=True)
        again.start()
        try:
            yield
            outcome = "finished"
        except KeyboardInterrupt:
            outcome = "interrupted"
            raise
        finally:
            ended.set()
            again.join()
            self._gauges.clear()
            self._record("helio_stage_running", "set", 0, {"stage": name})
            self.count("helio_stages_total", stage=name, outcome=outcome)

    def _set_again(self, ended: threading.Event) -> None:
        while not ended.wait(AGAIN_S):
            with self._lock:
                for (name, labels), value in self._gauges.items():
                    self._record(name, "set", value, dict(labels))

    def _record(self, name: str, verb: str, value: float, labels: dict[str, str]) -> None:
        # Ray takes labels in ASCII alone.
        given = self._of_all | labels
        plain = {label: text.encode("ascii", "backslashreplace").decode() for label, text in given.items()}
        getattr(_metric(name), verb)(float(value), plain)


@functools.cache
def _metric(name: str) -> Any:
    """Ray's object of a metric, one in a process."""
    from ray.util import metrics

    family = FAMILIES[name]
    labels = (*OF_ALL, *family.labels)
    if family.kind == "histogram":
        return metrics.Histogram(name, family.help, list(family.buckets), labels)
    return (metrics.Counter if family.kind == "counter" else metrics.Gauge)(name, family.help, labels)
