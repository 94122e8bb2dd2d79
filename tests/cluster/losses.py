"""A worker node of a lab is killed in each stage of a run, and a new machine takes its place."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.cluster.lab import Lab
from tests.cluster.namespaces import Machine

BUSY = {
    "ingest works": "ray::MapBatches(apply)",
    "pretrain works": "ray::RayTrainWorker",
    "tune works": "ray::Slot",
    "serving": "ray::ServeReplica",
}
"""What runs on the node that is killed, by when that is."""

TRAFFIC = """
import json, sys, time
from serving.client import Client
url, image, seconds = sys.argv[1], open(sys.argv[2], "rb").read(), float(sys.argv[3])
answered, failed, longest, last = 0, [], 0.0, time.monotonic()
end = last + seconds
with Client(url, timeout_s=60) as client:
    while time.monotonic() < end:
        try:
            client.predict(image)
            answered += 1
        except Exception as error:
            failed.append(str(error))
        now = time.monotonic()
        longest, last = max(longest, now - last), now
        print(json.dumps({"answered": answered, "failed": failed, "longest_s": round(longest, 2)}), flush=True)
"""
"""One user who asks again and again, by the product's client."""
ASKED_S = 90.0


class Killer:
    """Kills a worker that does what is to be disturbed, and lets a spare machine join."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._joining: list[threading.Thread] = []

    def actions(self) -> dict[str, Callable[[], object]]:
        """For `Watch`, by what has happened."""
        return {when: lambda when=when: self.kill(when) for when in BUSY if when != "serving"}  # type: ignore[misc]

    def kill(self, when: str) -> None:
        """A node with such a process, the first one where none has it. Its successor joins in a thread."""
        workers = self._lab.workers
        busy = [machine for machine in workers if _runs(machine, BUSY[when])]
        victim = (busy or workers)[0]
        victim.kill()
        print(f"  killed {victim.address}: {when}; {len(busy)} of {len(workers)} workers did that", flush=True)
        new = self._lab.spares.pop(0)
        workers[workers.index(victim)] = new
        joining = threading.Thread(target=self._lab.join, args=(new,))
        joining.start()
        self._joining.append(joining)

    def wait(self) -> None:
        """Return once all that were to join have done so."""
        for joining in self._joining:
            joining.join()


def ask_while_serving(lab: Lab, image: Path, killer: Killer | None) -> tuple[Callable[[str], None], dict[str, Any]]:
    """What asks the endpoint from another machine; with a killer a node with a replica goes meanwhile.

    What it has found is in the dictionary once it has been called.
    """
    found: dict[str, Any] = {}

    def ask(url: str) -> None:
        with lab.other.start("python", "-c", TRAFFIC, url, str(image), str(ASKED_S)) as asking:
            assert asking.stdout is not None and asking.stderr is not None
            # From the first answer on.
            asking.stdout.readline()
            if killer is not None:
                killer.kill("serving")
            told = asking.stdout.readlines()
            if asking.wait():
                raise RuntimeError(asking.stderr.read())
        found.update(json.loads(told[-1]))

    return ask, found


def _runs(machine: Machine, title: str) -> bool:
    for pid in machine.processes():
        try:
            if title in Path(f"/proc/{pid}/cmdline").read_text():
                return True
        except OSError:
            continue
    return False
