"""How a model is divided among ranks: `Topology` for the ranks, `Shard` for one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Topology:
    """The grid of ranks. Tensor-parallel ranks of one pipeline stage are neighbours:
    ``rank = stage * tensor_parallel + tensor_rank``."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1

    @property
    def world_size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def tensor_rank(self, rank: int) -> int:
        return rank % self.tensor_parallel

    def stage(self, rank: int) -> int:
        return rank // self.tensor_parallel

    def rank(self, stage: int, tensor_rank: int) -> int:
        return stage * self.tensor_parallel + tensor_rank

    def is_first_stage(self, rank: int) -> bool:
        return self.stage(rank) == 0

    def is_last_stage(self, rank: int) -> bool:
        return self.stage(rank) == self.pipeline_parallel - 1

    def layers(self, rank: int, num_layers: int) -> range:
        """The layers of this rank's stage. Where they do not divide, earlier stages get one more:
        the last stage also computes the head."""
        each, extra = divmod(num_layers, self.pipeline_parallel)
        stage = self.stage(rank)
        start = stage * each + min(stage, extra)
        return range(start, start + each + (stage < extra))


@dataclass(frozen=True)
class Piece:
    """A run ``start:stop`` of the cut dimension, followed by `padding` zeros."""

    start: int
    stop: int
    padding: int = 0

    @property
    def size(self) -> int:
        return self.stop - self.start + self.padding


@dataclass(frozen=True)
class Segment:
    """A run of the cut dimension that is divided among the ranks by itself.

    `size` elements in units of `unit` that are never cut (a head). Fewer units than ranks:
    each unit is held by ``ranks / units`` neighbouring ranks. With `pad`, units that do not
    divide are filled up with zeros at the end (a vocabulary).
    """

    size: int
    unit: int = 1
    pad: bool = False

    def divides(self, ranks: int) -> bool:
        units = self.size // self.unit
        return self.pad or units % ranks == 0 or ranks % units == 0

    def piece(self, rank: int, ranks: int) -> Piece:
        """What `rank` of `ranks` holds. Raises ValueError where the units do not divide."""
        units = self.size // self.unit
        if not self.divides(ranks):
            raise ValueError(f"{units} units of {self.unit} do not divide among {ranks} ranks")
        if units < ranks and not self.pad:
            index = rank * units // ranks
            return Piece(index * self.unit, (index + 1) * self.unit)
        local = -(-units // ranks) * self.unit
        start = min(rank * local, self.size)
        stop = min(start + local, self.size)
        return Piece(start, stop, local - (stop - start))

    def copies(self, ranks: int) -> int:
        """How many ranks hold each unit."""
        units = self.size // self.unit
        return 1 if self.pad or units >= ranks else ranks // units


@dataclass(frozen=True)
class Shard:
    """Which dimension of a parameter is cut, and into which segments; none: every rank has all.

    A merged parameter has several segments (q heads | k heads | v heads), and a rank holds its
    piece of each, one after another.
    """

    dim: int = 0
    segments: tuple[Segment, ...] = ()

    @property
    def replicated(self) -> bool:
        return not self.segments

    def pieces(self, rank: int, ranks: int) -> tuple[Piece, ...]:
        """This rank's runs of dimension `dim`, in whole-parameter coordinates."""
        pieces = []
        offset = 0
        for segment in self.segments:
            piece = segment.piece(rank, ranks)
            pieces.append(Piece(piece.start + offset, piece.stop + offset, piece.padding))
            offset += segment.size
        return tuple(pieces)

    def local_shape(self, shape: Sequence[int], rank: int, ranks: int) -> tuple[int, ...]:
        """The shape that `rank` holds of a parameter of the whole `shape`."""
        local = list(shape)
        if not self.replicated:
            local[self.dim] = sum(piece.size for piece in self.pieces(rank, ranks))
        return tuple(local)

    def join(self, parts: Sequence[NDArray[np.generic]]) -> NDArray[np.generic]:
        """The whole parameter from the arrays of all ranks: the inverse of cutting."""
        import numpy as np

        if self.replicated:
            return parts[0]
        ranks = len(parts)
        runs = []
        for index, segment in enumerate(self.segments):
            for rank in range(0, ranks, segment.copies(ranks)):
                pieces = self.pieces(rank, ranks)
                start = sum(piece.size for piece in pieces[:index])
                stop = start + pieces[index].stop - pieces[index].start
                runs.append(np.take(parts[rank], range(start, stop), axis=self.dim))
        return np.concatenate(runs, axis=self.dim)


REPLICATED = Shard()


def cut(dim: int, size: int, unit: int = 1, *, pad: bool = False) -> Shard:
    """A shard of one segment."""
    return Shard(dim, (Segment(size, unit, pad),))
