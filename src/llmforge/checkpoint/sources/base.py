"""What `convert` reads from: the `Source` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmforge.artifact import Warn
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.mapping import SOURCE_DTYPES, Plan
from llmforge.safetensors_io import Array, TensorInfo

_COMPARE = 1 << 22


class Source(Protocol):
    """A model to convert, opened: nothing but names, shapes and dtypes has been read yet.

    kind: what it was recognised as, for people. config: the model, its dtype being that of the
    source's weights. description: for the manifest; the same for the same input. tensors: the
    source's own, by its names. plan: which of them become which parameters. tokenizer_directory:
    where tokenizer files may lie.
    """

    @property
    def kind(self) -> str: ...

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


class Tensors(Protocol):
    """The part of a `Source` that reads."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None: ...


def common_dtype(plan: Plan, tensors: Mapping[str, TensorInfo], warn: Warn) -> str:
    """The dtype of most of the bytes of weights that are not quantized."""
    sizes: dict[str, int] = {}
    for group in plan.groups:
        dtypes = [tensors[name].dtype for name in group.theirs]
        if group.own_dtype or any(dtype not in SOURCE_DTYPES for dtype in dtypes):
            continue
        for name, dtype in zip(group.theirs, dtypes, strict=True):
            sizes[dtype] = sizes.get(dtype, 0) + tensors[name].nbytes
    common = max(sizes, key=lambda dtype: (sizes[dtype], dtype))
    ours = "float32" if common == "float64" else common
    if others := sorted(set(sizes) - {common}):
        warn(
            f"the weights are of several dtypes: those in {', '.join(others)} are converted "
            f"to {ours}, like most, unless another dtype is asked for"
        )
    return ours


def same_values(source: Tensors, a: str, b: str) -> bool:
    """Whether two tensors have the same dtype, shape and bytes."""
    ours, theirs = source.tensors[a], source.tensors[b]
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    for first in range(0, ours.nbytes, _COMPARE):
        left, right = (np.empty(min(_COMPARE, ours.nbytes - first), np.uint8) for _ in "ab")
        source.fill(a, first, left)
        source.fill(b, first, right)
        if not np.array_equal(left, right):
            return False
    return True
