"""The README tells the truth: its commands run, its make targets, recipes and profile are there."""

import re
from pathlib import Path

import yaml

from cluster.profile import Profile
from cluster.schema import Document, validate
from tests.end_to_end.conftest import README, Walk


def test_every_command_of_the_readme_ends_well(walk: Walk) -> None:
    assert "3" in walk.output_of("helio predict").split("0003.png  ")[1][:1]
    assert '"digest"' in walk.output_of("curl")
    (table,) = [text for text in walk.printed if "knn_accuracy" in text and "COMPLETE" in text]
    assert f"{walk.results['stages']['pretrain']['knn_pretrained']:.6f}" in table


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    named = set(re.findall(r"\bmake (\w+)", README.read_text()))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_profiles_in_the_readme_are_valid() -> None:
    texts = re.findall(r"^```yaml\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    profiles = [validate(Profile, yaml.safe_load(text), Document("README.md", {})) for text in texts]
    assert [profile.name for profile in profiles] == ["lab", "lab", "fleet"]
    assert profiles[0].needs()["pretrain"][1] == 8


def test_files_that_the_readme_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert Path(README.parent, target).exists(), target
