"""Strict sections of recipes and profiles: YAML with line numbers, overrides, and errors that say how to mend them."""

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from cluster.errors import RecipeError

Key = tuple[str, ...]


class Section(BaseModel):
    """Base of every part of a recipe or profile: typed strictly, immutable, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


S = TypeVar("S", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which `1e-3` is a number, as every user expects (YAML 1.1 reads it as text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass
class Document:
    """A YAML mapping with the line of each key, changed by overrides."""

    name: str
    data: dict[str, Any]
    lines: dict[Key, int] = field(default_factory=dict)

    def where(self, key: Key) -> str:
        """Where `key`, or else its nearest parent, was written: `file:line` or `override key`."""
        for end in range(len(key), 0, -1):
            line = self.lines.get(key[:end])
            if line is not None:
                return f"{self.name}:{line}" if line else f"override {'.'.join(key[:end])}"
        return self.name

    def override(self, assignment: str, roots: Iterable[str]) -> None:
        """Apply `section.key=value`; the value is read as YAML. `roots` are the valid first parts."""
        path, equals, text = assignment.partition("=")
        key = tuple(path.strip().split("."))
        if not equals or not all(key):
            raise RecipeError(f"an override must read section.key=value, got {assignment!r}")
        if key[0] not in roots:
            raise RecipeError(f"override {path}: there is no section {key[0]!r}{nearest(key[0], roots)}")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that is none, as 2024-13-01
            raise RecipeError(f"override {path}: the value {text!r} is not valid YAML") from error
        node = self.data
        for depth, part in enumerate(key[:-1]):
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, dict):
                raise RecipeError(f"override {path}: {'.'.join(key[: depth + 1])} is a value and has no keys")
            node = child
        node[key[-1]] = value
        self.lines[key] = 0


def read_document(path: Path, name: str | None = None) -> Document:
    """Read a YAML file whose top level is a mapping, with the line of each key.

    Raises RecipeError when the file is missing, is not YAML, repeats a key, or is not a mapping.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name}: cannot be read as text: {error}") from error
    try:
        root = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{name}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    except ValueError as error:
        raise RecipeError(f"{name}: a value is no valid date ({error}): put it in quotes") from error
    if not isinstance(root, yaml.MappingNode) or not isinstance(data, dict):
        raise RecipeError(f"{name}: must be a mapping of sections, got {type(data).__name__}")
    lines: dict[Key, int] = {}
    _collect_lines(root, (), lines, name)
    return Document(name, data, lines)


def _collect_lines(node: yaml.MappingNode, prefix: Key, lines: dict[Key, int], name: str) -> None:
    for key_node, value_node in node.value:
        key = (*prefix, str(key_node.value))
        line = key_node.start_mark.line + 1
        if key in lines:
            raise RecipeError(f"{name}:{line}: {'.'.join(key)} is given twice, first in line {lines[key]}")
        lines[key] = line
        if isinstance(value_node, yaml.MappingNode):
            _collect_lines(value_node, key, lines, name)


def validate(model: type[S], data: object, document: Document, prefix: Key = ()) -> S:
    """Build `model` from plain data. Raises RecipeError: one line with the place, the rule and the mend."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        errors = error.errors()
        first = errors[0]
        # Union and tagged-union branches appear as extra path parts that are no keys of the file.
        location = tuple(str(part) for part in first["loc"])
        key = prefix + location
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise RecipeError(f"{document.where(key)}: {_explain(model, first, key, location)}{more}") from None


def _explain(model: type[BaseModel], error: Mapping[str, Any], key: Key, location: Key) -> str:
    dotted = ".".join(key) or "the file"
    if error["type"] == "extra_forbidden":
        siblings = _fields_at(model, location[:-1])
        return f"unknown key {dotted}{nearest(key[-1], siblings)}"
    if error["type"] == "missing":
        return f"{dotted} is required and is not given"
    rule = str(error["msg"]).removeprefix("Value error, ")
    rule = rule[0].lower() + rule[1:]
    if error["type"] == "value_error":
        return f"{dotted}: {rule}" if key else rule
    return f"{dotted}: {rule}, got {error['input']!r}"


def _fields_at(model: type[BaseModel], location: Key) -> list[str]:
    """The valid keys of the section that `location` leads to."""
    for part in location:
        info = model.model_fields.get(part)
        if info is None:
            continue
        annotation = info.annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        inner = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def nearest(word: object, valid: Iterable[str], listed: str = "valid keys are") -> str:
    """How to mend a name that is not valid: the nearest one, or all there are, behind `listed`."""
    names = sorted(valid)
    close = difflib.get_close_matches(str(word), names, n=1, cutoff=0.5)
    if close:
        return f": did you mean {close[0]}?"
    return f": {listed} {', '.join(names)}" if names else ""
