"""The command line itself: what it costs, its options, its errors and statuses."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llmforge import __version__
from llmforge.artifact import hash_file
from llmforge.cli import doctor, errors
from llmforge.cli.main import COMMANDS, cli
from llmforge.engine.cuda.target import CudaTarget
from llmforge.errors import LlmforgeError, RequestError, SettingsError
from llmforge.settings import SECTIONS, kinds

# What a help text must not wait for.
HEAVY = ("torch", "mpi4py", "numpy", "rich", "yaml", "safetensors", "tokenizers", "transformers")

HELP_PROBE = f"""
import sys
from click.testing import CliRunner
from llmforge.cli.main import COMMANDS, cli
def loaded():
    return {{name.split('.')[0] for name in sys.modules}}
for arguments in (["--help"], ["--version"]):
    assert CliRunner().invoke(cli, arguments).exit_code == 0
early = [name for name in COMMANDS if f"llmforge.cli.{{name}}" in sys.modules]
assert not early, f"the group's help loads {{early}}"
assert not {{"llmforge.settings", "llmforge.settings_reading"}} & set(sys.modules)
for name in COMMANDS:
    result = CliRunner().invoke(cli, [name, "--help"])
    assert result.exit_code == 0 and result.output.startswith("Usage:"), result.output
heavy = loaded() & set({HEAVY!r})
assert not heavy, f"help loads {{heavy}}"
"""


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Status, stdout and stderr of a command line, run in this process."""
    status = errors.guard(lambda: cli.main(arguments, "llmforge", standalone_mode=False))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_help_loads_nothing_heavy() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_PROBE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmforge", "--version"], capture_output=True, text=True
    )
    assert done.stdout.strip() == f"llmforge, version {__version__}"


@pytest.mark.parametrize("name", COMMANDS)
def test_short_helps_agree(name: str) -> None:
    command = importlib.import_module(f"llmforge.cli.{name}").command
    assert command.name == name
    assert command.get_short_help_str(limit=200) == COMMANDS[name]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_setting_is_an_option(name: str) -> None:
    section = SECTIONS[name]
    command = importlib.import_module(f"llmforge.cli.{name}").command
    options = {p.name: p for p in command.params if isinstance(p, click.Option)}
    assert "-c" in options["config_file"].opts
    for known in dataclasses.fields(section):
        option, kind = options[known.name], kinds(section)[known.name]
        flag = {"passes": "--pass"}.get(known.name, f"--{known.name.replace('_', '-')}")
        assert flag in option.opts
        assert known.metadata["help"] in (option.help or "")
        assert option.multiple == kind.repeated
        assert option.is_flag == (kind.base is bool)
        if known.metadata["choices"]:
            assert isinstance(option.type, click.Choice)
            assert tuple(option.type.choices) == known.metadata["choices"]
        # Not given is None or empty: then the file's value or the default holds.
        assert option.get_default(click.Context(command)) in (None, ())


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["bogus"], 2, "error: No such command 'bogus'"),
        (
            ["run", "--tempratur", "3"],
            2,
            "Did you mean '--temperature'? (see: llmforge run --help)",
        ),
        (["run", "e"], 2, "error: no prompt: give --prompt TEXT"),
        (["run", "--prompt", "x"], 2, "error: ENGINE is missing"),
        (["run", "e", "--prompt", "x", "--top-p", "2"], 2, "error: --top-p must be a number from"),
        (["run", "e", "--prompt", "x", "--top-k", "a"], 2, "error: Invalid value for '--top-k'"),
        (["run", "/no/such", "--prompt", "x"], 1, "error: /no/such does not exist"),
        (["build"], 2, "error: CKPT is missing"),
        (["build", "x"], 2, "error: -o ENGINE is missing"),
        (["build", "/no/such", "-o", "/tmp/x"], 1, "error: /no/such does not exist"),
        (["convert", "-o", "/tmp/x"], 2, "error: SOURCE is missing"),
        (["convert", "x", "-o", "y", "--random-weights"], 2, "go together"),
        (["convert", "x", "-o", "y", "--dtype", "int8"], 2, "'int8' is not one of"),
        (["convert", "--seed", "-1"], 2, "error: Invalid value for '--seed': -1 is not in"),
        (["bench"], 2, "with a workdir: llmforge bench -c FILE.yaml"),
        (["inspect", "/no/such"], 1, "error: /no/such does not exist"),
        (["inspect", "x", "--rank", "1"], 2, "error: --rank says whose graph"),
        (["verify", "/"], 1, "error: / is not a checkpoint or an engine"),
        (["build", "-c", "/no.yaml"], 2, "error: /no.yaml: cannot be read"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    got, out, err = run(arguments, capsys)
    assert (got, out) == (status, "")
    assert message in err and err.startswith("error: ")
    assert err.count("\n") == 1 and err.endswith("\n")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("build", "there is no checkpoint at work/checkpoint yet; make it with: llmforge convert"),
        ("run", "there is no engine at work/engine yet; make it with: llmforge build"),
        ("bench", "there is no engine at work/engine yet; make it with: llmforge build"),
    ],
)
def test_a_missing_stage_names_its_command(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text("workdir: work\nrun: {prompt: x}\n")
    status, _, err = run([command, "-c", "s.yaml"], capsys)
    assert (status, err) == (1, f"error: {message} -c s.yaml\n")


def raised(error: BaseException) -> int:
    def action() -> None:
        raise error

    return errors.guard(action)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (LlmforgeError("two\nlines"), 1, "error: two lines"),
        (SettingsError("bad"), 2, "error: bad"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            ValueError("oops"),
            1,
            "internal error: ValueError: oops (LLMFORGE_TRACEBACK=1 shows the traceback)",
        ),
        (SystemExit(143), 143, ""),
    ],
)
def test_statuses(
    error: BaseException, status: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert raised(error) == status
    assert capsys.readouterr().err.rstrip("\n") == line


def test_traceback_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(errors.TRACEBACK_VARIABLE, "1")
    assert raised(RequestError("x")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: x\n")


IMPORTING = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, sys.argv[1])
from llmforge.cli.errors import guard
from llmforge.cli.interrupts import spare_imports
def work():
    import slow_package
    print("imported", flush=True)
    slow_package.time.sleep(60)
spare_imports()
raise SystemExit(guard(work))
"""


def test_an_interrupt_waits_for_imports(tmp_path: Path) -> None:
    (tmp_path / "slow_package.py").write_text(
        "import signal, time\nsignal.raise_signal(signal.SIGINT)\ntime.sleep(0.2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING, str(tmp_path)], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "imported\n", "interrupted\n")


def test_a_reader_that_has_enough() -> None:
    """`llmforge ... | head -1` is quiet."""
    program = (
        "from llmforge.cli.errors import guard\n"
        "raise SystemExit(guard(lambda: [print('x' * 1000, flush=True) for _ in range(1000)]))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


LLMFORGE = f"{sys.executable} -m llmforge"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"]])
def test_no_reader_has_the_status_that_shells_give(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llmforge", *arguments]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_closed_streams(closed: str) -> None:
    """As a daemon's are."""
    done = shell(f"{LLMFORGE} doctor --json {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    if not closed.startswith(">"):
        json.loads(done.stdout)  # and nothing of what stderr would have had
    assert shell(f"{LLMFORGE} inspect /no/such {closed}").returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_that_does_not_fit() -> None:
    done = shell(f"{LLMFORGE} doctor > /dev/full")
    line = "error: cannot write the output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_what_stdouts_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    directory = tmp_path / "größe-日本"
    directory.mkdir()
    for name in ("x", "y"):
        (directory / name).write_text("x")
    size, digest = hash_file(directory / "x")
    entry = f"{{size: {size}, xxh3_128: '{digest}'}}"
    (directory / "manifest.yaml").write_text(
        f"kind: checkpoint\nformat_version: 1\nfiles: {{x: {entry}, 'y': {entry}}}"
    )
    command = f"{LLMFORGE} verify {directory} --json"
    done = shell(command, PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout)["path"] == str(directory) and r"\u65e5" in done.stdout
    assert "日本" in shell(command, PYTHONIOENCODING="utf-8").stdout
    text = shell(f"{LLMFORGE} verify {directory}", PYTHONIOENCODING="ascii").stdout
    assert text == f"checkpoint {tmp_path}/gr\\xf6\\xdfe-\\u65e5\\u672c: 2 files are whole\n"


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(["doctor"], capsys)
    assert status == 0 and "cpu" in out and "available" in out


@pytest.mark.parametrize(
    ("gpus", "shown"), [([], "available to build; its engines run on"), (["one"], "available")]
)
def test_doctor_tells_building_from_running(
    gpus: list[str],
    shown: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    findings = doctor.examine()
    findings["machine"]["gpus"], findings["targets"] = gpus, {"cpu": None, "cuda": None}
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    monkeypatch.setattr(CudaTarget, "available", lambda self: None)
    status, out, _ = run(["doctor"], capsys)
    states = dict(line.split(maxsplit=1) for line in out.splitlines() if "available" in line)
    assert status == 0 and states["cpu"].strip() == "available"
    assert states["cuda"].strip().startswith(shown) and ("build" in states["cuda"]) == (not gpus)


def test_no_arguments_show_help() -> None:
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 2 and result.output.startswith("Usage: ")
