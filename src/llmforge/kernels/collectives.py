"""Launches of the kernels that join ranks: all-reduce, all-gather, broadcast, and messages between
two ranks.

A direct exchange goes through memory that the ranks write into for each other
(`exchange.SharedRegions`); otherwise another library has gathered the x of all ranks in `parts`,
and the kernel does the rest. Either way sums have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import (
    DTYPE_BYTES,
    Argument,
    Dim,
    Extent,
    Float,
    Launch,
    Operand,
    Size,
    block_threads,
    load_width,
    require,
    same_dtype,
    specialised,
)

# As in exchange.cuh.
MAX_RANKS = 8
MAX_BLOCKS = 64
HEADER_BYTES = 8192

_THREADS = 256
# From this many bytes on, by how many ranks, a second wait costs less than what it saves in
# transfers. For two ranks it saves nothing.
_TWO_SHOT_BYTES = {3: 512 << 10, 4: 512 << 10}
_TWO_SHOT_BYTES_OF_MORE = 256 << 10
_LONG_RUN = 8  # elements a thread of a run that ranks share among them, in loads

# What exchanges are bound to: the addresses of the group's regions and of the mailboxes, and the x
# of all ranks where an exchange is not direct.
GROUP = Operand("exchange.group", (1,), "int32", 1)
MAIL = Operand("exchange.mail", (1,), "int32", 1)
PARTS = "exchange.parts"
# Sizes that are known where an engine is loaded: this rank's number in its group, and the bytes of
# a slot of the group's regions and of the mailboxes, in units of 16.
TENSOR_RANK, GROUP_SLOT, MAIL_SLOT = "tensor_rank", "group_slot", "mail_slot"


@dataclass(frozen=True)
class Collective:
    """A launch, and the bytes that a slot must have for it."""

    launch: Launch
    slot_bytes: int


@dataclass(frozen=True)
class Group:
    """The ranks that a collective joins. `rows`: the most that the symbolic size of its operand
    is; it decides how ranks share the work, so it must be the same for all of them."""

    ranks: int
    direct: bool
    rows: int

    def two_shot(self, row_bytes: int) -> bool:
        """Whether an all-reduce of rows of this size is shared among the ranks."""
        least = _TWO_SHOT_BYTES.get(self.ranks, _TWO_SHOT_BYTES_OF_MORE)
        return self.direct and self.ranks > 2 and self.rows * row_bytes >= least


def all_reduce(
    out: Operand,
    x: Operand,
    group: Group,
    *,
    bias: Operand | None = None,
    residual: Operand | None = None,
    weight: Operand | None = None,
    out_sum: Operand | None = None,
    eps: float = 0.0,
) -> Collective:
    """out = the sum of x over the group's ranks, + bias, + residual. With `weight` that goes to
    `out_sum`, and its RMSNorm to `out`."""
    dtype = same_dtype(out, x, bias, residual, weight, out_sum)
    matrices = [o for o in (out, x, residual, out_sum) if o is not None]
    require(all(o.shape == x.shape and o.contiguous for o in matrices), "all_reduce: whole rows")
    vectors = [o for o in (bias, weight) if o is not None]
    require(all(o.features == x.features for o in vectors), "all_reduce: bias and weight")
    require((weight is None) == (out_sum is None), "all_reduce: a norm and the sum go together")
    features, two_shot = x.features, group.two_shot(x.features * DTYPE_BYTES[dtype])
    width = load_width(*matrices, *vectors, run=features)
    if weight is not None:
        run, threads = features, block_threads(features // width, 512)
    else:
        run, threads = _THREADS * width * (_LONG_RUN if two_shot else 1), _THREADS
    spec = specialised(
        "all_reduce.cu", "all_reduce", dtype, RANKS=group.ranks, FEATURES=features, RUN=run,
        WIDTH=width, THREADS=threads, DIRECT=int(group.direct), TWO_SHOT=int(two_shot),
        BIAS=int(bias is not None), ADD=int(residual is not None), NORM=int(weight is not None),
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        out, out_sum, x, residual, bias, weight, *_exchange(group, dtype), Size(TENSOR_RANK),
        _plain(x.shape[0]), Size(GROUP_SLOT), Float(eps),
    )  # fmt: skip
    launch = Launch(spec, arguments, (_blocks(x.shape[0], features, run), 1, 1), threads)
    itemsize = DTYPE_BYTES[dtype]
    nbytes = group.rows * features * itemsize
    if not two_shot:
        return Collective(launch, group.ranks * nbytes)
    runs, share = -(-group.rows * features // run), -(-run // width // group.ranks)
    return Collective(launch, group.ranks * runs * share * width * itemsize + nbytes)


def all_gather(out: Operand, x: Operand, group: Group) -> Collective:
    """out = the columns of all ranks' x side by side; those beyond out's are left out."""
    dtype = same_dtype(out, x)
    require(out.contiguous and x.contiguous, "all_gather: whole rows")
    local, size = x.features, out.features
    require(local * (group.ranks - 1) < size <= local * group.ranks, "all_gather: features")
    width = load_width(out, x, run=local)
    spec = specialised(
        "all_gather.cu", "all_gather", dtype,
        RANKS=group.ranks, LOCAL=local, SIZE=size, WIDTH=width, THREADS=_THREADS,
        DIRECT=int(group.direct),
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        out, x, *_exchange(group, dtype), Size(TENSOR_RANK), _plain(x.shape[0]),
        Size(GROUP_SLOT),
    )  # fmt: skip
    grid = (_blocks(x.shape[0], local, _THREADS * width), 1, 1)
    nbytes = group.ranks * group.rows * local * DTYPE_BYTES[dtype]
    return Collective(Launch(spec, arguments, grid, _THREADS), nbytes)


def broadcast(x: Operand, group: Group) -> Collective:
    """x, four bytes a row, becomes that of the group's first rank on all of them."""
    require(len(x.shape) == 1 and DTYPE_BYTES[x.dtype] == 4, "broadcast: four bytes a row")
    spec = specialised(
        "broadcast.cu", "broadcast", "float32",
        RANKS=group.ranks, THREADS=_THREADS, DIRECT=int(group.direct),
    )  # fmt: skip
    arguments: tuple[Argument, ...] = (
        x, *_exchange(group, x.dtype), Size(TENSOR_RANK), _plain(x.shape[0]), Size(GROUP_SLOT),
    )  # fmt: skip
    return Collective(Launch(spec, arguments, (1, 1, 1), _THREADS), 4 * group.rows)


def send(x: Operand, rows: int) -> Collective:
    """x, of up to `rows` rows, to the rank that this one sends to."""
    return _message("send", x, rows)


def receive(out: Operand, rows: int) -> Collective:
    """What the rank sends that this one hears from."""
    return _message("receive", out, rows)


def _message(entry: str, x: Operand, rows: int) -> Collective:
    require(x.contiguous, f"{entry}: whole rows")
    features, width = x.features, load_width(x, run=x.features)
    spec = specialised("mail.cu", entry, x.dtype, FEATURES=features, WIDTH=width, THREADS=_THREADS)
    grid = (_blocks(x.shape[0], features, _THREADS * width), 1, 1)
    launch = Launch(spec, (x, MAIL, _plain(x.shape[0]), Size(MAIL_SLOT)), grid, _THREADS)
    return Collective(launch, rows * features * DTYPE_BYTES[x.dtype])


def _exchange(group: Group, dtype: str) -> tuple[Operand | None, Operand | None]:
    """The kernels' `table` and `parts`."""
    require(group.ranks >= 2, "a collective joins several ranks")
    if group.direct:
        require(group.ranks <= MAX_RANKS, f"at most {MAX_RANKS} ranks exchange directly")
        return GROUP, None
    return None, Operand(PARTS, (1,), dtype, 1)


def _plain(dim: Dim) -> int | Size:
    return dim if isinstance(dim, int) else Size(dim)


def _blocks(rows: Dim, features: int, per_block: int) -> Extent:
    if isinstance(rows, int):
        return min(-(-rows * features // per_block), MAX_BLOCKS)
    return Size(rows, features, per_block, MAX_BLOCKS)
