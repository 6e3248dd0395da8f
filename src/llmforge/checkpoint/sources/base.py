"""What `convert` reads from: the `Source` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.mapping import Plan
from llmforge.safetensors_io import Array, TensorInfo


class Source(Protocol):
    """A model to convert, opened: nothing but names, shapes and dtypes has been read yet.

    config: the model, its dtype being that of the source's weights. description: for the
    manifest; the same for the same input. tensors: the source's own, by its names. plan: which of
    them become which parameters. tokenizer_directory: where tokenizer files may lie.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def description(self) -> Mapping[str, Any]: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def tokenizer_directory(self) -> Path | None: ...

    def read(self, name: str) -> Array:
        """A fresh contiguous array of the whole tensor. Raises SourceError."""
        ...

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        """Copy the tensor's bytes from number `first` on into `out`, which they fill. A tensor's
        bytes are asked for from the first to the last. Raises SourceError."""
        ...

    def close(self) -> None: ...
