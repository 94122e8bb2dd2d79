"""Proves a profile before a run depends on it: `helio profile check --profile prod.yaml`.

What only the cluster's nodes can tell, a small job finds out there: this module is what it runs.
"""

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import submission
from cluster.dashboard import Dashboard, check_room
from cluster.errors import HelioError
from cluster.plan import NEED_OF_STAGE
from cluster.profile import Profile, load_profile
from cluster.run import package_versions
from cluster.session import check_capacity_here, ray_session
from cluster.storage import fetch, forget, publish, remove, write_fault

if TYPE_CHECKING:
    from cluster.output import Output

WITHIN_S = 300.0
"""How long the job may take, the start of nodes included."""
MARK = "helio-profile-check "


@dataclass(frozen=True)
class Check:
    """One thing that must hold."""

    what: str
    fault: str | None
    """Why it does not, and the mend."""


def check_command(profile: Profile, as_json: bool, output: "Output") -> int:
    """Print what holds and what does not; 2 when anything does not."""
    checks: list[Check] = []
    for check in _cluster(profile) if profile.address or profile.nodes else _local(profile):
        checks.append(check)
        if not as_json:
            line = f"ok      {check.what}" if check.fault is None else f"FAILED  {check.what}: {check.fault}"
            print(line, file=output.results, flush=True)
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2), file=output.results)
    return 2 if any(check.fault for check in checks) else 0


def _local(profile: Profile) -> Iterable[Check]:
    for kind in dict.fromkeys(NEED_OF_STAGE.values()):
        yield _tried(f"room for {kind}", partial(check_capacity_here, profile, [kind]))
    yield Check(f"storage {profile.storage_reference}", storage_fault(profile))


def _cluster(profile: Profile) -> Iterable[Check]:
    try:
        dashboard = Dashboard(profile)
    except HelioError as error:
        yield Check(f"the cluster at {profile.dashboard}", str(error))
        return
    if profile.is_in_bucket:
        yield Check(f"storage {profile.storage_reference} from here", storage_fault(profile))
    nodes = dashboard.nodes()
    yield Check(f"the cluster at {dashboard.address} answers, with the same Ray: {len(nodes)} nodes", None)
    for kind in dict.fromkeys(NEED_OF_STAGE.values()):
        yield _tried(f"room for {kind}", partial(check_room, profile, [kind], nodes))
    try:
        found = _ask_nodes(dashboard, profile)
    except HelioError as error:
        yield Check("a job on the cluster", str(error))
        return
    ours = package_versions()
    for node, told in found.items():
        others = [
            f"{name} {version} there, {ours[name]} here"
            for name, version in told["versions"].items()
            if version != ours[name]
        ]
        mend = f"{'; '.join(others)}: install what constraints.txt pins on both" if others else None
        yield Check(f"{node}: the same versions of Python and packages", mend)
        yield Check(f"{node}: storage {profile.storage_reference}", told["storage"])
        for name in told["missing"]:
            yield Check(f"{node}: secret {name}", f"the variable {name} is not set there: set it where Ray is started")


def _tried(what: str, check: Callable[[], None]) -> Check:
    try:
        check()
    except HelioError as error:
        return Check(what, str(error))
    return Check(what, None)


def storage_fault(profile: Profile) -> str | None:
    """Why nothing can be kept in the storage from this machine, or None."""
    fault = write_fault(profile.storage_path)
    if fault is None:
        return None
    if profile.is_in_bucket:
        return f"it cannot be read and written there ({fault}): mend that, or set storage"
    return f"it cannot be written ({fault}): mend its rights, or set storage"


def _ask_nodes(dashboard: Dashboard, profile: Profile) -> dict[str, Any]:
    job = submission.send_probe(dashboard, profile, f"profile-check-{uuid.uuid4().hex[:8]}", __name__)
    code = submission.exit_code(submission.wait(dashboard, job, WITHIN_S))
    text = submission.printed(dashboard, job)
    line = re.search(f"^{MARK}(.*)$", text, re.MULTILINE)
    if code or line is None:
        last = (text.strip().splitlines() or ["nothing"])[-1]
        raise HelioError(f"it ended with {code} and printed {last!r}: see `helio logs {job}`")
    found: dict[str, Any] = json.loads(line[1])
    return found


def _look(profile: Profile, seen: Path) -> dict[str, Any]:
    """What one node says."""
    fault = storage_fault(profile)
    if fault is None and not fetch(seen):
        fault = "it is another directory than on the node of the job: mount the same one everywhere"
    if profile.is_in_bucket:
        forget(seen)
    return {
        "versions": package_versions(),
        "storage": fault,
        "missing": [name for name in profile.secrets if name not in os.environ],
    }


def main(profile: Profile) -> None:
    """Ask every node; print one line with what they say."""
    with ray_session(profile, []):
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        fault = storage_fault(profile)
        if fault is not None:
            raise HelioError(f"storage {profile.storage_reference}: {fault}")
        seen = profile.storage_path / f".helio-check-{uuid.uuid4().hex}"
        try:
            seen.touch()
            publish(seen)
            asked = {}
            for node in ray.nodes():
                if node["Alive"]:
                    where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                    task = ray.remote(num_cpus=0, scheduling_strategy=where)(_look)
                    asked[node["NodeName"]] = task.remote(profile, seen)
            print(
                MARK + json.dumps({name: ray.get(told, timeout=WITHIN_S) for name, told in asked.items()}), flush=True
            )
        finally:
            remove(seen)


if __name__ == "__main__":
    try:
        main(load_profile(sys.argv[1]))
    except HelioError as error:
        sys.exit(f"helio: {error}")
