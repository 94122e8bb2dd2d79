"""A recipe: the full description of a run, each section owned by its room."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from cluster import catalog
from cluster.errors import RecipeError
from cluster.schema import Document, Section, nearest, read_document, validate

SHIPPED = Path(__file__).resolve().parent.parent / "jobs" / "recipes"

S = TypeVar("S", bound=Section)


class Header(Section):
    """The part of a recipe that belongs to no room."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=80)
    """Names runs, the data set and the registered model."""
    description: str = ""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """All randomness of the run derives from it."""


@dataclass(frozen=True)
class Given:
    """How a recipe was given."""

    recipe: str
    """A file, or the name of a shipped one."""
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """A validated recipe. `section(DataConfig)` returns the section of that type."""

    header: Header
    sections: dict[str, Section]
    given: Given | None = None
    """None: not by name, but read from a run, or made of sections."""

    @property
    def name(self) -> str:
        return self.header.name

    @property
    def seed(self) -> int:
        return self.header.seed

    def section(self, kind: type[S]) -> S:
        """The one section of type `kind`."""
        for section in self.sections.values():
            if isinstance(section, kind):
                return section
        raise KeyError(kind.__name__)

    def with_sections(self, *sections: Section) -> "Recipe":
        """The same recipe with these sections in place of its own of their types. Raises RecipeError."""
        names = {type(section): name for name, section in self.sections.items()}
        for section in sections:
            if type(section) not in names:
                valid = ", ".join(kind.__name__ for kind in names)
                raise RecipeError(f"{type(section).__name__} is no section of a recipe: those are {valid}")
        return replace(self, sections={**self.sections, **{names[type(s)]: s for s in sections}}, given=None)

    def to_dict(self) -> dict[str, Any]:
        """The resolved recipe, every default written out, as plain data."""
        return {**self.header.model_dump(), **{k: s.model_dump() for k, s in self.sections.items()}}

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved recipe, hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with helio, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(reference: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load a recipe file, or a shipped recipe by name, and apply `section.key=value` overrides.

    Raises RecipeError, one line, for anything that does not validate.
    """
    path = Path(reference)
    if len(reference) > 255:
        raise RecipeError(f"no file has a name of {len(reference)} characters: name a recipe file or a shipped recipe")
    if reference in shipped_recipes():
        document = read_document(shipped_recipes()[reference], f"{reference}.yaml")
    elif path.is_file():
        document = read_document(path)
    else:
        raise RecipeError(
            f"no recipe file {reference!r} and no shipped recipe of that name"
            f"{nearest(reference, shipped_recipes(), 'there are')} (`helio recipes` lists them)"
        )
    for override in overrides:
        _write_out_default(document, override)
        document.override(override, [*catalog.SECTIONS, *Header.model_fields])
    return replace(build_recipe(document), given=Given(reference, tuple(overrides)))


def make_recipe(name: str, *sections: Section, seed: int = 0, description: str = "") -> Recipe:
    """A recipe of these sections, and the defaults of the others. Raises RecipeError."""
    document = Document("the recipe", {"name": name, "seed": seed, "description": description})
    return build_recipe(document).with_sections(*sections)


def build_recipe(document: Document) -> Recipe:
    """Validate a document section by section. Raises RecipeError."""
    for key in document.data:
        if key not in catalog.SECTIONS and key not in Header.model_fields:
            valid = [*catalog.SECTIONS, *Header.model_fields]
            raise RecipeError(f"{document.where((key,))}: unknown section {key}{nearest(key, valid)}")
    header = {k: v for k, v in document.data.items() if k in Header.model_fields}
    sections = {
        name: validate(catalog.load(target), _given(document, name), document, (name,))
        for name, target in catalog.SECTIONS.items()
    }
    return Recipe(validate(Header, header, document), sections)


def _given(document: Document, section: str) -> object:
    given = document.data.get(section)
    return {} if given is None else given


def _write_out_default(document: Document, override: str) -> None:
    """Let `tune.space.learning_rate=…` change one entry of a default that the recipe leaves out, not replace it."""
    key = override.partition("=")[0].strip().split(".")
    if len(key) < 3 or key[0] not in catalog.SECTIONS or not isinstance(_given(document, key[0]), dict):
        return
    field = catalog.load(catalog.SECTIONS[key[0]]).model_fields.get(key[1])
    section = document.data.setdefault(key[0], {}) or {}
    if field is None or key[1] in section or not isinstance(field.default, dict):
        return
    document.data[key[0]] = {**section, key[1]: {k: v.model_dump(exclude_none=True) for k, v in field.default.items()}}
