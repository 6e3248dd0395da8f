"""`llmforge`: the group of subcommands, each loaded when it is called.

This file's imports are what `llmforge --help` costs: click and nothing else that matters.
"""

from __future__ import annotations

import importlib

import click

from llmforge import __version__
from llmforge.cli.errors import NoReader, guard
from llmforge.cli.interrupts import spare_imports
from llmforge.cli.launch import is_speaker
from llmforge.cli.streams import prepare

# The subcommands and their short helps, here because asking the modules would import them all.
COMMANDS = {
    "convert": "Convert a model's weights into a checkpoint.",
    "build": "Compile a checkpoint into an engine, one part for each rank.",
    "run": "Generate text with an engine.",
    "bench": "Measure an engine's latency or throughput.",
    "inspect": "Show what a checkpoint or an engine holds.",
    "verify": "Check files against their checksums, and logits against transformers.",
    "doctor": "Show what this machine can build and run, and why not.",
}
# Those that run an engine, on all of its ranks.
USE_RANKS = ("run", "bench", "verify")


class LazyGroup(click.Group):
    """A group whose subcommands are the `command` of the module of their name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"llmforge.cli.{cmd_name}").command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise NoReader from error  # click would end with status 1

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmforge")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Compile large language models into engines, and run them: convert, build, run."""
    if ctx.invoked_subcommand not in USE_RANKS and not is_speaker():
        ctx.exit()  # under mpirun by mistake: once is enough


def main() -> None:
    """The entry point: runs the command line and exits with its status."""
    prepare()
    spare_imports()
    raise SystemExit(guard(lambda: cli.main(prog_name="llmforge", standalone_mode=False)))
