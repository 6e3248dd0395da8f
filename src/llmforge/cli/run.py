"""`llmforge run`: generate text with an engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmforge.cli.options import PATH, config_option, given, project_settings, settings_options
from llmforge.errors import RequestError, SettingsError
from llmforge.settings import RunSettings
from llmforge.settings_reading import merge

if TYPE_CHECKING:
    from llmforge.comm import Comm
    from llmforge.engine.store import Engine
    from llmforge.runtime.requests import Completion, PromptEntry, Request
    from llmforge.runtime.tokenizer import Tokenizer

_STANDARD_INPUT = ("-", "/dev/stdin")


@click.command("run")
@click.argument("engine", type=PATH, required=False, metavar="[ENGINE]")
@config_option
@settings_options(RunSettings)
def command(engine: Path | None, config_file: Path | None, **options: Any) -> int:
    """Generate text with an engine.

    ENGINE is what `llmforge build` wrote. An engine of several ranks runs under mpirun, which is
    started if nothing did: `mpirun -n N llmforge run ENGINE` and `llmforge run ENGINE` do the same.
    """
    project = project_settings(config_file)
    settings = _settings(project.sections.get("run", {}), given(options))

    from llmforge.cli.launch import current_job
    from llmforge.cli.ranks import run_ranks
    from llmforge.cli.stages import open_engine

    opened = open_engine(engine, project.engine, config_file, "run")
    is_rank = current_job() is not None
    # A mistake in the prompts is found before ranks are started. Where they are started already,
    # rank 0 reads the prompts once all have met in MPI: only then can it end the others for sure.
    stdin = None if is_rank else _stdin(settings)
    entries = [] if is_rank else _entries(settings, stdin)

    def work(comm: Comm) -> int:
        if is_rank and comm.rank == 0:
            return _work(comm, opened, settings, _entries(settings, _stdin(settings)))
        return _work(comm, opened, settings, entries)

    return run_ranks(opened.topology.world_size, work, stdin=stdin)


def _settings(from_file: Mapping[str, Any], options: Mapping[str, Any]) -> RunSettings:
    """The options over the file's values. Prompts on the command line replace all of the file's."""
    if "prompt" in options or "prompts" in options:
        names = ("prompt", "prompts")
        from_file = {name: value for name, value in from_file.items() if name not in names}
    settings = merge(RunSettings, from_file, options)
    if not settings.prompt and settings.prompts is None:
        raise SettingsError(
            "no prompt: give --prompt TEXT, --prompts FILE.jsonl, or --prompts - to read JSON "
            "lines from standard input"
        )
    return settings


def _stdin(settings: RunSettings) -> bytes | None:
    """The prompts where they can be read only once: from standard input, or from a pipe, like that
    of `--prompts <(command)`. Ranks that are started here get them handed on."""
    from llmforge.cli.stdin import handed_on, read_stdin

    if settings.prompts is None:
        return None
    if settings.prompts in _STANDARD_INPUT:
        return read_stdin()
    if (data := handed_on()) is not None:
        return data
    path = Path(settings.prompts)
    if not path.exists() or path.is_file() or path.is_dir():
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise RequestError(f"cannot read prompts from {path}: {error.strerror}") from error


def _entries(settings: RunSettings, stdin: bytes | None) -> list[PromptEntry]:
    """The prompts: those of --prompt, then those of --prompts."""
    from llmforge.runtime.requests import PromptEntry, parse_jsonl

    entries = [
        PromptEntry(f"--prompt {number}", prompt=text)
        for number, text in enumerate(settings.prompt, start=1)
    ]
    if settings.prompts is None:
        return entries
    name = "standard input" if settings.prompts in _STANDARD_INPUT else settings.prompts
    try:
        data = Path(settings.prompts).read_bytes() if stdin is None else stdin
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise RequestError(f"cannot read prompts from {name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RequestError(f"the prompts in {name} are not UTF-8: {error}") from error
    # Not splitlines(): JSON strings may hold other line separators, like U+2028.
    return entries + parse_jsonl(text.split("\n"), name)


def _work(comm: Comm, engine: Engine, settings: RunSettings, entries: list[PromptEntry]) -> int:
    """One rank's part."""
    from llmforge.runtime.generate import follow
    from llmforge.runtime.loading import load_executable

    prepared = _requests(engine, settings, entries) if comm.rank == 0 else None
    executable = load_executable(engine, comm)
    if prepared is None:
        follow(executable, comm)
    else:
        _generate(comm, engine, executable, settings, entries, *prepared)
    executable.close()
    return 0


def _requests(
    engine: Engine, settings: RunSettings, entries: list[PromptEntry]
) -> tuple[list[Request], Tokenizer | None]:
    from llmforge.runtime.requests import resolve_all
    from llmforge.runtime.scheduler import refusal
    from llmforge.runtime.tokenizer import generation_defaults, load_tokenizer

    config = engine.config
    tokenizer = load_tokenizer(engine.tokenizer_directory)
    requests = resolve_all(
        entries,
        settings,
        generation_defaults(engine.tokenizer_directory),
        tokenizer,
        config.eos_token_ids,
        lambda request: refusal(request, engine.limits, config.vocab_size),
    )
    return requests, tokenizer


def _generate(
    comm: Comm,
    engine: Engine,
    executable: Any,
    settings: RunSettings,
    entries: list[PromptEntry],
    requests: list[Request],
    tokenizer: Tokenizer | None,
) -> None:
    from llmforge.cli.output import printer
    from llmforge.runtime.generate import generate

    output = printer(settings, entries)
    started = time.perf_counter()
    completions = generate(
        executable,
        comm,
        requests,
        vocab_size=engine.config.vocab_size,
        tokenizer=tokenizer,
        on_text=output.text if settings.stream else None,
        on_finish=output.finish,
    )
    if not settings.json:
        _print_summary(completions, time.perf_counter() - started)


def _print_summary(completions: list[Completion], seconds: float) -> None:
    from llmforge.cli.console import status

    tokens = sum(completion.num_drawn for completion in completions)
    requests = f"{len(completions)} {'request' if len(completions) == 1 else 'requests'}"
    status(f"{requests}, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s")
