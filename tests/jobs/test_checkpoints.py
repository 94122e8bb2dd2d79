"""Checkpoints on disk: written beside the training, found again whole, or passed over with a word."""

import contextlib
import resource
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.errors import CheckpointError
from jobs.training.checkpoint import Arrays, Begun, Checkpoint, State, host_copies, weights_hash, write_checkpoint
from jobs.training.keeper import LOST_IN_A_ROW, CheckpointStore, Keeper

KNN = {10: 0.5, 20: 0.9, 30: 0.6, 40: 0.7, 50: 0.8}


class Variable:
    """As much of Keras's variable as a checkpoint needs."""

    def __init__(self, value: np.ndarray[Any, Any]) -> None:
        self.value = value

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.value.copy()


def _parts(step: int, size: int = 64) -> dict[str, Arrays]:
    weights = [np.full((size, size), step, np.float32), np.arange(3, dtype=np.float32)]
    return {"backbone": weights, "head": weights[:1], "optimizer": [np.int64(step).reshape(())], "method": []}


def _state(step: int, history: list[dict[str, float]] | None = None, **fields: Any) -> State:
    if history is None:
        history = [{"step": s, "knn_accuracy": KNN[s], "loss": 1.0 / s} for s in KNN if s <= step]
    known = dict(seed=0, image_size=32, model={}, method="simclr", global_batch_size=64, fingerprint="f")
    digest = weights_hash(_parts(step)["backbone"])
    more = dict(untrained={}, history=history, resumed_from=[], training="mine", weights_sha256=digest)
    return State(**{"step": step, **known, **more, **fields})


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", "mine", said.append)


def _fill(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        write_checkpoint(store.path(step), _state(step), _parts(step))


def test_a_checkpoint_gives_back_what_went_in(store: CheckpointStore) -> None:
    begun = Begun([0.1 + 0.2, 1e-17, 0.0], 7, 1.25, [0, 1, 2, 3, 4])
    state = _state(25, begun=begun)
    write_checkpoint(store.path(25), state, _parts(25))
    found = store.newest()
    assert found is not None
    assert found.state == state
    for part, arrays in _parts(25).items():
        there = found.read(part)
        assert len(there) == len(arrays), part
        assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(there, arrays, strict=True)), part


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut off": ("backbone.npz", _cut, r"backbone\.npz holds [\d,]+ of [\d,]+ bytes"),
    "empty": ("optimizer.npz", lambda path: path.write_bytes(b""), r"optimizer\.npz holds 0 of [\d,]+ bytes"),
    "longer": (
        "head.npz",
        lambda path: path.write_bytes(path.read_bytes() + b"x"),
        r"head\.npz holds 1 bytes too many",
    ),
    "one bit": ("backbone.npz", _flip, r"backbone\.npz was altered"),
    "missing": ("head.npz", Path.unlink, r"head\.npz is missing"),
    "another step": ("state.json", lambda p: p.write_text(p.read_text().replace("20", "21", 1)), "state.json was alt"),
    "no state": ("state.json", Path.unlink, r"state\.json is missing"),
    "no manifest": ("manifest.json", Path.unlink, r"is no checkpoint: it has no manifest\.json"),
    "half a manifest": ("manifest.json", _cut, r"manifest\.json cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_is_passed_over_with_a_word_where_it_is_damaged(
    store: CheckpointStore, said: list[str], damage: str
) -> None:
    name, harm, reason = DAMAGES[damage]
    _fill(store, 10, 20)
    harm(store.path(20) / name)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(store.path(20))
    found = store.newest()
    assert found is not None
    assert found.state.step == 10
    assert len(said) == 1
    assert str(store.path(20)) in said[0]
    assert "\n" not in said[0]
    assert store.steps() == [20, 10], "what is damaged is the user's to look at"


def test_another_training_is_not_gone_on_with(store: CheckpointStore, said: list[str]) -> None:
    _fill(store, 10)
    write_checkpoint(store.path(20), _state(20, training="another"), _parts(20))
    found = store.newest()
    assert found is not None
    assert found.state.step == 10
    assert "is of another recipe or data set" in said[0]


def test_training_starts_over_only_where_there_is_no_checkpoint_at_all(store: CheckpointStore) -> None:
    assert store.newest() is None
    _fill(store, 10, 20)
    for step in (10, 20):
        _cut(store.path(step) / "backbone.npz")
    with pytest.raises(CheckpointError, match=r"none of the 2 checkpoints in .* can be used: .*starts over") as error:
        store.newest()
    assert "\n" not in str(error.value)


def test_what_a_killed_writer_has_left_is_neither_found_nor_kept(store: CheckpointStore) -> None:
    _fill(store, 10)
    left = store.directory / ".step-00000020.0123"
    shutil.copytree(store.path(10), left)
    assert store.steps() == [10]
    store.clean()
    assert not left.exists()
    assert store.newest() is not None


def _keep(store: CheckpointStore, said: list[str], keep: int = 2, metric: str | None = None) -> Keeper:
    return Keeper(store, keep, metric, said.append, lambda seconds: None)


@pytest.mark.parametrize(
    ("metric", "kept", "best"), [(None, [50, 40, 20], 20), ("knn_accuracy", [50, 40, 20], 20), ("loss", [50, 40], 50)]
)
def test_the_newest_and_the_best_are_kept(
    store: CheckpointStore, said: list[str], metric: str | None, kept: list[int], best: int
) -> None:
    keeper = _keep(store, said, metric=metric)
    for step in KNN:
        keeper.save(_state(step), _parts(step))
    keeper.finish()
    assert store.steps() == kept
    found = store.best(metric)
    assert found is not None
    assert found.state.step == best
    assert [path.name for path in store.directory.glob(".*")] == []


def test_in_mid_epoch_a_checkpoint_is_new_but_never_the_best(store: CheckpointStore, said: list[str]) -> None:
    keeper = _keep(store, said, keep=1)
    for step in (20, 25, 28):
        keeper.save(_state(step), _parts(step))
    keeper.finish()
    assert store.steps() == [28, 20]


def test_the_last_one_before_anything_can_have_gone_wrong_is_kept(store: CheckpointStore, said: list[str]) -> None:
    history = [{"step": 20, "loss": 0.1}]
    keeper = _keep(store, said)
    for step in (15, 25, 28, 29):
        keeper.save(_state(step, history=history if step > 20 else []), _parts(step))
    keeper.finish()
    # Of the two newest it is not known yet whether they are healthy.
    assert store.steps() == [29, 28, 15]


def test_a_damaged_later_one_does_not_displace_those_from_which_training_went_on(
    store: CheckpointStore, said: list[str]
) -> None:
    _fill(store, 20, 30, 40)
    _cut(store.path(40) / "backbone.npz")
    keeper = _keep(store, said)
    keeper.save(_state(35), _parts(35))
    keeper.wait()
    assert store.steps() == [40, 35, 30, 20]
    keeper.save(_state(40), _parts(40))
    keeper.finish()
    found = store.newest()
    assert found is not None
    assert (found.state.step, said) == (40, [])


def test_later_checkpoints_can_be_deleted_to_go_back(store: CheckpointStore, said: list[str]) -> None:
    _fill(store, 10, 20, 30)
    assert [found.state.history[-1]["step"] for found in store.whole()] == [30, 20, 10]
    store.delete_after(10)
    assert store.steps() == [10]


class Gate(dict[str, Arrays]):
    """Parts that cannot be written before the gate is opened."""

    opened: threading.Event

    def items(self) -> Any:
        assert self.opened.wait(30)
        return super().items()


def test_training_goes_on_while_a_checkpoint_is_written(store: CheckpointStore, said: list[str]) -> None:
    keeper = _keep(store, said)
    variable = Variable(np.zeros(1000, np.float32))
    first = Gate(backbone=host_copies([variable]))
    first.opened = threading.Event()
    keeper.save(_state(10), first)
    # It would never come here if the step had to wait for the disk.
    assert store.steps() == []
    variable.value += 1
    written: list[list[int]] = []

    def next_one() -> None:
        keeper.save(_state(20), {"backbone": host_copies([variable])})
        written.append(store.steps())

    second = threading.Thread(target=next_one)
    second.start()
    first.opened.set()
    second.join()
    keeper.finish()
    assert 10 in written[0], "the second waits for the first"
    assert [store.open(step).read("backbone")[0].max() for step in (10, 20)] == [0.0, 1.0]


def test_a_fault_in_writing_comes_out_at_the_next_checkpoint(store: CheckpointStore, said: list[str]) -> None:
    keeper = _keep(store, said)
    keeper.save(_state(10), {"backbone": [np.array([object()])]})
    with pytest.raises(ValueError, match="pickle"):
        keeper.save(_state(20), _parts(20))
    keeper.save(_state(20), _parts(20))
    keeper.finish()
    assert store.steps() == [20]


@contextlib.contextmanager
def _full() -> Iterator[None]:
    """No file of more than 4 KiB can be written, by anything in this process: as short as can be."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(store: CheckpointStore, said: list[str]) -> None:
    keeper = _keep(store, said)
    keeper.save(_state(10), _parts(10))
    keeper.wait()
    with _full():
        keeper.save(_state(20), _parts(20))
        keeper.wait()
    assert not keeper.given_up
    assert [path.name for path in store.directory.iterdir()] == [store.path(10).name], "nothing half is left"
    assert len(said) == 1
    assert "the checkpoint of step 20 could not be written to" in said[0]
    assert "training goes on" in said[0]
    keeper.save(_state(30), _parts(30))
    keeper.finish()
    assert store.steps() == [30, 10]


def test_a_disk_that_stays_full_ends_training_with_one_line(store: CheckpointStore, said: list[str]) -> None:
    keeper = _keep(store, said)
    keeper.save(_state(10), _parts(10))
    keeper.wait()
    for lost in range(1, LOST_IN_A_ROW + 1):
        with _full():
            keeper.save(_state(10 + lost), _parts(10 + lost))
            keeper.wait()
        assert keeper.given_up == (lost == LOST_IN_A_ROW)
    with pytest.raises(CheckpointError) as error:
        keeper.finish()
    text = str(error.value)
    assert f"could not be written to {store.directory} (" in text
    assert "bytes free" in text
    assert text.endswith("make room, and `--resume` goes on from the checkpoint of step 10")
    assert "\n" not in text
