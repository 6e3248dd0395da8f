"""A rank's weights: its slices of the checkpoint, read as they are asked for."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.checkpoint.store import Checkpoint
from llmforge.model.graph import Parameter
from llmforge.parallel import Piece, Topology

Array = NDArray[np.generic]


@dataclass(frozen=True)
class RankWeights:
    """`Weights` of one rank. Only the bytes that the rank holds are read."""

    checkpoint: Checkpoint
    topology: Topology
    rank: int

    @functools.cached_property
    def _specs(self) -> dict[str, ParamSpec]:
        return parameters(self.checkpoint.config)

    def read(self, parameter: Parameter) -> Array:
        parts = [self._shard(self._specs[name]) for name in parameter.parts]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        assert whole.shape == parameter.shape, (parameter, whole.shape)
        return whole

    def map(self, parameter: Parameter) -> Array:
        """As `read`, but where the values lie in one piece in the checkpoint's file they are
        mapped, read-only, and not copied."""
        if len(parameter.parts) == 1:
            spec = self._specs[parameter.parts[0]]
            cuts = self._cuts(spec)
            if not cuts:
                return self.checkpoint.map(spec.name)
            pieces = cuts.get(0, ())
            if len(cuts) == len(pieces) == 1 and not pieces[0].padding:
                return self.checkpoint.map(spec.name)[pieces[0].start : pieces[0].stop]
        return self.read(parameter)

    def release(self) -> None:
        """Let go of the memory of what is mapped: what is touched again is read again."""
        self.checkpoint.release()

    def report(self, fraction: float) -> None:
        """Nobody listens here."""

    def _shard(self, spec: ParamSpec) -> Array:
        cuts = self._cuts(spec)
        rows = None
        if spec.shard.experts and 0 in cuts:
            [held] = cuts.pop(0)
            rows = held.start, held.stop
        if not cuts:
            return self.checkpoint.read(spec.name, rows=rows)
        [(dim, pieces)] = cuts.items()
        runs = []
        for piece in pieces:
            run = self.checkpoint.read(spec.name, dim, piece.start, piece.stop, rows)
            if piece.padding:
                width = [(0, piece.padding if axis == dim else 0) for axis in range(run.ndim)]
                run = np.pad(run, width)
            runs.append(run)
        return runs[0] if len(runs) == 1 else np.concatenate(runs, axis=dim)

    def _cuts(self, spec: ParamSpec) -> dict[int, tuple[Piece, ...]]:
        """This rank's pieces of each dimension that it has not all of."""
        topology = self.topology
        cuts = spec.shard.cuts(
            topology.tensor_rank(self.rank), topology.tensor_parallel, topology.expert_parallel
        )
        return {
            dim: pieces
            for dim, pieces in cuts
            if len(pieces) > 1 or pieces[0] != Piece(0, spec.shape[dim])
        }
