"""The other machines of a cluster, over ssh: `helio cluster up` makes them nodes, `helio cluster down` ends these.

ssh must get there without asking: by a key, as ~/.ssh/config says. helio must be installed there. What a machine needs
goes through ssh's standard input, so that no token stands in a list of processes.
"""

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cluster.dashboard import read_token
from cluster.errors import HelioError
from cluster.profile import Profile

if TYPE_CHECKING:
    from cluster.output import Output

WITHIN_S = 180.0
"""How long a machine may take."""
AT_ONCE = 16
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
JOIN = """
umask 077 && mkdir -p ~/.helio/nodes && cd ~/.helio/nodes && IFS= read -r token && cat > {name}.yaml &&
printf %s "$token" > {name}.token && export RAY_AUTH_TOKEN_PATH="$PWD/{name}.token" &&
exec {helio} cluster join --profile {name}.yaml
"""
DOWN = "cd ~/.helio/nodes && exec {helio} cluster down --profile {name}.yaml"


def join(profile: Profile, output: "Output") -> None:
    """Make each machine a node. Raises HelioError where one has not become one; the others have."""
    given = profile.model_dump(exclude_unset=True, exclude={"machines"})
    own = yaml.safe_dump({**given, "storage": profile.storage_reference}, sort_keys=False)
    token = read_token(profile.name) if profile.auth_mode == "token" else ""
    _on_each(profile, JOIN, f"{token}\n{own}", output)


def leave(profile: Profile, output: "Output") -> None:
    """End the node of each machine. Raises HelioError where one could not be ended."""
    _on_each(profile, DOWN, "", output)


def _on_each(profile: Profile, script: str, text: str, output: "Output") -> None:
    machines = profile.machines
    if machines is None:
        return
    helio = machines.helio or str(Path(sys.executable).with_name("helio"))
    command = script.format(name=shlex.quote(profile.name), helio=shlex.quote(helio))
    faults = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for host, (code, said) in zip(
            machines.hosts, pool.map(lambda host: _run(host, command, text), machines.hosts), strict=True
        ):
            print(f"{host}: {said.removeprefix('helio: ')}", file=output.messages, flush=True)
            faults += [host] if code else []
    if faults:
        raise HelioError(f"{len(faults)} of {len(machines.hosts)} machines have not done it: {', '.join(faults)}")


def _run(host: str, command: str, text: str) -> tuple[int, str]:
    """(exit code, the last line that a command says on a machine)."""
    try:
        done = subprocess.run(
            [*SSH, "--", host, command], input=text, capture_output=True, text=True, timeout=WITHIN_S, check=False
        )
    except FileNotFoundError:
        raise HelioError("machines are reached by ssh, and there is none here: install OpenSSH's client") from None
    except subprocess.TimeoutExpired:
        return 1, f"no end within {WITHIN_S:g} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return done.returncode, lines[-1] if lines else f"exit code {done.returncode}"
