"""Roll-outs at a real endpoint: how often a healthy candidate is rolled back, and how soon a bad one.

    make bench-rollouts

An endpoint of two replicas serves the champion of `tests/rollouts`. A version as good as it is rolled out again and
again, each of them with the other one as champion; a failing, a slow and a shuffled one are rolled out some times
each; 10,000 requests are sent while a candidate is shadowed; and 20 times another version is loaded and promoted while
requests go on. All by plain HTTP without retries.
"""

import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import requests

from cluster.profile import Profile
from cluster.session import free_ports, ray_session
from jobs.registry import ModelVersion
from serving.config import ServeConfig
from serving.endpoint import endpoint
from tests.measure import run_benchmark
from tests.rollouts.crowd import Told, ask, pictures
from tests.rollouts.versions import IMAGE_SIZE, SETTINGS, make_versions

ALIKE = int(os.environ.get("ALIKE", "50"))
BAD = int(os.environ.get("BAD", "5"))
SHADOWED, RELOADS = 10_000, 20
MEMORY = re.compile(r"^helio_process_resident_memory_bytes\{.*\} (\S+)$", re.MULTILINE)
IMAGES = pictures(200, IMAGE_SIZE)
ENDED = ("promoted", "rolled_back", "aborted")


def main() -> None:
    """Run everything and print the figures."""
    run_benchmark(_measure)


def _measure(scratch: Path) -> dict[str, Any]:
    profile = Profile(name="bench", num_cpus=4, object_store_gb=0.5, storage=str(scratch))
    with ray_session(profile, []):
        versions = make_versions(profile)
        config = ServeConfig(port=free_ports(1)[0], **SETTINGS)
        with endpoint(profile, config, versions["champion"]) as url:
            results = _bad(url, versions) | _shadow(url, versions) | _reloads(url, versions)
            return results | _alike(url, versions)


def _bad(url: str, versions: dict[str, ModelVersion]) -> dict[str, Any]:
    results = {}
    for kind in ("failing", "slow", "shuffled"):
        needed = []
        for _ in range(BAD):
            _order(url, "start", versions[kind])
            told = ask(url, IMAGES, 100_000, _is(*ENDED))
            rollout = _document(url)["rollout"]
            assert rollout["state"] == "rolled_back", rollout
            assert {one.version for one in told} == {versions["champion"].version}
            needed.append(rollout["arms"]["candidate"]["requests"])
        results[f"requests_until_rolled_back_{kind}"] = max(needed)
        print(f"{kind}: rolled back after {sorted(needed)} requests of the candidate", flush=True)
    return results


def _shadow(url: str, versions: dict[str, ModelVersion]) -> dict[str, Any]:
    twin = versions["twin"]
    _order(url, "start", twin)
    ask(url, IMAGES, 100_000, _is("shadow"))
    _order(url, "pause")
    told = ask(url, IMAGES, SHADOWED)
    returned = sum(one.version == twin.version for one in told)
    failed = sum(one.status != 200 for one in told)
    print(f"{len(told)} requests in the shadow stage: {returned} answers of the candidate, {failed} errors", flush=True)
    _order(url, "abort")
    return {"shadow_answers_returned": returned, "shadow_errors": failed}


def _reloads(url: str, versions: dict[str, ModelVersion]) -> dict[str, Any]:
    ask(url, IMAGES, 2000)
    memory, quiet, during = [], [], []
    for number in range(RELOADS):
        # What slows the machine for a minute slows both.
        quiet += ask(url, IMAGES, 400)
        _order(url, "start", versions["twin" if number % 2 == 0 else "champion"])
        during += ask(url, IMAGES, 100_000, _is("shadow"))
        _order(url, "promote")
        during += ask(url, IMAGES, 400)
        time.sleep(2)  # The counts of all replicas are told once a second.
        memory.append(sum(map(float, MEMORY.findall(requests.get(f"{url}/metrics", timeout=60).text))))
    failed = sum(one.status != 200 for one in during)
    p99 = [1000 * quantile_s(told, 0.99) for told in (quiet, during)]
    print(
        f"{RELOADS} reloads: {len(during)} requests, {failed} errors, p99 {p99[0]:.1f} ms quiet and {p99[1]:.1f} ms "
        f"meanwhile, memory of both replicas {' '.join(f'{size / 2**20:.0f}' for size in memory)} MiB",
        flush=True,
    )
    return {
        "reload_errors": failed,
        "reload_memory_growth": round(memory[-1] / memory[4] - 1, 4),
        "reload_p99_vs_quiet": round(p99[1] / p99[0], 2),
    }


def quantile_s(told: Sequence[Told], share: float) -> float:
    """Of what requests took."""
    return sorted(one.took_s for one in told)[int(share * (len(told) - 1))]


def _alike(url: str, versions: dict[str, ModelVersion]) -> dict[str, Any]:
    rolled_back, requests_, lost = [], [], 0
    now, other = versions["champion"], versions["twin"]
    for number in range(ALIKE):
        _order(url, "start", other)
        told = ask(url, IMAGES, 100_000, _is(*ENDED))
        lost += sum(one.status != 200 for one in told)
        requests_.append(len(told))
        rollout = _document(url)["rollout"]
        if rollout["state"] == "promoted":
            now, other = other, now
        else:
            rolled_back.append(rollout["reason"])
            print(f"  roll-out {number} of a healthy version: {rollout['reason']}", flush=True)
    print(
        f"{ALIKE} roll-outs of a healthy version: {len(rolled_back)} rolled back, {statistics.median(requests_):g} "
        f"requests each ({min(requests_)} to {max(requests_)}), {lost} errors",
        flush=True,
    )
    return {"false_roll_backs": len(rolled_back) / ALIKE, "errors_in_healthy_roll_outs": lost}


def _is(*found: str) -> Callable[[dict[str, Any]], bool]:
    """Whether the roll-out is in one of these states, or has ended."""
    return lambda document: document["rollout"]["state"] in (*found, *ENDED)


def _order(url: str, action: str, version: ModelVersion | None = None) -> None:
    order = {"action": action, "why": "a benchmark"} | ({"version": version.version} if version else {})
    response = requests.post(f"{url}/v1/rollout", json=order, timeout=60)
    assert response.status_code == 200, response.text


def _document(url: str) -> dict[str, Any]:
    found: dict[str, Any] = requests.get(f"{url}/v1/rollout", timeout=60).json()
    return found


if __name__ == "__main__":
    main()
