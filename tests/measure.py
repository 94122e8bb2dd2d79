"""What benchmarks share: data unpacked once, rates measured side by side, memory of a whole process tree."""

import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import SHARED_DATA


def unpacked(archive: str, directory: Path) -> Path:
    """Unpack one of the shared archives, once. Ends the benchmark with a line where there is none."""
    source = SHARED_DATA / archive
    if not source.exists():
        raise SystemExit(f"this benchmark needs {archive}, which is not here")
    if not directory.exists():
        directory.mkdir(parents=True)
        with tarfile.open(source) as tar:
            tar.extractall(directory, filter="data")
    return directory


def rate(batches: Iterator[int], warm_up_s: float, measured_s: float) -> float:
    """Images per second of an endless iterator that yields the size of each batch, once it has warmed up."""
    begin = next_at = None
    images = 0
    for size in batches:
        now = time.perf_counter()
        if next_at is None:
            next_at = now + warm_up_s
        elif begin is None:
            if now >= next_at:
                begin = now
        else:
            images += size
            if now - begin >= measured_s:
                return images / (now - begin)
    raise RuntimeError("the batches ended before the time was over")


def side_by_side(measures: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every measure once a round, so that what slows the machine for a while slows all of them."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for number in range(rounds):
        for name, measure in measures.items():
            found[name].append(measure())
            print(f"  round {number + 1}: {name:28} {found[name][-1]:12,.1f}", flush=True)
    return found


def ratio(name: str, ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Print and return the ratio of the medians, with the spread of the rounds' own ratios."""
    each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    value = statistics.median(ours) / statistics.median(theirs)
    print(
        f"{name}: {value:.2f} (rounds {each[0]:.2f} to {each[-1]:.2f}; medians {statistics.median(ours):,.1f} and "
        f"{statistics.median(theirs):,.1f})",
        flush=True,
    )
    return round(value, 3)


def tree_memory_mb(pid: int) -> float:
    """Proportional set size of a process and all below it, MiB: shared pages, as the object store's, count once."""
    parents = {int(p.name): _parent(p) for p in Path("/proc").iterdir() if p.name.isdigit()}
    family, size = {pid}, 0
    while len(family) != size:
        size = len(family)
        family |= {child for child, parent in parents.items() if parent in family}
    return sum(_pss_kb(member) for member in family) / 1024


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return -1


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def finish(results: Mapping[str, object]) -> None:
    """The last line of a benchmark."""
    print(json.dumps(results))


@contextmanager
def quiet_environment() -> Iterator[None]:
    """The environment of a `helio` command."""
    from cluster.profile import load_profile
    from cluster.session import session_environment

    os.environ.update(session_environment(load_profile("local")))
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    yield


def run_benchmark(measure: Callable[[Path], Mapping[str, object]]) -> None:
    """Let `measure` work in a directory that goes afterwards; what it found is the last line."""
    with tempfile.TemporaryDirectory(prefix="helio-bench-", ignore_cleanup_errors=True) as scratch, quiet_environment():
        finish(measure(Path(scratch)))
