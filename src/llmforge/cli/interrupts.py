"""Ctrl-C while packages are being imported.

An exception that comes amidst the import of an extension module is lost there: numpy prints a
traceback and says that it is broken. So Ctrl-C waits until no import is going on.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

_AGAIN = 0.05  # seconds


def spare_imports() -> None:
    """From now on; not where Ctrl-C is ignored, or somebody handles it already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if not _imports(frame):
        raise KeyboardInterrupt
    timer = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
