"""A source whose tensors are pieced together, whatever files they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.artifact import Warn, listed
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families.base import Rules
from llmforge.checkpoint.mapping import Ignore, make_plan
from llmforge.checkpoint.sources.base import common_dtype, same_values
from llmforge.checkpoint.sources.blocks import Pieced, beside, stacked_rows
from llmforge.errors import SourceError
from llmforge.safetensors_io import Array, TensorInfo

TIED_HEAD = "the output head is tied to the embedding"


class PiecedTensors:
    """Reads `Pieced` tensors by name."""

    def __init__(self, pieces: Mapping[str, Pieced]) -> None:
        self._pieces = pieces
        self.tensors: Mapping[str, TensorInfo] = {name: p.info for name, p in pieces.items()}

    def read(self, name: str) -> Array:
        return self._pieces[name].read()

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        self._pieces[name].fill(first, out)

    def close(self) -> None:
        pass


class PiecedSource(PiecedTensors):
    """A `Source` over `Pieced` tensors, whose `rules` say what they become."""

    def __init__(
        self,
        kind: str,
        config: ModelConfig,
        pieces: Mapping[str, Pieced],
        rules: Rules,
        ignored: Sequence[Ignore],
        description: Mapping[str, Any],
        tokenizer_directory: Path | None,
        where: str,
        warn: Warn,
    ) -> None:
        super().__init__(pieces)
        self.kind = kind
        self.description = description
        self.tokenizer_directory = tokenizer_directory
        self.plan = make_plan(config, rules, ignored, self.tensors, where)
        self.config = dataclasses.replace(config, dtype=common_dtype(self.plan, self.tensors, warn))


def tied(pieces: Mapping[str, Pieced], embedding: str, head: str) -> bool:
    """Whether the head is the embedding: it is not there, or has the same values."""
    if embedding not in pieces or head not in pieces:
        return head not in pieces
    return same_values(PiecedTensors(pieces), embedding, head)


def join_ranks(name: str, parts: Sequence[Pieced], columns: bool, where: str) -> Pieced:
    """The tensor `name` of all ranks, whose parts lie beside each other or, if not `columns`,
    below each other. Raises SourceError where they do not fit together."""
    fits = {(p.dtype, p.shape[0] if columns else p.shape[1:]) for p in parts}
    if len(fits) > 1 or (columns and len(parts[0].shape) != 2):
        shapes = [f"{list(p.shape)} {p.dtype}" for p in parts]
        raise SourceError(
            f"the ranks' parts of {name} in {where} do not fit together: {listed(shapes)}"
        )
    return beside(parts) if columns else stacked_rows(parts)


def on_all_ranks(tensors: Sequence[Mapping[str, Pieced]], names: Iterable[str], where: str) -> None:
    """Raises SourceError where a rank lacks a tensor that another has."""
    missing = [
        f"{name} (rank {rank})"
        for name in names
        for rank, of_rank in enumerate(tensors)
        if name not in of_rank
    ]
    if missing:
        raise SourceError(
            f"{where} is not whole: ranks lack tensors that others have ({len(missing)}): "
            f"{listed(missing)}"
        )


def expect_rows(name: str, tensor: Pieced, rows: int, where: str) -> None:
    """Raises SourceError where the tensor has not so many rows."""
    if tensor.shape[0] != rows:
        raise SourceError(
            f"{name} of {where} has {tensor.shape[0]} rows, but its config asks for {rows}"
        )
