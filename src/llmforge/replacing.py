"""Single files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Written beside and renamed: processes that do so at the same time each leave a whole file.

    What is no plain file of its own, like a link or /dev/stdout, is not replaced but written to.
    Raises OSError.
    """
    if _in_place(path):
        path.write_bytes(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def may_write(path: Path) -> bool:
    """Whether `replace_file` can be expected to, which makes the directories that are missing."""
    if path.is_dir():
        return False
    if _in_place(path):
        return os.access(path, os.W_OK)
    above = next(folder for folder in path.absolute().parents if folder.exists())
    return above.is_dir() and os.access(above, os.W_OK)


def _in_place(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())
