"""Guards around writing: a lock between processes, and signals as exceptions."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class FileLock:
    """An exclusive lock between processes, held while a file at `path` is locked. The file goes
    when the lock is released; one that a killed process left behind does not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1

    def acquire(self) -> bool:
        """Whether the lock was free. Raises OSError where the file cannot be made."""
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                # A network file system without locks: better unguarded than not at all.
                if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                    os.close(fd)
                    if isinstance(error, BlockingIOError):
                        return False
                    raise
            # Another holder may have removed the file meanwhile: ours must be the one at `path`.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                    self._fd = fd
                    return True
            os.close(fd)

    def release(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """Within this, SIGTERM and SIGHUP (of a terminal that closes) raise SystemExit, so that
    contexts are left and cleaned up; a second one does not disturb that. A signal that somebody
    handles already, or ignores (nohup), stays as it is. Does nothing in threads, which get no
    signals."""
    caught: list[signal.Signals] = []

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        for ours in caught:
            signal.signal(ours, signal.SIG_IGN)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        caught += [n for n in _ENDING if signal.getsignal(n) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Within this, Ctrl-C waits until it is left: for cleaning up after a first one."""
    came: list[FrameType | None] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, frame: came.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        before(signal.SIGINT, came[0])
