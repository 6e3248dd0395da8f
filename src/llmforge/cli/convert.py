"""`llmforge convert`: a model's weights → checkpoint."""

from __future__ import annotations

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
from llmforge.errors import SettingsError
from llmforge.settings import ConvertSettings, ProjectSettings
from llmforge.settings_reading import merge

if TYPE_CHECKING:
    from llmforge.checkpoint.families.own import OwnFamily


@click.command("convert")
@click.argument("source", required=False)
@click.option(
    "-o",
    "--output",
    type=PATH,
    metavar="CKPT",
    help="Directory to write. Default: WORKDIR/checkpoint.",
)
@config_option
@click.option(
    "--from-config",
    type=PATH,
    metavar="config.json",
    help="Make a model of this shape instead of reading one; needs --random-weights.",
)
@click.option("--random-weights", is_flag=True, help="Draw the weights of --from-config.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    metavar="N",
    help="Seed of the random weights. Default: 0.",
)
@definition_option
@settings_options(ConvertSettings)
def command(
    source: str | None,
    output: Path | None,
    config_file: Path | None,
    from_config: Path | None,
    random_weights: bool,
    seed: int | None,
    definition_file: Path | None,
    **options: Any,
) -> None:
    """Convert a model's weights into a checkpoint.

    SOURCE is a Hub id, or a model directory or archive: Hugging Face, NeMo, TensorRT-LLM, Meta's
    Llama files. The checkpoint serves any target and any number of ranks.
    """
    project = project_settings(config_file)
    settings = merge(ConvertSettings, project.sections.get("convert", {}), given(options))
    output = pick(output, project.checkpoint, "-o CKPT", "convert")
    if random_weights != (from_config is not None):
        raise SettingsError("--from-config and --random-weights go together: give both or neither")
    if source is None and from_config is None:
        source, from_config, seed = _model(project, seed)
    own = own_definition(definition_file, project)
    _convert(source, output, settings, from_config, seed, own)


def _model(
    project: ProjectSettings, seed: int | None
) -> tuple[str | None, Path | None, int | None]:
    """The settings file's model: source, config for random weights, their seed."""
    if project.from_config is not None:
        return None, Path(project.from_config), project.seed if seed is None else seed
    if project.model is None:
        raise SettingsError(
            "SOURCE is missing: give a model directory, a Hub id, --from-config config.json "
            "--random-weights, or a settings file with a model"
        )
    return project.model, None, seed


def _convert(
    source: str | None,
    output: Path,
    settings: ConvertSettings,
    from_config: Path | None,
    seed: int | None,
    own: OwnFamily | None,
) -> None:
    from llmforge.artifact import size_text
    from llmforge.checkpoint.convert import convert
    from llmforge.cli.console import progress, status
    from llmforge.cli.errors import warn

    with progress() as report:
        manifest = convert(
            source,
            output,
            settings,
            progress=report,
            warn=warn,
            notice=status,
            from_config=from_config,
            seed=seed,
            own=own,
        )
    nbytes = sum(size for size, _ in manifest.files.values())
    status(
        f"checkpoint {output}: {manifest.data['num_parameters']:,} parameters in "
        f"{manifest.data['dtype']}, {size_text(nbytes)}"
    )
