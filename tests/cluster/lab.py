"""A cluster of helio on machines of their own, and two beside it from which jobs are submitted and followed."""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.namespaces import BIN, Machine, machines, own_directory

PROFILE = "lab.yaml"
CERTIFICATE = Path(".helio/dashboards/lab/certificate.pem")
TOKEN = Path(".ray/auth_token")
ATTEMPTS = 3
"""To start a node: Ray gives it 30 s, which are over where all nodes share two busy cores."""


@dataclass
class Lab:
    """The machines; each has the profile in its home directory, and those that joined have the token."""

    head: Machine
    workers: list[Machine]
    client: Machine
    other: Machine
    """Of another user, who has the token, too."""
    spares: list[Machine]
    """That may join later."""
    storage: Path
    cpus: int
    fields: dict[str, Any] = field(default_factory=dict)

    def write_profile(self, machine: Machine, **fields: Any) -> None:
        """Write the cluster's profile, changed by `fields`, into a machine's home directory."""
        document = {
            "name": "lab",
            "address": f"{self.head.address}:6379",
            "dashboard": f"https://{self.head.address}:8265",
            "auth_mode": "token",
            "storage": str(self.storage),
            **self.fields,
            **fields,
        }
        (machine.home / PROFILE).write_text(yaml.safe_dump(document))

    def helio(self, machine: Machine, *words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        """`helio WORDS --profile …` there, to its end."""
        return machine.run(str(BIN / "helio"), *words, "--profile", PROFILE, more=more, within_s=1800)

    @staticmethod
    def disk(machine: Machine) -> Path:
        """What a machine sees as TMPDIR, as it is seen from here."""
        return own_directory(machine.name)

    def start(self, machine: Machine, *words: str) -> "subprocess.Popen[str]":
        """The same, begun only."""
        return machine.start(str(BIN / "helio"), *words, "--profile", PROFILE)

    def trust(self, machine: Machine) -> None:
        """Copy the token and the dashboard's certificate there from the head node, as a user would."""
        for file in (TOKEN, CERTIFICATE):
            (machine.home / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.head.home / file, machine.home / file)

    def up(self) -> str:
        """Start the head node, or what of it has ended; what is said."""
        for _ in range(ATTEMPTS):
            done = self.helio(self.head, "cluster", "up", f"--cpus={self.cpus}", "--gpus=0")
            if done.returncode == 0:
                return done.stderr
        raise RuntimeError(done.stderr)

    def join(self, machine: Machine) -> None:
        """Make a machine a worker node."""
        self.write_profile(machine)
        self.trust(machine)
        for _ in range(ATTEMPTS):
            done = self.helio(machine, "cluster", "join", f"--cpus={self.cpus}", "--gpus=0")
            if done.returncode == 0:
                return
        raise RuntimeError(done.stderr)


@contextmanager
def lab(
    workers: int,
    directory: Path,
    cpus: int,
    spares: int = 0,
    variables: Callable[[str], Mapping[str, str]] = lambda here: {},
    **fields: Any,
) -> Iterator[Lab]:
    """A head node and so many workers, of `cpus` logical CPUs each, and two clients; `fields` are the profile's.

    `variables`, given the address by which all of them reach this machine, are environment variables of all of them.
    """
    with machines(workers + spares + 3, directory) as (head, client, other, *others):
        more = variables(f"{head.address.rpartition('.')[0]}.254")
        for machine in (head, client, other, *others):
            machine.environment.update(more)
        found = Lab(head, others[:workers], client, other, others[workers:], directory / "storage", cpus, fields)
        found.write_profile(head)
        found.up()
        for machine in found.workers:
            found.join(machine)
        for machine in (client, other):
            found.write_profile(machine)
            found.trust(machine)
        yield found
