"""`llmforge bench`: measure an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmforge.cli.options import PATH, config_option, given, project_settings, settings_options
from llmforge.errors import OutputError
from llmforge.replacing import may_write, replace_file
from llmforge.settings import BenchSettings
from llmforge.settings_reading import merge

if TYPE_CHECKING:
    from llmforge.comm import Comm
    from llmforge.engine.store import Engine
    from llmforge.runtime.bench import BenchReport, Distribution


@click.command("bench")
@click.argument("engine", type=PATH, required=False, metavar="[ENGINE]")
@config_option
@settings_options(BenchSettings)
def command(engine: Path | None, config_file: Path | None, **options: Any) -> int:
    """Measure an engine's latency or throughput.

    Without --num-requests, batches of each --batch-size are run by themselves: time to the first
    token (TTFT), time per output token (TPOT), tokens/s. With it, that many requests are served
    in flight. An engine of several ranks runs under mpirun, as with `llmforge run`.
    """
    project = project_settings(config_file)
    settings = merge(BenchSettings, project.sections.get("bench", {}), given(options))

    from llmforge.cli.launch import is_speaker
    from llmforge.cli.ranks import run_ranks
    from llmforge.cli.stages import open_engine
    from llmforge.runtime.bench import check_bench

    opened = open_engine(engine, project.engine, config_file, "bench")
    check_bench(settings, opened.limits)
    report_file = None if settings.json in (None, "-") else Path(settings.json)
    if report_file is not None and is_speaker():
        _check_writable(report_file)
    return run_ranks(
        opened.topology.world_size, lambda comm: _work(comm, opened, settings, report_file)
    )


def _check_writable(path: Path) -> None:
    """Before anything is measured. Raises OutputError."""
    parent = path.parent
    if path.is_dir():
        raise OutputError(f"cannot write {path}: it is a directory")
    if not parent.is_dir():
        raise OutputError(f"cannot write {path}: {parent} is not a directory")
    if not may_write(path):
        raise OutputError(f"cannot write {path}: permission denied")


def _work(comm: Comm, engine: Engine, settings: BenchSettings, report_file: Path | None) -> int:
    """One rank's part."""
    from llmforge.cli.console import print_json, status
    from llmforge.runtime.bench import bench
    from llmforge.runtime.environment import environment
    from llmforge.runtime.generate import follow
    from llmforge.runtime.loading import load_executable

    executable = load_executable(engine, comm)
    if comm.rank != 0:
        follow(executable, comm)
    else:
        report = bench(
            executable,
            comm,
            settings,
            vocab_size=engine.config.vocab_size,
            engine_digest=engine.digest,
            environment=environment(),
            on_progress=status,
        )
        if settings.json == "-":
            print_json(report.to_dict())
        else:
            _print_report(report)
        if report_file is not None:
            _write_report(report, report_file)
    executable.close()
    return 0


def _write_report(report: BenchReport, path: Path) -> None:
    try:
        replace_file(path, (json.dumps(report.to_dict(), indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def _print_report(report: BenchReport) -> None:
    from llmforge.cli.console import print_table

    percentiles = ("p50", "p90", "p99")
    if report.latency:
        first = report.latency[0]
        columns = (
            "batch",
            *(f"TTFT {p} ms" for p in percentiles),
            *(f"TPOT {p} ms" for p in percentiles),
            "prefill tokens/s",
            "decode tokens/s",
            "output tokens/s",
        )
        rows = [
            (
                r.batch_size,
                *_milliseconds(r.ttft),
                *_milliseconds(r.tpot),
                _rate(r.prefill_tokens_per_s),
                _rate(r.decode_tokens_per_s),
                _rate(r.output_tokens_per_s),
            )
            for r in report.latency
        ]
        print_table(
            f"Static batches: {first.input_len} tokens in, {first.output_len} out, "
            f"{first.repeat} repetitions",
            columns,
            rows,
            right=range(len(columns)),
        )
    if (t := report.throughput) is not None:
        print_table(
            f"In flight: {t.num_requests} requests, {t.concurrency} at once, {t.input_len} tokens "
            f"in, {t.output_len} out",
            ("", *percentiles),
            [
                ("TTFT ms", *_milliseconds(t.ttft)),
                ("TPOT ms", *_milliseconds(t.tpot)),
                ("latency ms", *_milliseconds(t.latency)),
                ("requests/s", f"{t.requests_per_s:.2f}", "", ""),
                ("output tokens/s", _rate(t.output_tokens_per_s), "", ""),
                ("total tokens/s", _rate(t.total_tokens_per_s), "", ""),
                ("preemptions", t.num_preemptions, "", ""),
            ],
            right=(1, 2, 3),
        )


def _milliseconds(times: Distribution | None) -> tuple[str, str, str]:
    if times is None:
        return ("-", "-", "-")
    p50, p90, p99 = (f"{seconds * 1000:.2f}" for seconds in (times.p50, times.p90, times.p99))
    return p50, p90, p99


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}"
