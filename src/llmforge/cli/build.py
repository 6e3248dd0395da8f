"""`llmforge build`: checkpoint → engine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmforge.cli.options import (
    PATH,
    config_option,
    definition_option,
    given,
    own_definition,
    pick,
    project_settings,
    settings_options,
)
from llmforge.settings import BuildSettings
from llmforge.settings_reading import merge

if TYPE_CHECKING:
    from llmforge.engine.memory import MemoryPlan


@click.command("build")
@click.argument("checkpoint", type=PATH, required=False, metavar="[CKPT]")
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="ENGINE",
    help="Directory to write. Default: WORKDIR/engine.",
)
@config_option
@definition_option
@settings_options(BuildSettings)
def command(
    checkpoint: Path | None,
    output: Path | None,
    config_file: Path | None,
    definition_file: Path | None,
    **options: Any,
) -> None:
    """Compile a checkpoint into an engine, one part for each rank.

    CKPT is what `llmforge convert` wrote. The engine holds all that `llmforge run` needs.
    """
    project = project_settings(config_file)
    settings = merge(BuildSettings, project.sections.get("build", {}), given(options))
    checkpoint_given = checkpoint is not None
    checkpoint = pick(checkpoint, project.checkpoint, "CKPT", "build")
    output = pick(output, project.engine, "-o ENGINE", "build")

    from llmforge.artifact import size_text
    from llmforge.cli.console import progress, status
    from llmforge.cli.errors import warn
    from llmforge.cli.stages import previous_stage
    from llmforge.engine.build import build

    if not checkpoint_given:
        previous_stage(checkpoint, "checkpoint", config_file)
    definition = own_definition(definition_file, project)
    with progress() as report:
        manifest = build(
            checkpoint,
            output,
            settings,
            definition=definition,
            progress=report,
            warn=warn,
            on_plan=_print_plan,
        )
    nbytes = sum(size for size, _ in manifest.files.values())
    ranks = len(manifest.data["memory"])
    status(
        f"engine {output}: {ranks} {'rank' if ranks == 1 else 'ranks'} for "
        f"{manifest.data['target']}, {size_text(nbytes)}"
    )


def _print_plan(plans: Sequence[MemoryPlan]) -> None:
    from llmforge.cli.console import print_table
    from llmforge.cli.stages import MEMORY_COLUMNS, memory_rows

    print_table(
        "Memory of each rank",
        MEMORY_COLUMNS,
        memory_rows(plans),
        right=(1, 2, 3, 4),
        file=sys.stderr,
    )
