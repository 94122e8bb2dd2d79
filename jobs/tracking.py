"""Metrics to MLflow and TensorBoard, from the driver, without holding up what is measured."""

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.run import Run, write_json
from jobs.registry import mlflow_client

PARENT, STAGE, TRIAL = "mlflow.parentRunId", "helio.stage", "helio.trial"
TOGETHER_S = 2.0
"""What comes within so long is written together."""
AT_ONCE = 1000
"""Metrics that MLflow takes in one call."""


@dataclass(frozen=True)
class TrialRecord:
    """A trial that has ended."""

    number: int
    state: str
    """Optuna's: COMPLETE, PRUNED or FAIL."""
    params: Mapping[str, object]
    metric: str
    curve: Mapping[int, float]
    """Value by epoch."""
    began_ms: int
    ended_ms: int
    failures: Sequence[str]
    tags: Mapping[str, str]
    """Where it comes from."""


class Tracker:
    """One MLflow run for each helio run, and a TensorBoard directory beside it.

    MLflow's import and the first making of its database take seconds: a thread does both, and all writing. Use as a
    context manager; leaving it waits for what is still to be written. Metrics that MLflow does not take are said so,
    and cost no stage its result: TensorBoard and the run's own files have them too.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._work: queue.SimpleQueue[Callable[[Any, str], object] | list[tuple[str, float, int, int]]] = (
            queue.SimpleQueue()
        )
        """What is to be written, or metrics: (name, value, Unix ms, step) each."""
        self._leaving, self._status = threading.Event(), ""
        self._failure: BaseException | None = None
        self._board: Any = None
        self._trials: set[tuple[str, int]] | None = None
        """(stage, number) of each trial that MLflow has, once it was asked."""
        self._thread = threading.Thread(target=self._write, name="tracking", daemon=True)

    def __enter__(self) -> "Tracker":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._status = "FINISHED" if kind is None else "KILLED" if kind is KeyboardInterrupt else "FAILED"
        self._leaving.set()
        self._thread.join()
        if self._board is not None:
            self._board.close()
        if self._failure is not None:
            logging.getLogger(__name__).error("MLflow failed", exc_info=self._failure)
            reason = (str(self._failure) or type(self._failure).__name__).splitlines()[0]
            self._run.progress.say(f"  warning: some metrics are not in MLflow: {reason}")

    def metrics(self, stage: str, values: dict[str, float], step: int) -> None:
        """Log figures of a stage at a step, as `stage/name`."""
        named = {f"{stage}/{name}": float(value) for name, value in values.items()}
        if self._board is None:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self._run.directory / "tensorboard"))
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        now = round(1000 * time.time())
        self._work.put([(name, value, now, step) for name, value in named.items()])

    def tags(self, values: dict[str, str]) -> None:
        """Set tags of the run."""

        def write(client: Any, run_id: str) -> None:
            for name, value in values.items():
                client.set_tag(run_id, name, value)

        self._work.put(write)

    def trial(self, stage: str, trial: TrialRecord) -> None:
        """Log a trial that has ended as a run below this one; one that is there already is left as it is."""

        def write(client: Any, run_id: str) -> None:
            from mlflow.entities import Metric, Param, RunTag

            if self._trials is None:
                self._trials = _trials_below(client, run_id)
            if (stage, trial.number) in self._trials:
                return
            self._trials.add((stage, trial.number))
            experiment = client.get_run(run_id).info.experiment_id
            tags = {**trial.tags, PARENT: run_id, STAGE: stage, TRIAL: str(trial.number), "helio.state": trial.state}
            name = f"{self._run.name} {stage} trial {trial.number}"
            child = client.create_run(experiment, trial.began_ms, tags, name).info.run_id
            client.log_batch(
                child,
                metrics=[Metric(trial.metric, value, trial.ended_ms, epoch) for epoch, value in trial.curve.items()],
                params=[Param(key, str(value)) for key, value in trial.params.items()],
                tags=[RunTag(f"helio.failure.{n}", cause[:500]) for n, cause in enumerate(trial.failures, start=1)],
            )
            status = {"COMPLETE": "FINISHED", "PRUNED": "KILLED"}.get(trial.state, "FAILED")
            client.set_terminated(child, status, trial.ended_ms)

        self._work.put(write)

    def _write(self) -> None:
        try:
            client = mlflow_client(self._run.storage)
            run_id = self._run_id(client)
            left = False
            while not left:
                # A commit for each step would cost the driver more than what is told.
                left = self._leaving.wait(TOGETHER_S)
                self._write_queued(client, run_id)
            client.set_terminated(run_id, self._status)
        except BaseException as error:  # told in the driver's thread, in __exit__
            self._failure = error

    def _write_queued(self, client: Any, run_id: str) -> None:
        from mlflow.entities import Metric

        metrics: list[Metric] = []
        while not self._work.empty():
            item = self._work.get()
            if isinstance(item, list):
                metrics += [Metric(*one) for one in item]
            else:
                item(client, run_id)
        for start in range(0, len(metrics), AT_ONCE):
            client.log_batch(run_id, metrics=metrics[start : start + AT_ONCE])

    def _run_id(self, client: Any) -> str:
        """The MLflow run that this run began before, or a new one."""
        record = self._run.directory / "mlflow_run"
        uri = client.tracking_uri
        if record.exists():
            began = json.loads(record.read_text())
            # Another server knows nothing of it.
            if began["uri"] == uri:
                client.update_run(began["run_id"], status="RUNNING")
                return str(began["run_id"])
        name = self._run.recipe.name
        experiment = client.get_experiment_by_name(name)
        location = (self._run.storage / "mlflow-artifacts" / name).as_uri()
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, location)
        created = client.create_run(experiment_id, run_name=self._run.name)
        for key, value in _flatten(self._run.recipe.to_dict()).items():
            client.log_param(created.info.run_id, key, value)
        client.set_tag(created.info.run_id, "helio.run_directory", str(self._run.directory))
        write_json(record, {"uri": uri, "run_id": created.info.run_id})
        return str(created.info.run_id)


def _trials_below(client: Any, run_id: str) -> set[tuple[str, int]]:
    experiment = client.get_run(run_id).info.experiment_id
    found, token = set(), None
    while True:
        page = client.search_runs([experiment], f"tags.`{PARENT}` = '{run_id}'", page_token=token)
        found |= {(run.data.tags[STAGE], int(run.data.tags[TRIAL])) for run in page}
        token = page.token
        if not token:
            return found


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat |= _flatten(inner, f"{prefix}{key}.")
        else:
            flat[prefix + key] = str(inner)[:500]
    return flat
