"""What each worker of distributed pre-training runs, from data to checkpoint. Started by `jobs.pretraining`."""

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import tensorflow as tf

from cluster.profile import DataResources, TrainResources
from jobs.data.config import DataConfig
from jobs.data.dataset import Dataset
from jobs.data.order import training_order
from jobs.data.stream import Account, Batch, TrainStream, Views
from jobs.model.backbone import build_backbone
from jobs.model.config import ModelConfig
from jobs.ssl.methods import build_method, views_of
from jobs.ssl.sentinel import collapse_sign
from jobs.training.average import Average
from jobs.training.checkpoint import Begun, State
from jobs.training.checkpointing import LOSS_SCALE, Checkpointing
from jobs.training.config import PretrainConfig, total_steps
from jobs.training.initial import load_initial
from jobs.training.keeper import CheckpointStore, Keeper
from jobs.training.optimizer import build_optimizer, scaled_rate
from jobs.training.probing import Networks, Probe
from jobs.training.schedule import Tabulated, learning_rates, remedied
from jobs.training.step import (
    FIGURES,
    Objective,
    gather,
    make_average,
    make_step,
    make_strategy,
    moving_statistics,
    replica_rank,
)

TELL_EVERY_S = 0.5

SKIPPED, TIMES = FIGURES.index("skipped_steps"), slice(FIGURES.index("compute_s"), None)
MOST_SKIPPED, MOST_SKIPPED_SHARE = 5, 0.05
"""Steps of an epoch that may be skipped for a gradient that is not finite, by number or share, whichever is more; never
all of them."""

CORRUPT_NAMED = 10
"""Images that each worker names in an epoch, of those that could no longer be decoded."""

_NOT_BEGUN = Begun([0.0] * len(FIGURES), 0, 0.0, [0] * 5)


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker is told."""

    pretrain: PretrainConfig
    model: ModelConfig
    data: DataConfig
    dataset: str
    remedies: list[tuple[int, float, int]]
    """(First step, factor of the learning rate, warm-up steps) of each time that training went back."""
    checkpoints: str
    """Directory of this run's checkpoints, in the storage."""
    training: str
    """`State.training` of this run."""
    seed: int
    train: TrainResources
    data_resources: DataResources
    events: Any
    """Actor of `cluster.events`; rank 0 tells it how far training is."""


def train_worker(settings: dict[str, Any]) -> None:
    """The training function of Ray Train: `settings["assignment"]` holds the fields of Assignment."""
    from jobs.training.device import give_way, set_up_tensorflow

    assignment = Assignment(**settings["assignment"])
    train = assignment.train
    give_way()
    set_up_tensorflow(train.threads_per_worker, train.gpus_per_worker, train.precision)
    worker = _Worker(assignment)
    worker.run()
    worker.checkpoints.finish()


class _Worker:
    """One worker's model, data and position."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.config = config = assignment.pretrain
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.dataset = Dataset.open(assignment.dataset)
        self.views = _views(assignment)
        self.order = training_order(self.dataset, assignment.data, assignment.seed, config.global_batch_size)
        self.total_steps = total_steps(self.order, config)
        self.strategy = make_strategy()
        rates = learning_rates(config.schedule, scaled_rate(config), self.total_steps, config.warmup_steps)
        self.rates = remedied(rates, assignment.remedies)
        # An exchange wants a tensor that lies on a device; what a function is given lies on none.
        self._everyone = tf.function(lambda own: self.strategy.run(lambda v: gather(tf.identity(v)), args=(own,)))
        self.backbone = build_backbone(assignment.model, assignment.data.image_size, assignment.seed)
        store = CheckpointStore(Path(assignment.checkpoints), assignment.training, self._notify)
        if config.initial is not None and not store.steps():
            load_initial(self.backbone, config.initial)
        self.method = build_method(config, self.backbone, len(self.dataset.classes))
        variables = [*self.backbone.trainable_variables, *self.method.head.trainable_variables]
        self.wish = tf.Variable(0.0)
        """Above 0 after the step at which training is to end for now, on every worker."""
        self._answer: Any = None
        self.optimizer = build_optimizer(config.optimizer, Tabulated(self.rates), config.weight_decay, config.momentum)
        self.optimizer.build(variables)
        self.train_step = make_step(
            self.strategy,
            Objective(self.method.forward, self._loss, self.method.separable),
            self.optimizer,
            variables,
            clip_norm=config.clip_norm,
            micro_batches=config.micro_batches,
            after=self._after_step,
            statistics=[v for model in (self.backbone, self.method.head) for v in moving_statistics(model)],
            wish=self.wish,
        )
        trained = [self.backbone, self.method.head]
        self.average = None if config.ema_decay is None else Average(trained, config.ema_decay)
        # What the probe looks at, and what is handed on.
        self.exported_backbone, self.exported_head = trained if self.average is None else self.average.models
        models = (*trained, self.exported_backbone, self.exported_head)
        statistics = {id(v): v for model in models for v in moving_statistics(model)}
        self.average_statistics = make_average(self.strategy, list(statistics.values()))
        self.step = 0
        self.untrained: dict[str, float] = {}
        self.history: list[dict[str, float]] = []
        self.resumed_from: list[int] = []
        self.begun = _NOT_BEGUN
        self.checkpoints = Checkpointing(
            self._parts(),
            store,
            Keeper(store, config.keep_checkpoints, config.keep_best, self._notify, self._tell_written),
            self.rank,
            self._gather_ints,
            lambda text: self._tell({"kind": "stopped", "text": text}, wait=True),
        )
        state = self.checkpoints.restore()
        if state is not None:
            self.step, self.untrained, self.history = state.step, state.untrained, state.history
            self.begun = state.begun or _NOT_BEGUN
            self.resumed_from = [*state.resumed_from, state.step]
            self._tell({"kind": "resumed"})
        # Those of the epoch under way hold what was spent on it before.
        self.spent = -_spent(np.array(self.begun.figures), Account())
        """Seconds that this process has spent on earlier epochs, as `_spent` has them."""
        self.probe = Probe(
            self.strategy,
            Networks(self.exported_backbone, self.exported_head, self.method),
            self.dataset,
            self.views,
            config,
            (self.rank, self.world),
            self.name_corrupt,
        )

    def run(self) -> None:
        """From the restored step to the last, with a probe and a checkpoint at the end of epochs."""
        config, assignment = self.config, self.assignment
        if self.checkpoints.stopped:
            return
        self._tell({"kind": "began", "workers": self.world})
        if self.step == 0:
            self.untrained = self.probe.figures()
        stream = self._stream()
        ends = self._epoch_ends()
        figures, since = np.array(self.begun.figures), self.begun.steps
        started, told = time.monotonic() - self.begun.elapsed_s, time.monotonic()
        for batch in stream:
            figures += self.train_step(_for_model(batch), tf.constant(batch.targets(len(self.dataset.classes)))).numpy()
            # Before this worker has a wish of its own, which the others hear of with the next step.
            is_over = bool(self.wish.numpy() > 0)
            self.step += 1
            since += 1
            now = time.monotonic()
            if self.rank == 0 and now - told > TELL_EVERY_S:
                told = now
                # Its own, of this epoch so far: all workers' is known at the epoch's end.
                waited = stream.account.waited_s / (now - started - self.begun.elapsed_s)
                spent = (self.spent + _spent(figures, stream.account)).tolist()
                loss = _means(figures, since)["loss"]
                self._tell_step({"loss": loss, "data_wait_share": waited, "spent_s": spent})
            too_many = figures[SKIPPED] > max(MOST_SKIPPED, since * MOST_SKIPPED_SHARE)
            if too_many or (self.step in ends and figures[SKIPPED] == since):
                # It is the same figure on every worker: all of them stop here, once the driver knows.
                sign = f"{figures[SKIPPED]:.0f} of {since:,} steps had a gradient that is no number"
                self._tell({"kind": "diverged", "sign": sign, "healthy_step": self._healthy_step()}, wait=True)
                return
            if self.step not in ends:
                if is_over or self.step % (config.checkpoint_every_steps or self.total_steps) == 0:
                    self.average_statistics()
                    elapsed = time.monotonic() - started
                    begun = Begun(figures.tolist(), since, elapsed, self._done(stream))
                    self.checkpoints.save(functools.partial(self._state, begun))
                    if self.checkpoints.stopped or is_over:
                        return
                continue
            self.average_statistics()
            elapsed = time.monotonic() - started
            data = self._account(stream, figures, since, elapsed)
            if data["corrupt_images"] > assignment.data.max_corrupt_share * since * config.global_batch_size:
                self._tell({"kind": "corrupt", "count": data["corrupt_images"]}, wait=True)
                return
            probed = self.probe.figures()
            if self._collapsed(probed):
                return
            metrics = {
                **_means(figures, since),
                "learning_rate": float(self.rates[self.step - 1]),
                **probed,
                **data,
            }
            self.history.append({"step": self.step, "unix_time": time.time(), **metrics})
            self._tell({"kind": "epoch", **metrics})
            if is_over or self._is_due():
                self.checkpoints.save(functools.partial(self._state, None))
                if self.checkpoints.stopped or is_over:
                    return
            self.spent += _spent(figures, stream.account)
            figures, since, started, stream.account = np.zeros(len(FIGURES)), 0, time.monotonic(), Account()
            self.begun = _NOT_BEGUN
        self._tell({"kind": "map", **self.probe.map()}, wait=True)

    def _loss(self, outputs: Any, targets: tf.Tensor) -> tf.Tensor:
        return self.method.loss(outputs, targets, gather, replica_rank())

    def _after_step(self) -> None:
        step = tf.cast(self.optimizer.iterations, tf.float32)
        self.method.after_step(step / self.total_steps)
        if self.average is not None:
            self.average.follow(step)

    def _collapsed(self, probed: dict[str, float]) -> bool:
        """Whether worker 0 sees a collapse, which it tells the driver; every worker asks at the same step."""
        watched = self.rank == 0 and self.config.sentinel.watch
        sign = None
        if watched:
            sign = collapse_sign([self.untrained, *self.history, probed], self.method.holds_scale)
        if sign is not None:
            self._tell({"kind": "collapsed", "sign": sign, "healthy_step": self._healthy_step()}, wait=True)
        return bool(self._gather_ints([sign is not None]).any())

    def _healthy_step(self) -> int:
        """The last step at which the probe saw nothing wrong."""
        return int(self.history[-1]["step"]) if self.history else 0

    def _stream(self) -> TrainStream:
        return TrainStream(
            self.dataset,
            self.order,
            self.views,
            self.rank,
            self.world,
            self.step,
            self.total_steps,
            self.assignment.data_resources,
        )

    def _account(
        self, stream: TrainStream, figures: np.ndarray[Any, Any], steps: int, elapsed: float
    ) -> dict[str, float]:
        """What all workers and their streams did in an epoch; every worker calls it at the same step.

        Seconds are of a step, the mean of all workers, and of the slowest one.
        """
        for text in stream.account.corrupt[:CORRUPT_NAMED]:
            self.name_corrupt(f"{text}: another stood in for it")
        corrupt, kib, read, cached, waited_ms = self._done(stream)
        times = self._gather_ints([round(1000 * seconds) for seconds in figures[TIMES]]) / 1000 / steps
        compute, all_reduce = times.mean(axis=0).tolist()
        waited = waited_ms / 1000 / self.world
        return {
            "compute_s": compute,
            "slowest_compute_s": float(times[:, 0].max()),
            "all_reduce_s": all_reduce,
            "input_s": waited / steps,
            "data_wait_share": waited / elapsed,
            "images_per_second": steps * self.config.global_batch_size / elapsed,
            "images_per_second_per_worker": steps * self.config.global_batch_size / elapsed / self.world,
            "bytes_read": kib * 1024,
            "cache_hit_share": cached / max(1, read + cached),
            "corrupt_images": corrupt,
        }

    def _done(self, stream: TrainStream) -> list[int]:
        """Corrupt images, KiB, row groups read and cached, and ms waited of all workers in this epoch so far."""
        account = stream.account
        waited_ms = round(1000 * account.waited_s)
        own = (len(account.corrupt), account.bytes_read // 1024, account.groups_read, account.groups_cached, waited_ms)
        everyone = self._gather_ints(own).sum(axis=0, dtype=np.int64)
        return (everyone + np.array(self.begun.account)).tolist()

    def name_corrupt(self, text: str) -> None:
        """Tell the driver of an image that can no longer be decoded; any worker may meet one."""
        self.assignment.events.put.remote({"step": self.step, "kind": "corrupt_image", "text": text})

    def _epoch_ends(self) -> set[int]:
        ends = {self.order.steps(epoch) for epoch in range(1, self.config.epochs + 1)}
        return {end for end in ends if end < self.total_steps} | {self.total_steps}

    def _parts(self) -> dict[str, Sequence[Any]]:
        """The variables that a checkpoint holds, by part."""
        trained = [] if self.average is None else [*self.backbone.weights, *self.method.head.weights]
        inner = getattr(self.optimizer, "inner_optimizer", self.optimizer).variables
        return {
            "backbone": self.exported_backbone.weights,
            "head": self.exported_head.weights,
            "trained": trained,
            "method": self.method.state,
            "optimizer": inner,
            LOSS_SCALE: self.optimizer.variables[: len(self.optimizer.variables) - len(inner)],
        }

    def _is_due(self) -> bool:
        """Whether a checkpoint is to be taken at this end of an epoch."""
        epoch, every = int(self.order.epoch_of(self.step)), self.config.checkpoint_every_steps
        at_step = every is not None and self.step % every == 0
        return at_step or epoch % self.config.checkpoint_every_epochs == 0 or self.step == self.total_steps

    def _state(self, begun: Begun | None, digest: str) -> State:
        """What a checkpoint of now says of itself; `digest` is of its weights."""
        assignment = self.assignment
        return State(
            step=self.step,
            seed=assignment.seed,
            image_size=assignment.data.image_size,
            model=assignment.model.model_dump(),
            method=self.config.method,
            global_batch_size=self.config.global_batch_size,
            fingerprint=self.dataset.fingerprint,
            untrained=self.untrained,
            history=list(self.history),
            resumed_from=self.resumed_from,
            training=assignment.training,
            weights_sha256=digest,
            begun=begun,
        )

    def _gather_ints(self, values: Sequence[int]) -> np.ndarray[Any, Any]:
        """The workers' values, int32 [world, n]."""
        everyone = self._everyone(tf.constant([values], tf.int32))
        return np.asarray(self.strategy.experimental_local_results(everyone)[0])

    def _tell(self, event: dict[str, Any], wait: bool = False) -> None:
        """Tell the driver, from worker 0; with `wait`, return once it has been taken down."""
        if self.rank == 0:
            told = self.assignment.events.put.remote({"step": self.step, **event})
            if wait:
                ray.get(told)

    def _tell_step(self, figures: dict[str, Any]) -> None:
        """Tell how far training is; what the driver answered the last time may be that it is to end."""
        if self._answer is not None and ray.wait([self._answer], timeout=0)[0] and ray.get(self._answer):
            self.wish.assign(1.0)
        self._answer = self.assignment.events.put.remote({"step": self.step, "kind": "step", **figures})

    def _tell_written(self, seconds: float | None) -> None:
        """Tell the driver of a checkpoint, from whatever thread."""
        ray.get(self.assignment.events.put.remote({"step": self.step, "kind": "checkpoint", "seconds": seconds}))

    def _notify(self, text: str) -> None:
        """Tell the user a line, from whatever thread."""
        ray.get(self.assignment.events.put.remote({"step": self.step, "kind": "notice", "text": text}))


def _for_model(batch: Batch) -> Any:
    """Views are a part of the batch for the model: [batch × views, height, width, channel]. Local ones come apart."""
    parts = [tf.constant(views.reshape(-1, *views.shape[2:])) for views in (batch.images, batch.local) if views.size]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _views(assignment: Assignment) -> Views:
    config, size = assignment.pretrain, assignment.data.image_size
    count, local_views = views_of(config)
    area = (config.local_crop_min_area, config.local_crop_max_area)
    return Views(size, count, config.augment, assignment.seed, local_views, config.local_size_for(size), area)


def _spent(figures: np.ndarray[Any, Any], account: Account) -> np.ndarray[Any, Any]:
    """Seconds of an epoch so far on this worker, by `jobs.training.counting.PARTS`."""
    return np.append(figures[TIMES], account.waited_s)


def _means(figures: np.ndarray[Any, Any], steps: int) -> dict[str, float]:
    """What the steps of an epoch say together: loss and norm are means over those that moved the weights."""
    loss, norm, skipped = figures[: SKIPPED + 1].tolist()
    moved = steps - skipped or math.nan
    return {"loss": loss / moved, "gradient_norm": norm / moved, "skipped_steps": skipped}
