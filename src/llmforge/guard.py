"""Guards around writing: a lock between processes, and SIGTERM as an exception."""

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
def sigterm_raises() -> Iterator[None]:
    """Within this, SIGTERM raises SystemExit, so that contexts are left and cleaned up. Does
    nothing in threads, which get no signals, or where somebody handles the signal already."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
