"""Rules of the repository that no other tool checks."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cluster", "jobs", "tuning", "serving")
MACHINE_SPECIFIC = re.compile(rb"(?<![\w.])/(?:work|root)/|index[-_]url|file:/{3}")
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}


def modules() -> Iterator[Path]:
    for room in ROOMS:
        yield from sorted((ROOT / room).rglob("*.py"))


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_no_tracked_file_names_a_machine_or_a_package_index() -> None:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git work tree")
    found = []
    for name in listed.decode().split("\0"):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            found += [f"{name}: {match.group().decode()}" for match in MACHINE_SPECIFIC.finditer(path.read_bytes())]
    assert found == []


def test_every_module_is_named_for_its_idea() -> None:
    nameless = [path for path in modules() if NAMELESS & set(path.relative_to(ROOT).with_suffix("").parts)]
    assert nameless == []


def test_every_module_has_a_docstring() -> None:
    bare = [str(path.relative_to(ROOT)) for path in modules() if not ast.get_docstring(ast.parse(path.read_bytes()))]
    assert bare == []


def test_every_room_is_shipped_typed_and_held_to_the_import_rule() -> None:
    tool = project()["tool"]
    layers = tool["importlinter"]["contracts"][0]["layers"]
    assert layers == ["tuning | serving", "jobs", "cluster"]
    for packages in (
        tool["hatch"]["build"]["targets"]["wheel"]["packages"],
        tool["mypy"]["packages"],
        tool["importlinter"]["root_packages"],
        [path.parent.name for path in ROOT.glob("*/__init__.py") if path.parent.name != "tests"],
    ):
        assert sorted(packages) == sorted(ROOMS)


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line)] == []
    pins = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)

    declared = project()["project"]
    texts = declared["dependencies"] + [text for extra in declared["optional-dependencies"].values() for text in extra]
    for requirement in map(Requirement, texts):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert pin in requirement.specifier, f"constraints.txt pins {requirement.name} to {pin}, not {requirement}"
