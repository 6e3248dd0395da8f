"""Real TensorRT engines on this machine's GPU: the tokens they give, and their speed.

    python benchmarks/tensorrt_gpu.py prepare DATA       (anywhere, with torch and transformers)
    python benchmarks/tensorrt_gpu.py measure DATA OUT [PART ...] [--seconds S] [--results FILE]
                                                         (with TensorRT and a GPU; no torch)

`prepare` writes checkpoints and what the cpu target gives for them. `measure` builds and runs them
as jobs of a pool (job_pool.py), a process each, and writes OUT/tensorrt_gpu.json as soon as any of
them has found something, into what earlier measurements found (`--results`). A PART is all of one,
or one job of it, like tiny.olmoe. In the order in which they begin, where none is named:

    speed       a Llama-3.2-1B-shaped float16 model: build time, size, TPOT beside the floor
    example     examples/drama-3m: tokens equal the cpu target's, logits are close
    ranks       the example on two tensor-parallel ranks of one GPU, and on two pipeline stages
    tiny        a tiny random model of every architecture: float32 tokens equal the cpu target's
    tiny_ranks  mixtures of experts on two tensor-parallel ranks
    half        mixtures of experts in float16: logits are close
    level       two layers of the 1B's shape at several optimisation levels: build time and TPOT
    variant     the same build with one thing changed each (tensorrt_variants.py): its time

Jobs run side by side on cores of their own. Build times are therefore those of a busy machine; for
the measurement of TPOT all other jobs are stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Before this file's directory.
sys.path[:0] = [str(HERE.parent / "src"), str(HERE)]

import numpy as np  # noqa: E402
import tensorrt_parts as parts  # noqa: E402
from job_pool import Job, Pool  # noqa: E402
from tensorrt_variants import VARIANTS  # noqa: E402

RESULTS = "tensorrt_gpu.json"
LAYOUTS = ("tensor_parallel", "pipeline_parallel")
LEVELS = ("0", "3", "1", "2")
# The mixtures of the parity cases that differ in how they choose or compute experts.
MIXTURES = ("olmoe", "mixtral", "qwen2-moe", "deepseek-v2", "deepseek-v3", "gpt-oss", "dbrx",
            "granitemoe", "glm4-moe", "qwen3-moe")  # fmt: skip
# The 1B's builds by their options, and the engines that it then has, each of which takes a core.
SPEEDS = {"weights-apart": 3, parts.DEFAULT: 8}


# -- prepare ---------------------------------------------------------------------------------------


def prepare(data: Path) -> None:
    import torch

    sys.path.append(str(HERE.parent / "tests/parity"))
    import models  # type: ignore[import-not-found]

    from llmforge.checkpoint.convert import convert
    from llmforge.errors import LlmforgeError
    from llmforge.settings import ConvertSettings

    shutil.rmtree(data, ignore_errors=True)
    for directory in ("tiny", "half"):
        (data / directory).mkdir(parents=True)
    expected: dict[str, Any] = {"tiny": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)

        def converted(source: Path, to: Path, dtype: str, limits: dict[str, int]) -> Path:
            """A checkpoint at `to`, and the cpu target's engine of it."""
            convert(str(source), to, ConvertSettings(dtype=dtype))
            engine = scratch / "engine"
            parts.build_for("cpu", to, engine, limits)
            return engine

        for dtype in ("float32", "float16"):
            to = data / f"example-{dtype}"
            engine = converted(parts.EXAMPLE, to, dtype, parts.EXAMPLE_LIMITS)
            if dtype == "float32":
                expected["example"] = parts.tokens(engine, parts.EXAMPLE_LIMITS)
            np.save(data / f"example-{dtype}.npy", parts.logits(engine))
        for case in models.CASES:
            to = data / "tiny" / case.name
            case.save(scratch / case.name, torch.float32)
            try:
                engine = converted(scratch / case.name, to, "float32", parts.TINY_LIMITS)
            except LlmforgeError as error:
                print(f"{case.name}: left out ({error})", file=sys.stderr)
                shutil.rmtree(to, ignore_errors=True)
                continue
            expected["tiny"][case.name] = parts.tokens(engine, parts.TINY_LIMITS)
            if case.name in MIXTURES:
                case.save(scratch / f"{case.name}-half", torch.float16)
                to = data / "half" / case.name
                source = scratch / f"{case.name}-half"
                engine = converted(source, to, "float16", parts.TINY_LIMITS)
                np.save(data / "half" / f"{case.name}.npy", parts.logits(engine))
            print(case.name, file=sys.stderr)
    (data / "expected.json").write_text(json.dumps(expected))


# -- measure ---------------------------------------------------------------------------------------


def all_jobs(tiny: list[str]) -> list[Job]:
    """Those most wanted first. tiny: the cases that there are."""
    mixtures = [name for name in MIXTURES if name in tiny]
    first, others = mixtures[:2], mixtures[2:]
    return [
        *(Job("speed", name, engines, 600) for name, engines in SPEEDS.items()),
        Job("example", "float32", 1, 150),
        *(Job("ranks", layout, 2, 150) for layout in LAYOUTS),
        *(Job("tiny", name, 1, 150) for name in first[:1]),
        *(Job("half", name, 1, 150) for name in first),
        *(Job("tiny_ranks", name, 2, 150) for name in first),
        *(Job("level", name, 1, 200) for name in LEVELS[:2]),
        *(Job("variant", name, 1, 200) for name in VARIANTS),
        *(Job("half", name, 1, 150) for name in others),
        *(Job("tiny_ranks", name, 2, 150) for name in others),
        Job("example", "float16", 3, 150),
        *(Job("level", name, 1, 200) for name in LEVELS[2:]),
        *(Job("tiny", name, 1, 150) for name in (*mixtures[1:], *sorted({*tiny} - {*mixtures}))),
    ]


def chosen(jobs: list[Job], names: list[str]) -> list[Job]:
    """The jobs of these names, or parts; all where there are none."""
    known = {name for job in jobs for name in (job.part, job.label)}
    if unknown := sorted(set(names) - known):
        raise SystemExit(f"no such part: {', '.join(unknown)}; there are {', '.join(parts.PARTS)}")
    return [job for job in jobs if not names or {job.part, job.label} & set(names)]


def measure(data: Path, out: Path, names: list[str], seconds: float, before: Path | None) -> None:
    tiny = list(json.loads((data / "expected.json").read_text())["tiny"])
    jobs = chosen(all_jobs(tiny), names)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = json.loads(before.read_text()) if before else {}
    here = machine()
    if results and results["machine"] != here:
        raise SystemExit(f"{before} is of another machine: {results['machine']}; here: {here}")
    results["machine"] = here
    scratch = Path(tempfile.gettempdir()) / "tensorrt_gpu"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Children are this very program, whatever started it.
    command = [sys.executable, os.path.abspath(sys.argv[0]), "job", str(data), str(scratch)]
    pool = Pool(command, scratch, out, out / RESULTS, results)
    pool.run(jobs, seconds)
    for job in jobs:
        if job.label not in results["seconds"]:
            print(job.label, "not begun")
            continue
        found = results["parts"].get(job.part, {}).get(job.name)
        print(job.label, json.dumps(found)[:2000], results["errors"].get(job.label, "")[-500:])


def machine() -> dict[str, Any]:
    from llmforge.engine.tensorrt.device import CudaDevice
    from llmforge.engine.tensorrt.package import Package

    return {
        "gpu": CudaDevice().description,
        "tensorrt": Package.load(parts.TARGET).version,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare")
    preparing.add_argument("data", type=Path)
    measuring = commands.add_parser("measure")
    measuring.add_argument("data", type=Path)
    measuring.add_argument("out", type=Path)
    measuring.add_argument("parts", nargs="*")
    measuring.add_argument("--seconds", type=float, default=3600)
    measuring.add_argument("--results", type=Path)
    job = commands.add_parser("job")
    job.add_argument("data", type=Path)
    job.add_argument("scratch", type=Path)
    job.add_argument("part", choices=parts.PARTS)
    job.add_argument("name")
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.data)
    elif given.command == "measure":
        measure(given.data, given.out, given.parts, given.seconds, given.results)
    else:
        place = parts.Place(given.data, given.scratch, given.part, given.name)
        parts.PARTS[given.part](place)


if __name__ == "__main__":
    main()
