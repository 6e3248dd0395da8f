"""What a path holds, told by its files, and the source that reads it."""

from __future__ import annotations

from pathlib import Path

from llmforge.artifact import Warn
from llmforge.checkpoint.sources.base import Source
from llmforge.checkpoint.sources.hf import CONFIG, HfSource, has_weights
from llmforge.checkpoint.sources.meta import is_meta, meta_source
from llmforge.checkpoint.sources.nemo import is_nemo, nemo_source
from llmforge.checkpoint.sources.trtllm import is_trtllm, trtllm_source
from llmforge.errors import SourceError


def open_path(path: Path, scratch: Path, warn: Warn) -> Source:
    """Open the model at `path`. Raises SourceError; `scratch` is as for `open_source`."""
    try:
        return _open(path, scratch, warn)
    except PermissionError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error


def _open(path: Path, scratch: Path, warn: Warn) -> Source:
    if path.exists() and is_nemo(path):
        return nemo_source(path, scratch, warn)
    if path.is_dir() and is_meta(path):
        # Some models come with Meta's files beside the same weights in the other layout.
        if not ((path / CONFIG).is_file() and has_weights(path)):
            return meta_source(path, scratch, warn)
        warn(f"{path} holds the model in two layouts: that of Hugging Face is read")
    if path.is_dir() and is_trtllm(path):
        return trtllm_source(path, warn)
    return HfSource(path, warn)
