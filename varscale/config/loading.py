"""Recipes and overrides: YAML in, a checked Config out; every mistake is named together with the nearest valid key."""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from varscale.config.objectives import OBJECTIVES
from varscale.config.schema import Config
from varscale.config.section import Section
from varscale.errors import UserError

Model = TypeVar("Model", bound=Section)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml") for p in resources.files("varscale.recipes").iterdir() if p.name.endswith(".yaml")
    )


def load_config(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a name or the path of a YAML file), apply `key.sub=value` overrides, check the whole.

    Raises UserError naming the recipe or key at fault and the nearest valid one.
    """
    return parse_config(_read_recipe(recipe), recipe, overrides)


def parse_config(values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """Check plain values (from a recipe or a run's manifest) with `overrides`; `source` is named in errors."""
    return parse_section(Config, values, source, overrides)


def parse_section(model: type[Model], values: dict[str, Any], source: str, overrides: Sequence[str] = ()) -> Model:
    """Make a model of plain values, into which `key.sub=value` overrides are written; `source` is named in errors.

    Raises UserError naming the key at fault and the nearest valid one.
    """
    for override in overrides:
        _apply(values, override, model)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0], source, model)) from None


def to_yaml(config: Config) -> str:
    """The resolved configuration as a recipe that gives the same run again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        name, text = recipe, resources.files("varscale.recipes").joinpath(f"{recipe}.yaml").read_text()
    elif recipe.endswith((".yaml", ".yml")):
        path = Path(recipe)
        try:
            name, text = path.stem, path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--config {recipe}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"--config {recipe}: not a text file ({error})") from None
    else:
        raise UserError(
            f"--config {recipe!r} is neither a recipe nor a path ending in .yaml{_nearest(recipe, recipe_names())}"
        )
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # the latter: a date that there is not
        raise UserError(f"--config {recipe}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"--config {recipe}: holds no mapping of keys to values")
    return {"name": name, **values}


def _apply(values: dict[str, Any], override: str, model: type[Section]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    *sections, last = key.split(".")
    place = values
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            nearest = _nearest(key, _all_keys(model))
            raise UserError(f"override {override!r}: {section} is a value, not a section{nearest}")
    place[last] = value


def _explain(error: Any, source: str, model: type[Section]) -> str:
    """One line for pydantic's first error."""
    key = _key(error["loc"])
    if error["type"] == "extra_forbidden":
        if error["loc"][0] == "objective" and error["loc"][1] in OBJECTIVES:
            return f"{source}: {_unknown_to_objective(*error['loc'][1:3])}"
        return f"{source}: unknown key {key!r}{_nearest_key(key, model)}"
    if error["type"] == "missing":
        *section, last = error["loc"]
        if isinstance(last, int):
            return f"{source}: {_key(section)} needs {last + 1} values, found {len(error['input'])}"
        return f"{source}: the key {key!r} is missing"
    if error["type"] == "model_type":
        inside = [k for k in _all_keys(model) if k.startswith(f"{key}.")]
        return f"{source}: {key} is a section, not a value; set one of {', '.join(inside)}"
    if error["type"] == "value_error":
        return f"{source}: {error['ctx']['error']}"
    if error["type"] == "literal_error":
        choices = [c.strip("' ") for c in error["ctx"]["expected"].replace(" or ", ", ").split(",")]
        found = error["input"]
        return f"{source}: {key} is {found!r}; choose from {', '.join(choices)}{_nearest(str(found), choices)}"
    if error["type"].startswith("union_tag"):
        found = error["input"].get("name") if isinstance(error["input"], dict) else error["input"]
        names = list(OBJECTIVES)
        return f"{source}: {key}.name is {found!r}; choose from {', '.join(names)}{_nearest(str(found), names)}"
    message = error["msg"]
    return f"{source}: {key} is {error['input']!r}: {message[0].lower()}{message[1:]}"


def _key(location: Sequence[str | int]) -> str:
    """Pydantic's location without the tag it puts in for a choice of models."""
    parts = [str(part) for part in location]
    if len(parts) > 1 and parts[0] == "objective" and parts[1] in OBJECTIVES:
        del parts[1]
    return ".".join(parts)


def _all_keys(model: type[Section]) -> list[str]:
    return sorted(set(_walk(model, "")))


def _walk(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        options = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        nested = [a for a in options if issubclass(a, BaseModel)]
        if not nested:
            yield prefix + name
        for inner in nested:
            yield from _walk(inner, f"{prefix}{name}.")


def _nearest_key(key: str, model: type[Section]) -> str:
    """A key of the same last name anywhere, else the most similar one in the same section, else anywhere."""
    section, _, last = key.rpartition(".")
    keys = _all_keys(model)
    elsewhere = [k for k in keys if k.rpartition(".")[2] == last]
    if elsewhere:
        return f"; nearest: {elsewhere[0]}"
    same_section = [k for k in keys if k.rpartition(".")[0] == section]
    return _nearest(key, same_section) or _nearest(key, keys)


def _unknown_to_objective(name: str, key: str) -> str:
    own = OBJECTIVES[name].model_fields
    others = [other for other, section in OBJECTIVES.items() if key in section.model_fields]
    hint = f", but {', '.join(others)} {'has' if len(others) == 1 else 'have'}" if others else ""
    return f"the objective {name} has no key {key!r}{hint}{_nearest(key, list(own))}"


def _nearest(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices, 1, 0.4)
    return f"; nearest: {close[0]}" if close else ""
