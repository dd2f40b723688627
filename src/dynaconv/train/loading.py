"""Recipes from YAML files, by name, with overrides; errors name the nearest key."""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaconv import _checks
from dynaconv.train.recipe import (
    BudgetSection,
    DataSection,
    KernelsSection,
    MaskingSection,
    ModelSection,
    OptimSection,
    Recipe,
    TrainerSection,
)

if TYPE_CHECKING:
    import jsonargparse

SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "masking": MaskingSection,
    "kernels": KernelsSection,
    "budget": BudgetSection,
    "data": DataSection,
    "optim": OptimSection,
    "trainer": TrainerSection,
}
OPTIONAL = ("masking", "kernels", "budget")
Overrides = Sequence[str] | Mapping[str, Any]


def load_recipe(source: str | Path | Mapping[str, Any] | Recipe, overrides: Overrides = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: a YAML file, the name of a shipped recipe (`list_recipes()`), a run folder (its config.yaml), a dict, or
            a Recipe.
        overrides: a dict with nested or dotted keys, or command line words: ["--budget.target", "0.5"],
            ["--optim.lr=0.01"]; "--budget none" takes a section out.
    Raises:
        FileNotFoundError: no such recipe; ValueError: not YAML, an unknown key (the nearest one is named), a value of
            the wrong type or out of range.

    >>> load_recipe({"model": {"name": "resnet8_scenes"}, "data": {"name": "scenes"}}, ["--optim.lr", "0.2"]).optim.lr
    0.2
    """
    content, origin = _read(source)
    for key, value in _pairs(overrides):
        _assign(content, key.split("."), value)
    return _build(content, origin)


def list_recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(_shipped())


def recipe_path(name: str) -> Path:
    """File of a shipped recipe.

    Raises:
        FileNotFoundError: no recipe of that name (the nearest ones are named).
    """
    shipped = _shipped()
    if name not in shipped:
        raise FileNotFoundError(
            str(_checks.unknown("recipe", name, shipped, "(or give the path of a YAML file)"))
        )
    return shipped[name]


def recipe_parser(**options: Any) -> jsonargparse.ArgumentParser:
    """A jsonargparse parser that knows every key of a recipe; its help explains them.

    Args:
        options: passed to jsonargparse.ArgumentParser, such as prog and description.
    """
    import jsonargparse

    parser = jsonargparse.ArgumentParser(exit_on_error=False, **options)
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    parser.add_argument(
        "--calibrate", type=list[float], default=[], help="budgets to calibrate for after training"
    )
    return parser


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    import yaml

    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, width=110)


def _shipped() -> dict[str, Path]:
    """Recipes beside this package (installed) or at the top of the source tree (editable)."""
    here = Path(__file__).resolve().parent
    found: dict[str, Path] = {}
    for folder in (here.parents[2] / "recipes", here / "recipes"):
        if folder.is_dir():
            found.update({file.stem: file for file in sorted(folder.glob("*.yaml"))})
    return found


def _read(source: str | Path | Mapping[str, Any] | Recipe) -> tuple[dict[str, Any], str]:
    if isinstance(source, Recipe):
        return source.to_dict(), "the recipe"
    if isinstance(source, Mapping):
        return copy.deepcopy(dict(source)), "the recipe"
    path = Path(source)
    if path.is_dir() and (path / "config.yaml").is_file():
        path = path / "config.yaml"
    if not path.is_file():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise _checks.train_no_recipe_file(path, list_recipes())
        path = recipe_path(str(source))
    return _parse_yaml(path), str(path)


def _parse_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _checks.train_not_yaml(path, " ".join(str(error).split())) from None
    if not isinstance(content, dict):
        raise _checks.train_not_yaml(
            path, f"expected sections such as model: and data:, got {type(content).__name__}"
        )
    return content


def _pairs(overrides: Overrides) -> Iterable[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    words = list(overrides)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise _checks.train_bad_override(word)
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise _checks.train_override_without_value(key)
            text = words.pop(0)
        yield key, _value(text)


def _value(text: str) -> Any:
    import yaml

    if text.lower() == "none":
        return None
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _assign(content: dict[str, Any], path: list[str], value: Any) -> None:
    """Set a nested key; dicts are merged."""
    key, rest = path[0], path[1:]
    if rest:
        inner = content.get(key)
        content[key] = dict(inner) if isinstance(inner, dict) else {}
        _assign(content[key], rest, value)
    elif isinstance(value, Mapping) and isinstance(content.get(key), dict):
        for name, entry in value.items():
            _assign(content[key], [str(name)], entry)
    else:
        content[key] = value


def _build(content: dict[str, Any], origin: str) -> Recipe:
    content = {key: value for key, value in content.items() if not (key in OPTIONAL and value is None)}
    _check_keys(content, origin)
    parsed = _parse(_numbers(content), origin)
    made = {
        name: SECTIONS[name](**parsed[name].as_dict())
        for name in SECTIONS
        if name in content or name not in OPTIONAL
    }
    return Recipe(**made, calibrate=parsed["calibrate"])


def _check_keys(content: dict[str, Any], origin: str) -> None:
    for key, value in content.items():
        if key not in (*SECTIONS, "calibrate"):
            raise _checks.unknown("section", str(key), (*SECTIONS, "calibrate"), f"(in {origin})")
        if key not in SECTIONS:
            continue
        if not isinstance(value, dict):
            raise _checks.train_wrong_type(origin, key, "a section with keys", value)
        known = [f"{key}.{f.name}" for f in fields(SECTIONS[key])]
        for name in value:
            if f"{key}.{name}" not in known:
                raise _checks.unknown("recipe key", f"{key}.{name}", known, f"(in {origin})")
    for key in ("model", "data"):
        if not content.get(key, {}).get("name"):
            raise _checks.train_lacks_name(origin, key)


def _numbers(content: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text; a recipe means the number."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", content):
        return float(content)
    return content


def _parse(content: dict[str, Any], origin: str) -> Any:
    try:
        return recipe_parser().parse_object(content)
    except (argparse.ArgumentError, TypeError, ValueError) as error:
        raise _explain(error, content, origin) from None


def _explain(error: Exception, content: dict[str, Any], origin: str) -> ValueError:
    match = re.search(r'[Kk]ey "([\w.]+)"', str(error))
    if match is None:
        return ValueError(f"{origin}: {' '.join(str(error).split())}")
    key = match.group(1)
    section, _, name = key.partition(".")
    value = content.get(section)
    expected = "a list of numbers"
    if name:
        value = value.get(name) if isinstance(value, dict) else value
        expected = next((str(f.type) for f in fields(SECTIONS[section]) if f.name == name), "another type")
    return _checks.train_wrong_type(origin, key, expected, value)
