"""Reading standard input to its end, also as a rank that mpirun started.

Open MPI 5's mpirun passes its standard input on to rank 0, but not the end of it, so a rank that
reads on waits for ever (open-mpi/ompi issue 11990 and its kin). Where llmforge starts mpirun
itself, it therefore hands the input to the ranks in a file. Under a user's own mpirun, rank 0
looks at the mpirun process's standard input to tell whether there is more to come.
"""

from __future__ import annotations

import os
import select
import stat
import sys
from pathlib import Path

from llmforge.cli.launch import current_job

STDIN_VARIABLE = "LLMFORGE_STDIN"
# With nothing left in mpirun's input, this long without new data is the end, in seconds.
_IDLE = 0.5


def handed_on() -> bytes | None:
    """As a rank, what the process that started mpirun had read, if anything."""
    path = os.environ.get(STDIN_VARIABLE)
    return Path(path).read_bytes() if path else None


def read_stdin() -> bytes:
    """All of the standard input."""
    if (data := handed_on()) is not None:
        return data
    if current_job() is None:
        return sys.stdin.buffer.read()
    launcher = f"/proc/{os.getppid()}/fd/0"
    try:
        mode = os.stat(launcher).st_mode
        if stat.S_ISREG(mode):
            return Path(launcher).read_bytes()
        source = os.open(launcher, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # mpirun runs on another machine, or is not our parent
        return sys.stdin.buffer.read()
    try:
        return _read_until_idle(source, is_pipe=stat.S_ISFIFO(mode))
    finally:
        os.close(source)


def _read_until_idle(source: int, *, is_pipe: bool) -> bytes:
    """Our standard input until its end, or until `source`, where it comes from, has ended and
    nothing arrives any more. `source` is only looked at, never read from."""
    chunks = []
    idle = False
    while True:
        if select.select([0], [], [], _IDLE)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                break
            chunks.append(chunk)
            idle = False
        elif idle:
            break
        else:
            idle = _has_ended(source, is_pipe=is_pipe)
    return b"".join(chunks)


def _has_ended(source: int, *, is_pipe: bool) -> bool:
    """A pipe has ended when all of it was read and its writers are gone. Of other things, like
    a terminal, it is not known; /dev/null never has anything."""
    if not is_pipe:
        return os.path.samestat(os.fstat(source), os.stat(os.devnull))
    poller = select.poll()
    poller.register(source, select.POLLIN)
    events = dict(poller.poll(0)).get(source, 0)
    return bool(events & select.POLLHUP) and not events & select.POLLIN
