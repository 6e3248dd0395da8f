"""Files that TensorRT's measurements and compiled kernels are kept in from run to run."""

from __future__ import annotations

from pathlib import Path

from llmforge.kernels.compile import DEFAULT_CACHE


def cache_path(kind: str, name: str) -> Path:
    """Where a cache of this kind is kept."""
    return DEFAULT_CACHE.expanduser().parent / kind / f"{name}.cache"
