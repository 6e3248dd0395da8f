"""What several subcommands share: finding a stage's input, opening it, and showing memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmforge.artifact import size_text
from llmforge.errors import StoreError

if TYPE_CHECKING:
    from llmforge.engine.memory import MemoryPlan
    from llmforge.engine.store import Engine

MEMORY_COLUMNS = ("rank", "weights", "KV cache", "activations", "total")
_MANIFESTS = {"checkpoint": ("manifest.yaml", "convert"), "engine": ("engine.yaml", "build")}


def previous_stage(directory: Path, kind: str, config_file: Path | None) -> None:
    """Raises StoreError with the command that makes it where the artifact that the settings file
    places at `directory` is not there."""
    manifest, command = _MANIFESTS[kind]
    if not (directory / manifest).is_file():
        raise StoreError(
            f"there is no {kind} at {directory} yet; make it with: "
            f"llmforge {command} -c {config_file}"
        )


def open_engine(
    path: Path | None, default: Path | None, config_file: Path | None, command: str
) -> Engine:
    """The engine that the line of a command, or a settings file, names."""
    from llmforge.cli.options import pick
    from llmforge.engine.store import Engine

    directory = pick(path, default, "ENGINE", command)
    if path is None:
        previous_stage(directory, "engine", config_file)
    return Engine.open(directory)


def kind_of(directory: Path) -> str:
    """What the directory holds: checkpoint or engine. Raises StoreError where it is neither."""
    for kind, (manifest, _) in _MANIFESTS.items():
        if (directory / manifest).is_file():
            return kind
    what = "is not a checkpoint or an engine" if directory.is_dir() else "does not exist"
    raise StoreError(
        f"{directory} {what}: give a directory that llmforge convert or llmforge build wrote"
    )


def memory_rows(plans: Iterable[MemoryPlan | Mapping[str, Any]]) -> list[list[str]]:
    """A row of `MEMORY_COLUMNS` for each rank's memory."""
    rows = []
    for rank, plan in enumerate(plans):
        values = plan if isinstance(plan, Mapping) else dataclasses.asdict(plan)
        parts = [values[name] for name in ("weights", "kv_cache", "activations")]
        rows.append([str(rank), *(size_text(n) for n in (*parts, sum(parts)))])
    return rows
