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
    ``rank = stage * tensor_parallel + tensor_rank``. They form `expert_parallel` groups of
    neighbours: a layer's experts are divided among the groups, each expert among the ranks of its
    group."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1

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
    piece of each, one after another. Where dimension 0 counts `experts`, it is divided among the
    `groups` of neighbouring ranks, and the segments among the ranks of a group.
    """

    dim: int = 0
    segments: tuple[Segment, ...] = ()
    experts: int = 0

    def divides(self, ranks: int, groups: int = 1) -> bool:
        """Whether this parameter can be divided so. `groups` divides `ranks`."""
        inner = ranks // groups if self.experts else ranks
        return all(s.divides(inner) for s in self.segments) and self.experts % groups == 0

    def cuts(
        self, rank: int, ranks: int, groups: int = 1
    ) -> tuple[tuple[int, tuple[Piece, ...]], ...]:
        """What `rank` holds: of each dimension that is cut its runs, one after another."""
        cuts: list[tuple[int, tuple[Piece, ...]]] = []
        if self.experts and groups > 1:
            ranks //= groups
            group, rank = divmod(rank, ranks)
            cuts.append((0, (Segment(self.experts).piece(group, groups),)))
        if self.segments:
            cuts.append((self.dim, self.pieces(rank, ranks)))
        return tuple(cuts)

    def pieces(self, rank: int, ranks: int) -> tuple[Piece, ...]:
        """This rank's runs of dimension `dim`, in whole-parameter coordinates."""
        pieces = []
        offset = 0
        for segment in self.segments:
            piece = segment.piece(rank, ranks)
            pieces.append(Piece(piece.start + offset, piece.stop + offset, piece.padding))
            offset += segment.size
        return tuple(pieces)

    def local_shape(
        self, shape: Sequence[int], rank: int, ranks: int, groups: int = 1
    ) -> tuple[int, ...]:
        """The shape that `rank` holds of a parameter of the whole `shape`."""
        local = list(shape)
        for dim, pieces in self.cuts(rank, ranks, groups):
            local[dim] = sum(piece.size for piece in pieces)
        return tuple(local)

    def join(self, parts: Sequence[NDArray[np.generic]], groups: int = 1) -> NDArray[np.generic]:
        """The whole parameter from the arrays of all ranks: the inverse of cutting."""
        import numpy as np

        ranks = len(parts)
        if self.experts and groups > 1:
            each = ranks // groups
            joined = [self.join(parts[first : first + each]) for first in range(0, ranks, each)]
            return np.concatenate(joined)
        if not self.segments:
            return parts[0]
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
