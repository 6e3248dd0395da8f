"""Click options made of the settings dataclasses, so that no default or help is written twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from llmforge.errors import SettingsError
from llmforge.settings import ProjectSettings, kinds, option_name
from llmforge.settings_reading import load_yaml

if TYPE_CHECKING:
    from llmforge.model.definition import Definition

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

PATH = click.Path(path_type=Path)

config_option = click.option(
    "-c",
    "--config",
    "config_file",
    type=PATH,
    help="YAML file with settings of all stages; options on the command line override it.",
    metavar="FILE.yaml",
)
definition_option = click.option(
    "--definition",
    "definition_file",
    type=PATH,
    metavar="FILE.py",
    help="Python file that defines the model, where it is one of your own. It is executed.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def settings_options(section: type[Any]) -> Callable[[F], F]:
    """An option for every field of a settings dataclass. What is not given is None (or empty):
    `settings.merge` then takes the file's value or the default."""

    def decorate(function: F) -> F:
        for known in reversed(dataclasses.fields(section)):
            function = click.option(*_names(section, known), **_attributes(section, known))(
                function
            )
        return function

    return decorate


def _names(section: type[Any], known: dataclasses.Field[Any]) -> tuple[str, ...]:
    option = option_name(known)
    if kinds(section)[known.name].base is bool:
        return (f"{option}/--no-{option[2:]}", known.name)
    return (option, known.name)


def _attributes(section: type[Any], known: dataclasses.Field[Any]) -> dict[str, Any]:
    kind, rules = kinds(section)[known.name], known.metadata
    attributes: dict[str, Any] = {"help": _help(known), "default": None}
    if kind.base is bool:
        return attributes
    attributes["type"] = click.Choice(rules["choices"]) if rules["choices"] else kind.base
    attributes["multiple"] = kind.repeated
    if rules["metavar"]:
        attributes["metavar"] = rules["metavar"]
    elif not rules["choices"]:
        attributes["metavar"] = {int: "N", float: "F", str: "TEXT"}[kind.base]
    return attributes


def _help(known: dataclasses.Field[Any]) -> str:
    """The field's help, the targets that read it where not all do, and its default, unless the
    help tells how one is decided."""
    text: str = known.metadata["help"]
    if targets := known.metadata["targets"]:
        text = f"[{', '.join(targets)}] {text}"
    default = known.default
    if default is dataclasses.MISSING:
        assert known.default_factory is not dataclasses.MISSING
        default = " ".join(map(str, known.default_factory()))
    if default is None or default is False or default == "":
        return text
    return f"{text} Default: {default}."


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were on the command line."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def project_settings(config_file: Path | None) -> ProjectSettings:
    """The settings file's content; all left open where there is none."""
    return ProjectSettings() if config_file is None else load_yaml(config_file)


def own_definition(file: Path | None, project: ProjectSettings) -> Definition | None:
    """The model definition that the command line or the settings file names."""
    named = file or (Path(project.definition) if project.definition else None)
    if named is None:
        return None
    from llmforge.model.definition import load_definition

    return load_definition(named)


def pick(path: Path | None, default: Path | None, name: str, command: str) -> Path:
    """The path given, else the one that the settings file's workdir decides.

    Raises SettingsError where there is neither.
    """
    found = path or default
    if found is None:
        raise SettingsError(
            f"{name} is missing: give it, or a settings file with a workdir: "
            f"llmforge {command} -c FILE.yaml"
        )
    return found
