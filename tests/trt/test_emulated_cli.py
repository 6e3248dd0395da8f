"""`llmforge build`, `run`, `bench` and `inspect` of the tensorrt targets, on an emulation of
TensorRT and of the GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from emulated_target import Rig

from llmforge.artifact import Progress
from llmforge.checkpoint.store import Checkpoint
from llmforge.checksum import NAME, new_checksum
from llmforge.cli import errors
from llmforge.cli.main import cli
from llmforge.engine import build as building
from llmforge.engine.apart import RankJob
from llmforge.engine.target import Checksums
from llmforge.engine.target import target as find_target
from llmforge.engine.tensorrt import device, package
from llmforge.engine.weights import RankWeights
from llmforge.model.decoder import trace

MODEL = Path(__file__).parents[2] / "examples" / "drama-3m"
LIMITS = ("--max-batch-size", "3", "--max-seq-len", "64", "--max-num-tokens", "16")
PROMPTS = (
    '{"prompt": "ROMEO:", "temperature": 0.8, "seed": 5, "max_new_tokens": 9}\n'
    '{"prompt": "Friends, Romans, countrymen, lend me your", "max_new_tokens": 12}\n'
    '{"token_ids": [5, 6, 7], "max_new_tokens": 3}\n'
    '{"prompt": "What", "repetition_penalty": 1.2, "presence_penalty": 0.5, "max_new_tokens": 7}\n'
)

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the example model is not here")


def llmforge(*arguments: object) -> int:
    words = list(map(str, arguments))
    return errors.guard(lambda: cli.main(words, "llmforge", standalone_mode=False))


def compile_here(jobs: Sequence[RankJob], progress: Progress) -> list[Checksums]:
    """As compile_apart, in this process, where the emulation is."""
    done = []
    for job in jobs:
        target = find_target(job.settings.target or "").configured(job.settings)
        checkpoint = Checkpoint.open(job.checkpoint)
        graph = target.prepare(trace(checkpoint.config, job.topology, job.rank))
        weights = RankWeights(checkpoint, job.topology, job.rank)
        done.append(target.compile(graph, weights, job.limits, job.out))
    return done


def install(patch: pytest.MonkeyPatch, rig: Rig) -> None:
    """Have the command line find the emulated machine."""
    patch.setattr(package.Package, "load", lambda target: rig.package())
    patch.setattr(package, "unavailable", lambda target: None)
    patch.setattr(building, "compile_apart", compile_here)
    patch.setattr(device, "CudaDevice", lambda index=0: rig.device())
    patch.setattr(device, "count_gpus", lambda: 1)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's checkpoint, its engine of the cpu target, and prompts."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "prompts.jsonl").write_text(PROMPTS)
    assert llmforge("convert", MODEL, "-o", directory / "checkpoint", "--dtype", "float32") == 0
    built = ("build", directory / "checkpoint", "-o", directory / "cpu", "--target", "cpu")
    assert llmforge(*built, *LIMITS) == 0
    return directory


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(project)
    yield project


def texts(capsys: pytest.CaptureFixture[str], engine: object) -> list[Any]:
    capsys.readouterr()
    assert llmforge("run", engine, "--prompts", "prompts.jsonl", "--json") == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert len(lines) == len(PROMPTS.splitlines())
    return sorted((line["index"], line["text"], line["token_ids"]) for line in lines)


@pytest.mark.parametrize("apart", [(), ("--weights-apart",)], ids=["inside", "apart"])
@pytest.mark.parametrize("version", [None, "8.6"], ids=["rtx", "8.6"])
def test_build_and_run_give_the_texts_of_the_cpu_target(
    version: str | None,
    apart: tuple[str, ...],
    here: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = texts(capsys, "cpu")
    rig = Rig(monkeypatch, version, capability=(8, 9))
    install(monkeypatch, rig)
    engine = tmp_path / "engine"
    own = () if version else ("--arch", "sm_89")
    built = ("build", "checkpoint", "-o", engine, "--target", rig.name, *own, *LIMITS)
    assert llmforge(*built, *apart) == 0
    assert texts(capsys, engine) == expected
    assert bool(apart) == (engine / "rank0" / "weights.bin").exists()
    assert rig.devices and rig.memory.allocated == 0
    assert llmforge("bench", engine, "--input-len", 4, "--output-len", 3, "--repeat", 1) == 0
    assert llmforge("inspect", engine) == 0


def test_a_timing_cache_is_kept_and_a_broken_one_counts_as_none(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, Rig(monkeypatch, "10.13"))
    timings = tmp_path / "cache" / "timings"
    own = ("--target", "tensorrt", "--timing-cache", timings, *LIMITS)
    assert llmforge("build", "checkpoint", "-o", tmp_path / "a", *own) == 0
    kept = timings.read_bytes()
    assert kept
    timings.write_bytes(b"\0 not a cache")
    assert llmforge("build", "checkpoint", "-o", tmp_path / "b", *own) == 0
    assert timings.read_bytes() == kept


def test_a_timing_cache_that_cannot_be_written_is_refused_before_the_build(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, Rig(monkeypatch, "10.13"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "timings", tmp_path):
        own = ("--target", "tensorrt", "--timing-cache", place, *LIMITS)
        assert llmforge("build", "checkpoint", "-o", tmp_path / "a", *own) != 0
        assert f"the timing cache {place} cannot be written; name" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_the_timing_cache_of_8_6_is_refused(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, Rig(monkeypatch, "8.6"))
    own = ("--target", "tensorrt", "--timing-cache", tmp_path / "timings")
    assert llmforge("build", "checkpoint", "-o", tmp_path / "a", *own) != 0
    assert "no timing cache that works; leave out --timing-cache" in capsys.readouterr().err


# -- engines that cannot be run, in a line ---------------------------------------------------------


@pytest.fixture
def rig(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Rig:
    """A machine with an engine for sm_89 in ``tmp_path / "engine"``."""
    rig = Rig(monkeypatch)
    install(monkeypatch, rig)
    built = ("build", "checkpoint", "-o", tmp_path / "engine", "--target", rig.name)
    assert llmforge(*built, "--arch", "sm_89", *LIMITS) == 0
    capsys.readouterr()
    return rig


def refusal(capsys: pytest.CaptureFixture[str], engine: Path) -> str:
    """What `run` says, in one line, of an engine that it cannot run."""
    assert llmforge("run", engine, "--prompt", "x", "--max-new-tokens", 1) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in err and "internal error" not in err and not out
    return " ".join(err.split())


def test_another_version_of_the_package(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "engine" / "rank0" / "plan.json"
    rewrite(tmp_path / "engine", plan, plan.read_text().replace('"version": "', '"version": "0.'))
    said = refusal(capsys, tmp_path / "engine")
    assert "was built by tensorrt_rtx 0." in said and "llmforge build" in said


def test_a_gpu_that_the_engine_is_not_for(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rig.capability = (8, 6)
    said = refusal(capsys, tmp_path / "engine")
    assert "compute capability 8.6" in said and "--arch sm_86" in said
    rig.capability = (9, 0)
    said = refusal(capsys, tmp_path / "engine")
    assert "compute capability 9.0" in said and "does not run on" in said


def rewrite(engine: Path, file: Path, data: str | bytes) -> None:
    """Change a file of an engine, and its checksum with it."""
    raw = data.encode() if isinstance(data, str) else data
    file.write_bytes(raw)
    manifest = engine / "engine.yaml"
    values = yaml.safe_load(manifest.read_text())
    entry = values["files"][str(file.relative_to(engine))]
    digest = new_checksum()
    digest.update(raw)
    entry.update({"size": len(raw), NAME: digest.hexdigest()})
    manifest.write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("data", [b"", b"\0" * 4096, b"EMULATED ENGINE\n\x80"])
def test_an_engine_file_that_is_corrupt(
    data: bytes, rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(tmp_path / "engine", tmp_path / "engine" / "rank0" / "segment0.engine", data)
    said = refusal(capsys, tmp_path / "engine")
    assert "segment0.engine" in said


@pytest.mark.parametrize("data", ["", "{", "[]", "{}"])
def test_a_plan_that_is_corrupt(
    data: str, rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(tmp_path / "engine", tmp_path / "engine" / "rank0" / "plan.json", data)
    assert "plan.json is corrupt" in refusal(capsys, tmp_path / "engine")


def test_weights_that_are_cut_off(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = ("build", "checkpoint", "-o", tmp_path / "apart", "--target", rig.name)
    assert llmforge(*built, "--arch", "sm_89", "--weights-apart", *LIMITS) == 0
    capsys.readouterr()
    file = tmp_path / "apart" / "rank0" / "weights.bin"
    rewrite(tmp_path / "apart", file, file.read_bytes()[:-1])
    said = refusal(capsys, tmp_path / "apart")
    assert "weights.bin cannot be read" in said and "llmforge build" in said


def test_kernels_that_are_missing(
    rig: Rig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (tmp_path / "engine" / "rank0" / "kernels").iterdir():
        rewrite(tmp_path / "engine", file, b"")
        file.unlink()
    said = refusal(capsys, tmp_path / "engine")
    assert "kernels" in said and "llmforge build" in said
