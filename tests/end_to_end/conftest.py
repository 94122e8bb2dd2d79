"""What the README tells a newcomer to do, done once for all tests here."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.session import free_ports

README = Path(__file__).resolve().parents[2] / "README.md"


@dataclass(frozen=True)
class Walk:
    """The newcomer's directory, and what each block of commands printed."""

    directory: Path
    printed: list[str]

    @property
    def run(self) -> Path:
        """The directory of `helio run quickstart`."""
        runs = (self.directory / "helio-workspace" / "runs").iterdir()
        return next(run for run in sorted(runs) if (run / "stages" / "deploy.json").exists())

    @property
    def results(self) -> dict[str, Any]:
        """Its results.json."""
        found: dict[str, Any] = json.loads((self.run / "results.json").read_text())
        return found

    def output_of(self, command: str) -> str:
        """What the block with this command printed."""
        return next(text for text in self.printed if f"+ {command}" in text)


def blocks() -> list[tuple[str, str]]:
    """The README's blocks of commands and of Python, without those that set this very environment up."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [(language, block) for language, block in found if not block.startswith("make ")]


@pytest.fixture(scope="session")
def walk(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Every block of the README, in order, in an empty directory; only the port is another."""
    directory = tmp_path_factory.mktemp("newcomer")
    port = str(free_ports(1)[0])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    for language, block in blocks():
        script = re.sub(r"^helio (run|deploy) (\S+)", rf"helio \1 \2 serve.port={port}", block, flags=re.MULTILINE)
        script = script.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
        script = re.sub(
            r"^helio predict (?!--data)", f"helio predict --endpoint http://127.0.0.1:{port} ", script, flags=re.M
        )
        # Job control as in a person's own shell, without which `kill %1` knows no job.
        shells = {"bash": ["bash", "-euxmo", "pipefail", "-c", script], "python": [sys.executable, "-c", block]}
        done = subprocess.run(
            shells[language],
            cwd=directory,
            env={**os.environ, "PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block}\nended with {done.returncode}:\n{done.stdout[-3000:]}"
        printed.append(done.stdout)
    return Walk(directory, printed)
