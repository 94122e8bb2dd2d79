"""What a submission carries to a cluster: the code of the four rooms, the recipe and the profile.

Neither data nor secrets: a data set is named by the recipe, a secret by the profile.
"""

import zipfile
from pathlib import Path

import yaml

from cluster.code import ROOMS, ROOT
from cluster.profile import Profile
from cluster.recipe import Recipe

RECIPE, PROFILE = "recipe.yaml", "profile.yaml"
_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every file: the same contents are the same package, which a cluster then has already."""


def write_package(path: Path, recipe: Recipe | None, profile: Profile) -> int:
    """Write the zip file; returns its bytes. Without a recipe it is for a run that has its own."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as package:
        for room in ROOMS:
            for file in sorted((ROOT / room).rglob("*")):
                if file.is_file() and "__pycache__" not in file.parts:
                    _add(package, str(file.relative_to(ROOT)), file.read_bytes())
        if recipe is not None:
            _add(package, RECIPE, yaml.safe_dump(recipe.to_dict(), sort_keys=False).encode())
        there = {**profile.model_dump(exclude_unset=True), "address": "auto", "storage": profile.storage_reference}
        _add(package, PROFILE, yaml.safe_dump(there, sort_keys=False).encode())
    return path.stat().st_size


def _add(package: zipfile.ZipFile, name: str, data: bytes) -> None:
    entry = zipfile.ZipInfo(name, _EPOCH)
    entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
    package.writestr(entry, data)
