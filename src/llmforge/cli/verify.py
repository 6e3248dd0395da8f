"""`llmforge verify`: are the files whole, and are the logits right?"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmforge.cli.options import PATH, json_option
from llmforge.errors import VerificationError
from llmforge.guard import signals_raise

if TYPE_CHECKING:
    from llmforge.artifact import Manifest
    from llmforge.comm import Comm
    from llmforge.engine.cuda.checking import Check
    from llmforge.engine.store import Engine
    from llmforge.runtime.verify import Comparison


@click.command("verify")
@click.argument("path", type=PATH, metavar="CKPT|ENGINE")
@click.option(
    "--against",
    type=PATH,
    metavar="HF_DIR",
    help="Compare logits with those that transformers computes from this model directory.",
)
@click.option(
    "--ops",
    is_flag=True,
    help="Compare what each kernel of a cuda engine of one rank computes with the meaning of its "
    "ops in plain torch, on this machine's GPU.",
)
@click.option(
    "--stop-after",
    type=click.IntRange(min=0),
    metavar="K",
    help="With --ops: only instructions 0 to K of each step, each with its error.",
)
@json_option
def command(
    path: Path, against: Path | None, ops: bool, stop_after: int | None, as_json: bool
) -> int:
    """Check files against their checksums, and logits against transformers.

    The files are those of a checkpoint or an engine. With --against, random prompts are prefilled
    and decoded, and the logits compared with those of transformers on the original model: their
    largest difference must be within what rounding explains, and the likeliest tokens the same
    but for near ties. An engine of several ranks is run on all of them.

    With --ops, steps of random prompts and decode steps of every batch size that the engine has a
    program for are run up to each of their instructions. The first whose result is not what its
    inputs should give is the one named: this is how a wrong kernel is found.
    """
    if stop_after is not None and not ops:
        raise click.UsageError("--stop-after K says how far --ops goes; give --ops with it")
    if ops and against is not None:
        raise click.UsageError("--ops and --against are two comparisons; give one at a time")
    from llmforge.cli.launch import is_speaker
    from llmforge.cli.ranks import run_ranks
    from llmforge.cli.stages import kind_of

    kind = kind_of(path)
    if against is not None and not (against / "config.json").is_file():
        what = "has no config.json" if against.is_dir() else "is not a directory"
        raise VerificationError(
            f"{against} {what}: --against takes the directory of the original model, as "
            "transformers reads it"
        )
    if ops:
        return _verify_ops(path, kind, stop_after, as_json)
    if against is not None and kind == "engine":
        from llmforge.engine.store import Engine

        engine = Engine.open(path)
        return run_ranks(
            engine.topology.world_size,
            lambda comm: _verify_engine(comm, engine, against, as_json),
        )
    if is_speaker():
        manifest = _manifest(path, kind)
        _check_files(manifest, kind, as_json, report=against is None)
        if against is not None:
            _report(manifest, kind, _compare_checkpoint(path, against), as_json)
    return 0


def _verify_ops(path: Path, kind: str, stop_after: int | None, as_json: bool) -> int:
    """Check a cuda engine's files, then its instructions. Raises VerificationError that names the
    first which is wrong."""
    from llmforge.cli.console import print_json
    from llmforge.comm import LocalComm
    from llmforge.engine.store import Engine
    from llmforge.runtime.loading import load_executable

    if kind != "engine":
        raise VerificationError(
            f"--ops runs the kernels of an engine, and {path} is a {kind}; build it with "
            "--target cuda"
        )
    engine = Engine.open(path)
    ranks = engine.topology.world_size
    if engine.target != "cuda" or ranks > 1:
        raise VerificationError(
            f"--ops checks cuda engines of one rank, and {path} is for the target {engine.target} "
            f"and {ranks} {'rank' if ranks == 1 else 'ranks'}; build the checkpoint with --target "
            "cuda for one rank, or compare this engine's logits with --against HF_DIR"
        )
    _check_files(engine.manifest, kind, as_json, report=not as_json)
    from llmforge.engine.cuda import checking
    from llmforge.engine.cuda.executable import CudaExecutable

    steps, wrong = [], None
    with contextlib.closing(load_executable(engine, LocalComm())) as executable:
        assert isinstance(executable, CudaExecutable)
        for name, batch in checking.steps_to_check(executable, engine.config.vocab_size):
            made = checking.check_instructions(executable, batch, stop_after=stop_after)
            checks = list(_until_wrong(made))
            steps.append({"step": name, "checks": [check.to_dict() for check in checks]})
            if not as_json:
                _print_checks(name, checks, each=stop_after is not None)
            if checks and not checks[-1].passed:
                wrong = f"{name}: {checks[-1]}"
                break
    if as_json:
        print_json({**_result(engine.manifest, kind, []), "steps": steps})
    if wrong:
        raise VerificationError(wrong)
    return 0


def _until_wrong(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks, up to the first that does not pass: it is the last."""
    for check in checks:
        yield check
        if not check.passed:
            return


def _print_checks(step: str, checks: list[Check], *, each: bool) -> None:
    """A step's line, and with `each` one for every instruction before it."""
    if each:
        for check in checks:
            print(f"  {check}", flush=True)
    passed = [check for check in checks if check.passed]
    worst = max(passed, key=lambda check: check.error / check.tolerance, default=None)
    text = f"; nearest to its tolerance: {worst}" if worst else ""
    print(f"{step}: {len(passed)} instructions agree{text}", flush=True)


def _manifest(path: Path, kind: str) -> Manifest:
    from llmforge.artifact import read_manifest
    from llmforge.checkpoint import store as checkpoints
    from llmforge.engine import store as engines

    store = checkpoints if kind == "checkpoint" else engines
    return read_manifest(path, store.MANIFEST, store.KIND, store.FORMAT_VERSION)


def _check_files(manifest: Manifest, kind: str, as_json: bool, *, report: bool) -> None:
    """Raises VerificationError that names the files which are not what they were."""
    from llmforge.artifact import listed, verify_files
    from llmforge.cli.console import print_json, progress

    with progress() as on_progress:
        problems = verify_files(manifest, on_progress)
    if problems and as_json:
        print_json(_result(manifest, kind, problems))
    if problems:
        raise VerificationError(
            f"{manifest.directory} is damaged: {listed(problems)}; copy or make it again"
        )
    if report:
        _report(manifest, kind, None, as_json)


def _verify_engine(comm: Comm, engine: Engine, against: Path, as_json: bool) -> int:
    """One rank's part: rank 0 checks the files before it loads the engine with the others."""
    from llmforge.runtime.generate import follow
    from llmforge.runtime.loading import load_executable

    if comm.rank == 0:
        _check_files(engine.manifest, "engine", as_json, report=False)
    executable = load_executable(engine, comm)
    if comm.rank == 0:
        comparison = _compare(comm, engine, executable, against)
        if comm.size > 1:
            comm.broadcast(None)  # lets the others return
        _report(engine.manifest, "engine", comparison, as_json)
    else:
        follow(executable, comm)
    executable.close()
    return 0


def _compare_checkpoint(checkpoint: Path, against: Path) -> Comparison:
    """The checkpoint in a temporary engine of one rank on the cpu."""
    from llmforge.comm import LocalComm
    from llmforge.engine.build import build
    from llmforge.engine.store import Engine
    from llmforge.runtime.loading import load_executable
    from llmforge.settings import BuildSettings

    with (
        signals_raise(),
        tempfile.TemporaryDirectory(prefix="llmforge-verify-") as directory,
    ):
        path = Path(directory) / "engine"
        # Enough for the comparison's prompts.
        settings = BuildSettings(target="cpu", max_batch_size=4, max_seq_len=64, max_num_tokens=128)
        build(checkpoint, path, settings)
        engine, comm = Engine.open(path), LocalComm()
        with contextlib.closing(load_executable(engine, comm)) as executable:
            return _compare(comm, engine, executable, against)


def _compare(comm: Comm, engine: Engine, executable: Any, against: Path) -> Comparison:
    # Errors apart, transformers' own talk and progress bars do not belong on our stderr.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from llmforge.runtime.verify import compare_with_transformers

    return compare_with_transformers(executable, comm, engine.config, against)


def _result(
    manifest: Manifest, kind: str, problems: list[str], comparison: Comparison | None = None
) -> dict[str, Any]:
    return {
        "path": str(manifest.directory),
        "kind": kind,
        "digest": manifest.digest,
        "files": len(manifest.files),
        "problems": problems,
        "comparison": None if comparison is None else comparison.to_dict(),
    }


def _report(manifest: Manifest, kind: str, comparison: Comparison | None, as_json: bool) -> None:
    """Print the outcome. Raises VerificationError where the logits differ."""
    from llmforge.cli.console import print_json

    if as_json:
        print_json(_result(manifest, kind, [], comparison))
    else:
        print(f"{kind} {manifest.directory}: {len(manifest.files)} files are whole", flush=True)
    if comparison is None:
        return
    text = (
        f"largest difference of {comparison.rows} positions' logits {comparison.max_difference:.3g}"
        f", tolerance {comparison.tolerance:.3g}; likeliest token the same at "
        f"{comparison.greedy_rows}, a near tie at {comparison.near_ties}"
    )
    if not comparison.passed:
        config = manifest.data["config"]
        if config.get("moe") and config["dtype"] != "float32":
            text += (
                "; in 16 bits rounding may choose another expert that is nearly as good, and "
                "then logits differ: to be sure, compare a conversion with --dtype float32"
            )
        raise VerificationError(f"the logits are not those of transformers: {text}")
    if not as_json:
        print(f"logits agree with transformers: {text}", flush=True)
