"""Building with the real tensorrt_rtx: engines, engine.yaml, options, errors, and nothing left."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
from cuda_models import tiny
from test_bad_input import CONFIG, llmforge

from llmforge.artifact import no_progress
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.store import Checkpoint
from llmforge.engine.apart import RankJob, at_a_time, compile_apart
from llmforge.engine.step import Limits
from llmforge.engine.tensorrt import package as packages
from llmforge.engine.tensorrt.builder import BuildOptions, build_engine
from llmforge.engine.tensorrt.io import profiles
from llmforge.engine.tensorrt.lowering.rank import Engine
from llmforge.engine.tensorrt.network import Network
from llmforge.engine.tensorrt.package import Package
from llmforge.engine.tensorrt.plan import RankPlan, Step
from llmforge.engine.tensorrt.target import TensorRTTarget
from llmforge.engine.weights import RankWeights
from llmforge.errors import BuildError, StoreError
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.settings import BuildSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
LIMITS = Limits(2, 64, 32, 64, 2)


def convert(directory: Path, dtype: str, **changes: Any) -> Path:
    import json

    config = directory / "config.json"
    config.write_text(json.dumps({**CONFIG, "vocab_size": 64, **changes}))
    made = ("--from-config", config, "--random-weights", "--dtype", dtype)
    assert llmforge("convert", *made, "-o", directory / dtype) == 0
    return directory / dtype


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        dtype: convert(tmp_path_factory.mktemp(dtype), dtype) for dtype in ("bfloat16", "float16")
    }


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_engines_of_several_gpu_kinds(
    dtype: str, ranks: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    options = ("--arch", "sm_80,sm_89", "--arch", "sm_120", "--max-seq-len", 50)
    built = llmforge(
        *("build", checkpoints[dtype], "-o", engine, "--target", "tensorrt-rtx"),
        *("--tensor-parallel", ranks, *options),
    )
    assert built == 0
    manifest = yaml.safe_load((engine / "engine.yaml").read_text())
    details = manifest["target_details"]
    assert details["package"] == "tensorrt_rtx" and details["layers"] == "native"
    assert details["archs"] == ["sm_80", "sm_89", "sm_120"]
    assert manifest["limits"]["block_size"] == 64 and manifest["limits"]["num_blocks"] == 8
    import tensorrt_rtx as trt

    for rank in range(ranks):
        plan = RankPlan.read(engine / f"rank{rank}")
        assert plan == RankPlan.from_json(plan.to_json())
        assert (plan.in_engine_ranks, plan.native_cache) == (ranks, True)
        assert plan.archs == ("sm_80", "sm_89", "sm_120") and plan.version == trt.__version__
        [step] = plan.steps
        blob = (engine / f"rank{rank}" / step.file).read_bytes()
        assert manifest["files"][f"rank{rank}/{step.file}"]["size"] == len(blob)
        runtime = trt.Runtime(Package.load("tensorrt-rtx").logger)
        header = blob[: runtime.engine_header_size]
        validity, reasons = runtime.get_engine_validity(header)
        # Without a GPU no engine is valid, but one that is no engine is so for another reason.
        other, other_reasons = runtime.get_engine_validity(bytes(len(header)))
        assert int(reasons) != int(other_reasons) or validity != other


def test_primitives_leave_collectives_to_the_runtime(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    layout = ("--tensor-parallel", 2, "--pipeline-parallel", 2, "--primitives")
    target = ("--target", "tensorrt-rtx", "--arch", "sm_89")
    assert llmforge("build", checkpoints["float16"], "-o", engine, *target, *layout) == 0
    plans = [RankPlan.read(engine / f"rank{rank}") for rank in range(4)]
    kinds = [[step.kind for step in plan.steps if step.kind != "engine"] for plan in plans]
    assert kinds[0] == ["all_reduce"] * 3 + ["send", "recv"]
    assert kinds[1] == ["all_reduce"] * 3 + ["send"]
    assert kinds[2] == ["recv"] + ["all_reduce"] * 2 + ["all_gather", "send"]
    assert kinds[3] == ["recv"] + ["all_reduce"] * 2 + ["all_gather"]
    files = [[step.file for step in plan.steps if step.kind == "engine"] for plan in plans]
    assert [len(set(names)) for names in files] == [4, 4, 3, 3]
    for plan in plans:
        assert plan.primitives and not plan.native_cache and plan.in_engine_ranks == 1
        assert all(cache.output == f"{cache.name}.new" for cache in plan.caches)


# -- what cannot be built --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--arch", "sm_90"), "cannot build for the architecture 'sm_90'; allowed: sm_75, sm_80"),
        (("--block-size", 32), "has no option --block-size"),
        (("--kv-cache-tokens", 64), "has no option --kv-cache-tokens"),
        (("--timing-cache", "x"), "has no option --timing-cache; it is for tensorrt"),
        (("--optimization-level", 6), "from 0 to 5"),
        (("--arch", "sm_75"), "leave it out of --arch, or convert the model with --dtype float16"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_refused_in_a_line(
    options: tuple[object, ...],
    said: str,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    target = ("--target", "tensorrt-rtx")
    status = llmforge("build", checkpoints["bfloat16"], "-o", tmp_path / "e", *target, *options)
    error = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert status != 0 and len(error) == 1 and said in error[0]
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packages.MODULES, "tensorrt", "no_such_package_here")
    expected = "package not installed: pip install 'llmforge[tensorrt]'"
    assert TensorRTTarget("tensorrt").available() == expected


def test_a_package_without_bfloat16() -> None:
    package = Package.load("tensorrt-rtx")
    package.features = dataclasses.replace(package.features, bfloat16=False)
    graph = trace(_config("bfloat16"), Topology(), 0)
    with pytest.raises(
        BuildError, match="convert the model with: llmforge convert --dtype float16"
    ):
        TensorRTTarget("tensorrt", package=package).prepare(graph)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ((), "builds engines only on a machine with an NVIDIA GPU"),
        (("validateCaskKLibDigest(sha256sum) failed",), "TensorRT's builder: .*Digest"),
    ],
)
def test_a_builder_that_cannot_be_made(
    said: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reason where it gives one; without a GPU it gives none."""
    package = Package.load("tensorrt-rtx")

    def refuse(logger: Any) -> None:
        for message in said:
            logger.log(package.trt.ILogger.ERROR, message)
        raise TypeError("factory function returned nullptr")

    monkeypatch.setattr(package.trt, "Builder", refuse)
    with pytest.raises(BuildError, match=expected):
        package.create_network()


def test_scores_beyond_what_tensorrt_can_index() -> None:
    graph = trace(_config("float16"), Topology(), 0)
    limits = Limits(1, 1 << 17, 1 << 13, 1 << 17, 1)
    target = TensorRTTarget("tensorrt-rtx", BuildOptions(primitives=True))
    with pytest.raises(BuildError, match="build with smaller --max-num-tokens or --max-seq-len"):
        target.memory(graph, limits)
    assert TensorRTTarget("tensorrt-rtx").memory(graph, limits).total > 0


def _config(dtype: str) -> ModelConfig:
    return dataclasses.replace(tiny(), dtype=dtype)


def test_a_layer_that_tensorrt_refuses() -> None:
    net = Network(Package.load("tensorrt-rtx"))
    net.label = "linear %3"
    x = net.input("x", "float32", ("B", 3, 4))
    with pytest.raises(BuildError, match=r"'linear %3' cannot be built: TensorRT failed: \S"):
        net.matmul(x, x)


def test_an_input_that_nothing_reads_fails(tmp_path: Path) -> None:
    package = Package.load("tensorrt-rtx")
    net = Network(package)
    x, _ = net.input("x", "float32", ("B", 4)), net.input("unread", "float32", ("B", 4))
    net.output("y", net.add(x, 1.0))
    engine = Engine(net, Step("engine"), {"x": ("B", 4), "unread": ("B", 4)})
    with pytest.raises(BuildError, match="dropped the input unread"):
        build_engine(
            package, engine, profiles(LIMITS), BuildOptions(archs=("sm_89",)), "float32",
            tmp_path / "x", _NoWeights(), lambda share: None,
        )  # fmt: skip


class _NoWeights(RankWeights):
    def __init__(self) -> None:
        pass

    def release(self) -> None:
        pass


def test_options_reach_the_builder() -> None:
    package = Package.load("tensorrt-rtx")
    builder, _ = package.create_network()
    trt = package.trt
    config = package.create_config(builder, "float16", ("sm_89", "sm_120"), 1.5, 2)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1_500_000_000
    assert config.builder_optimization_level == 2
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_compute_capability(1) == trt.ComputeCapability.SM120
    default = package.create_config(builder, "float16", ("sm_89",), None, None)
    assert default.builder_optimization_level == 3


# -- processes -------------------------------------------------------------------------------------


def job(checkpoint: Path, out: Path, **changes: Any) -> RankJob:
    settings = BuildSettings(target="tensorrt-rtx", arch=("sm_89",))
    there = (checkpoint / "manifest.yaml").is_file()
    config = Checkpoint.open(checkpoint).config if there else tiny()
    graph = TensorRTTarget("tensorrt-rtx").prepare(trace(config, Topology(), 0))
    values = RankJob(checkpoint, Topology(), 0, graph, settings, LIMITS, out, 1000, 10**9)
    return dataclasses.replace(values, **changes)


def test_ranks_are_compiled_together_as_far_as_memory_allows(tmp_path: Path) -> None:
    jobs = [job(tmp_path, tmp_path, peak_bytes=10)] * 5
    cores = len(os.sched_getaffinity(0))
    assert at_a_time(jobs, 1000) == min(5, cores)
    assert at_a_time(jobs, 19) == at_a_time(jobs, 3) == 1
    assert at_a_time(jobs[:1], 1000) == 1
    assert RankJob.from_json(jobs[0].to_json()) == jobs[0]


def test_a_workers_error_is_the_parents(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"^rank 1: .*does not exist"):
        jobs = [job(tmp_path / "none", tmp_path, topology=Topology(2), rank=1)]
        compile_apart(jobs, no_progress)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (signal.SIGKILL, "the machine may be out of memory"),
        (signal.SIGSEGV, "another version of its package, or another --target, may build this"),
    ],
)
def test_a_worker_that_dies(
    number: int, remedy: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    seen: list[float] = []

    def kill(label: str, done: int, total: int) -> None:
        for child in psutil.Process().children():
            child.send_signal(number)
        seen.append(done / total)

    with pytest.raises(BuildError, match=f"ended by signal {int(number)}; {remedy}"):
        compile_apart([job(checkpoints["bfloat16"], tmp_path)], kill)
    assert seen and not psutil.Process().children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing(
    number: int, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    checkpoint = convert(tmp_path, "bfloat16", **large)
    command = ("build", str(checkpoint), "-o", str(tmp_path / "e"), "--target", "tensorrt-rtx")
    program = [sys.executable, "-m", "llmforge", *command]
    with subprocess.Popen(program, stderr=subprocess.PIPE) as process:
        workers: list[psutil.Process] = []
        while not workers:
            assert process.poll() is None
            workers = psutil.Process(process.pid).children()
            time.sleep(0.02)
        while not list(tmp_path.glob(".e.partial/rank0/*.json")):
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait() == 128 + number
        assert process.stderr is not None and b"Traceback" not in process.stderr.read()
    psutil.wait_procs(workers, timeout=10)
    assert not any(worker.is_running() for worker in workers)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "bfloat16"}


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2])
def test_mapped_weights_are_the_read_ones(ranks: int, checkpoints: dict[str, Path]) -> None:
    checkpoint, topology = Checkpoint.open(checkpoints["bfloat16"]), Topology(ranks)
    copied = []
    for rank in range(ranks):
        weights = RankWeights(checkpoint, topology, rank)
        for parameter in trace(checkpoint.config, topology, rank).parameters:
            mapped, read = weights.map(parameter), weights.read(parameter)
            weights.release()
            assert mapped.shape == parameter.shape and mapped.flags.c_contiguous
            assert np.array_equal(mapped, read), parameter.name
            if mapped.flags.owndata or mapped.flags.writeable:
                copied.append(parameter.name.split(".")[-2])
    assert set(copied) == (set() if ranks == 1 else {"o", "down"})
