"""How a command ends: one line on stderr for an error, and the exit status.

0 done, 1 an error, 2 a usage or settings error, 130 interrupted. Unexpected exceptions are
errors too; with LLMFORGE_TRACEBACK=1 they, and all others, come with their traceback.

In a job of several ranks, an error that all ranks meet alike is reported once, by rank 0; what
only another rank meets is reported by that one, as ``error: rank 1: ...``. Either ends the job.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import click

from llmforge.cli.launch import current_job, is_speaker
from llmforge.errors import LlmforgeError

# What writing to stdout fails with, where it is a file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
TRACEBACK_VARIABLE = "LLMFORGE_TRACEBACK"
# How long a rank other than 0 waits with its error, in seconds: if rank 0 meets the same one, it
# ends the job meanwhile. The ranks after it wait a little longer each, for the same reason.
_GRACE = 1.0
_GRACE_BETWEEN_RANKS = 0.2
_LONGEST_GRACE = 3.0


class NoReader(Exception):
    """Whoever read our output has enough of it (`llmforge run ... | head`)."""


def guard(action: Callable[[], Any]) -> int:
    """Runs a command and returns the exit status: the action's, where it returns a number.

    Every exception ends here, as one line on stderr. Where this is a rank of a running MPI job,
    an error does not return: it ends all ranks.
    """
    try:
        result = action()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (BrokenPipeError, NoReader):
        return _end(_broken_pipe())
    except (KeyboardInterrupt, click.Abort):
        return _end(_say("interrupted", 128 + signal.SIGINT))
    except SystemExit as error:
        return _end(error.code if isinstance(error.code, int) else int(error.code is not None))
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except Exception as error:
        return _end(_say(*describe(error)))


def describe(error: Exception) -> tuple[str, int]:
    """The line to print, and the exit status."""
    if isinstance(error, LlmforgeError):
        return f"error: {_one_line(str(error))}", error.exit_code
    if isinstance(error, click.ClickException):
        ctx = getattr(error, "ctx", None)
        hint = f" (see: {ctx.command_path} --help)" if ctx is not None else ""
        return f"error: {_one_line(error.format_message())}{hint}", error.exit_code
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is None:
        return f"error: cannot write the output: {error.strerror}", 1
    if type(error).__module__.startswith("mpi4py"):
        return f"error: communication between the ranks failed: {_one_line(str(error))}", 1
    hint = "" if _wants_traceback() else f" ({TRACEBACK_VARIABLE}=1 shows the traceback)"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"internal error: {_one_line(text)}{hint}", 1


def warn(message: str) -> None:
    """One line on stderr; in a job, from rank 0 alone."""
    if is_speaker():
        print(f"warning: {_one_line(message)}", file=sys.stderr, flush=True)


def _say(line: str, code: int) -> int:
    job = current_job()
    if job is not None and job.rank > 0:
        time.sleep(min(_GRACE + _GRACE_BETWEEN_RANKS * job.rank, _LONGEST_GRACE))
        kind, separator, rest = line.partition(": ")
        line = f"{kind}: rank {job.rank}: {rest}" if separator else line
    if _wants_traceback():
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # In one piece, even where streams are unbuffered: mpirun puts lines of its own between pieces.
    print(f"{line}\n", end="", file=sys.stderr, flush=True)
    return code


def _end(code: int) -> int:
    """The status; but in a running MPI job, other ranks may be waiting for this one for ever."""
    if code == 0 or "mpi4py.MPI" not in sys.modules:
        return code
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        MPI.COMM_WORLD.Abort(code)
    return code


def _broken_pipe() -> int:
    """That is no error of ours to report, but the status tells that not everything was written."""
    # Python flushes stdout again on exit: without a reader it would complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _wants_traceback() -> bool:
    return os.environ.get(TRACEBACK_VARIABLE, "") not in ("", "0")


def _one_line(text: str) -> str:
    return " ".join(text.split())
