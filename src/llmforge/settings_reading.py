"""Settings as they are given, in a YAML file and by the command line: read, checked, merged.

A settings file in full:

    model: meta-llama/Llama-3.1-8B      # a directory or a Hub id; or a mapping:
    # model: {from_config: config.json, random_weights: true, seed: 0}
    # model: {source: path/to/weights, definition: my_model.py}
    workdir: work/llama                 # the stages' outputs: workdir/checkpoint, workdir/engine
    convert: {dtype: bfloat16}
    build: {tensor_parallel: 2}
    run: {temperature: 0.7}
    bench: {batch_size: [1, 8]}

Every key may be left out. Relative paths are relative to the current directory, as on the
command line, not to the file; a path may start with ~, the user's home.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, TypeVar

from llmforge.errors import SettingsError
from llmforge.settings import SECTIONS, BuildSettings, Kind, ProjectSettings, kinds, option_name

T = TypeVar("T")
_MODEL_KEYS = ("source", "from_config", "random_weights", "seed", "definition")


def merge(section: type[T], *layers: Mapping[str, Any]) -> T:
    """The settings of a stage: each field from the last layer that gives it, else its default.

    A layer maps field names to values; one of None is not given. Values are checked as those of a
    file are, and errors name the command line's option.
    """
    given = {name: v for layer in layers for name, v in layer.items() if v is not None}
    checked = {}
    for known in fields(section):  # type: ignore[arg-type]
        if known.name in given:
            where = option_name(known)
            checked[known.name] = _check(section, known, given[known.name], where)
    return section(**checked)


def check_target_options(settings: BuildSettings, target: str) -> None:
    """Raises SettingsError for an option that the target does not read."""
    for known in fields(BuildSettings):
        readers = known.metadata["targets"]
        if readers and target not in readers and getattr(settings, known.name) != _default(known):
            raise SettingsError(
                f"the target {target} has no option {option_name(known)}; it is for "
                f"{', '.join(readers)}"
            )


def _default(known: Field[Any]) -> Any:
    return known.default_factory() if callable(known.default_factory) else known.default


def load_yaml(path: Path) -> ProjectSettings:
    """The settings in a YAML file. Raises SettingsError, with the file's name, for a file that
    cannot be read, is not YAML, gives a key twice, or has unknown keys or values that are not
    allowed."""
    try:
        data = _parse(path)
        if data is None:
            return ProjectSettings()
        if not isinstance(data, dict):
            raise SettingsError(f"it must hold `key: value` lines, not {_shown(data)}")
        _check_keys(data, ("model", "workdir", *SECTIONS), "")
        sections = {
            name: _section(cls, name, data[name]) for name, cls in SECTIONS.items() if name in data
        }
        return ProjectSettings(
            **_model(data.get("model")),
            workdir=_text(data.get("workdir"), "workdir"),
            sections=sections,
        )
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def _parse(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses mappings that give a key twice, where YAML's own takes the last silently."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise SettingsError(f"line {key_node.start_mark.line + 1}: a key must be a word")
            if key_node.tag != "tag:yaml.org,2002:merge" and key_node.value in seen:
                line = key_node.start_mark.line + 1
                raise SettingsError(f"line {line}: {key_node.value} is given twice")
            seen.add(key_node.value)
        loader.flatten_mapping(node)
        return loader.construct_mapping(node)

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SettingsError(f"not valid YAML: {reason}") from error


def _section(cls: type[Any], name: str, values: Any) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{name} must hold `key: value` lines, not {_shown(values)}")
    known = {f.name: f for f in fields(cls)}
    _check_keys(values, known, f"{name}.")
    return {
        key: _check(cls, known[key], value, f"{name}.{key}")
        for key, value in values.items()
        if not (value is None and kinds(cls)[key].optional)
    }


def _model(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {"model": _text(value, "model")}
    _check_keys(value, _MODEL_KEYS, "model.")
    source = _text(value.get("source"), "model.source")
    config = _text(value.get("from_config"), "model.from_config")
    definition = _text(value.get("definition"), "model.definition")
    if (source is None) == (config is None) or (config and value.get("random_weights") is not True):
        raise SettingsError(
            "model must be a path, or give source, or from_config with random_weights: true"
        )
    seed = value.get("seed")
    if seed is not None and (type(seed) is not int or seed < 0):
        raise SettingsError(f"model.seed must be a whole number of at least 0, not {_shown(seed)}")
    if seed is not None and source is not None:
        raise SettingsError("model.seed is for random weights: give from_config with it")
    return {"model": source, "from_config": config, "seed": seed, "definition": definition}


def _text(value: Any, where: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise SettingsError(f"{where} must be text, not {_shown(value)}")
    return value and os.path.expanduser(value)


def _check_keys(given: Mapping[Any, Any], known: Iterable[str], prefix: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise SettingsError(f"unknown key {prefix}{key}; {hint}")


def _check(section: type[Any], known: Field[Any], value: Any, where: str) -> Any:
    """The value as the dataclass holds it. Raises SettingsError where it is not allowed."""
    kind = kinds(section)[known.name]
    if not kind.repeated:
        return _check_one(known, kind, value, where)
    values = value if isinstance(value, list | tuple) else [value]
    if known.metadata["comma_list"]:
        values = [part.strip() for text in values for part in str(text).split(",")]
    return tuple(_check_one(known, kind, one, where) for one in values)


def _check_one(known: Field[Any], kind: Kind, value: Any, where: str) -> Any:
    rules = known.metadata
    wanted = f"{where} must be {_allowed(kind, rules)}, not {_shown(value)}"
    if kind.base is float and type(value) is int:
        value = float(value)
    if type(value) is not kind.base:
        raise SettingsError(wanted)
    if rules["choices"] and value not in rules["choices"]:
        raise SettingsError(wanted)
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = rules["minimum"], rules["maximum"]
        above = low is None or value >= low
        below = high is None or value <= high
        if not (above and below and math.isfinite(value)):
            raise SettingsError(wanted)
    if isinstance(value, str) and (rules["metavar"] or "").startswith("FILE"):
        return os.path.expanduser(value)  # as a shell does in most places
    return value


def _allowed(kind: Kind, rules: Mapping[str, Any]) -> str:
    if rules["choices"]:
        return f"one of {', '.join(rules['choices'])}"
    if kind.base is bool:
        return "true or false"
    if kind.base is str:
        return "text"
    noun = "a whole number" if kind.base is int else "a number"
    low, high = rules["minimum"], rules["maximum"]
    if low is not None and high is not None:
        return f"{noun} from {low:g} to {high:g}"
    return f"{noun} of at least {low:g}" if low is not None else noun


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
