"""What a task of Ray Data, a call of an actor, and an epoch of a trial in its study cost the process that wants them.

    python -m tests.cluster.rates PROFILE

on the head node of a lab. In CPU seconds, since all nodes share the same cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import optuna
import ray

from cluster.profile import load_profile
from cluster.session import ray_session
from jobs.data.tasks import run_tasks

TASKS, CALLS, TRIALS, EPOCHS = 400, 2000, 20, 5


def main(path: str) -> None:
    """Print them as JSON."""
    profile = load_profile(path)
    with ray_session(profile, []):

        def tasks(count: int) -> None:
            for _ in run_tasks(lambda item: item, lambda: range(count), profile.data):
                pass

        # The processes of the tasks are there from then on.
        tasks(16)
        task = _cpu_s(lambda: tasks(TASKS)) / TASKS
        idler: Any = ray.remote(num_cpus=0)(_Idler).remote()
        ray.get(idler.poll.remote())
        call = _cpu_s(lambda: ray.get([idler.poll.remote() for _ in range(CALLS)])) / CALLS
    with tempfile.TemporaryDirectory() as directory:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(storage=f"sqlite:///{directory}/studies.db")
        record = _cpu_s(lambda: study.optimize(_trial, n_trials=TRIALS)) / (TRIALS * EPOCHS)
    print(json.dumps({"task_cpu_s": task, "call_cpu_s": call, "record_cpu_s": record}))


class _Idler:
    def poll(self) -> None:
        """As Ray Train asks each worker whether it is well."""


def _trial(trial: optuna.Trial) -> float:
    value = trial.suggest_float("learning_rate", 0, 1)
    for epoch in range(EPOCHS):
        trial.report(value, epoch)
    return value


def _cpu_s(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main(sys.argv[1])
