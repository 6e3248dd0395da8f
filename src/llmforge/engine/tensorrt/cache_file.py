"""Files that TensorRT's measurements and compiled kernels are kept in from run to run."""

from __future__ import annotations

import os
from pathlib import Path

from llmforge.kernels.compile import DEFAULT_CACHE


def cache_path(kind: str, name: str) -> Path:
    """Where a cache of this kind is kept."""
    return DEFAULT_CACHE.expanduser().parent / kind / f"{name}.cache"


def may_write(path: Path) -> bool:
    """Whether `replace_file` can be expected to."""
    above = next(folder for folder in path.absolute().parents if folder.exists())
    return above.is_dir() and os.access(above, os.W_OK) and not path.is_dir()


def replace_file(path: Path, blob: bytes) -> None:
    """Written beside and renamed: processes that do so at the same time each leave a whole file.
    Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(blob)
    temporary.replace(path)
