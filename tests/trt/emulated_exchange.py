"""An emulation of the kernels that join ranks (csrc/exchange.cuh), ranks being threads: the same
slots and flags in the same memory, with a lock where a GPU has ordered stores."""

from __future__ import annotations

from typing import Any

import numpy as np
from emulated_device import EmulatedMemory, EmulationError, Kernel, Pointer

from llmforge.kernels.collectives import HEADER_BYTES, MAX_BLOCKS, MAX_RANKS

PATIENCE = 60.0  # seconds that a rank waits for another
# Words of the headers, as in exchange.cuh.
_EXCHANGES, _ARRIVED = 0, 64
_SENT, _RECEIVED, _TAKEN, _MAIL_ARRIVED = 0, 2, 64, 128
Arguments = list[Any]


def _word(memory: EmulatedMemory, region: int, index: int) -> Any:
    return memory.array(region + 4 * index, np.uint32, 1)


def _slot(region: int, number: int, units: int) -> int:
    return region + HEADER_BYTES + number % 2 * units * 16


def _store(memory: EmulatedMemory, region: int, index: int, value: int) -> None:
    with memory.arrived:
        _word(memory, region, index)[0] = value
        memory.arrived.notify_all()


def _wait(memory: EmulatedMemory, region: int, index: int, wanted: int) -> None:
    def there() -> bool:
        return int(_word(memory, region, index)[0]) - wanted >= 0

    with memory.arrived:
        if not memory.arrived.wait_for(there, timeout=PATIENCE):
            raise EmulationError("a rank waits for one that does not come")


def _exchange(
    memory: EmulatedMemory,
    x: np.ndarray[Any, Any],
    table: Pointer,
    ranks: int,
    own: int,
    units: int,
) -> list[np.ndarray[Any, Any]]:
    """The x of all ranks, in rank order."""
    regions = memory.array(table.address, np.uint64, ranks).tolist()
    number = int(_word(memory, regions[own], _EXCHANGES)[0])
    if ranks * x.nbytes > units * 16:
        raise EmulationError(f"{ranks} times {x.nbytes} bytes do not fit a slot of {units * 16}")
    for rank, region in enumerate(regions):
        if rank != own:
            target = _slot(region, number, units) + own * x.nbytes
            memory.array(target, x.dtype, *x.shape)[...] = x
            _store(memory, region, _ARRIVED + own, number + 1)
    parts = []
    for rank in range(ranks):
        if rank == own:
            parts.append(x)
            continue
        _wait(memory, regions[own], _ARRIVED + rank, number + 1)
        source = _slot(regions[own], number, units) + rank * x.nbytes
        parts.append(memory.array(source, x.dtype, *x.shape).copy())
    _word(memory, regions[own], _EXCHANGES)[0] = number + 1
    return parts


def all_reduce(
    memory: EmulatedMemory, arguments: Arguments, defines: dict[str, Any], grid: tuple[int, ...]
) -> None:
    out, out_sum, x, residual, bias, weight, table, parts, rank, tokens, units, _ = arguments
    assert out_sum is residual is bias is weight is parts is None, "sums alone are emulated"
    assert defines["DIRECT"], "direct exchanges alone are emulated"
    mine = x.array(tokens, defines["FEATURES"])
    wide = np.float64 if mine.dtype == np.float32 else np.float32
    every = _exchange(memory, mine, table, defines["RANKS"], rank, units)
    total = every[0].astype(wide)
    for part in every[1:]:
        total += part.astype(wide)
    out.array(tokens, defines["FEATURES"])[...] = total.astype(mine.dtype)


def all_gather(
    memory: EmulatedMemory, arguments: Arguments, defines: dict[str, Any], grid: tuple[int, ...]
) -> None:
    out, x, table, _, rank, rows, units = arguments
    mine = x.array(rows, defines["LOCAL"])
    every = _exchange(memory, mine, table, defines["RANKS"], rank, units)
    joined = np.concatenate(every, axis=1)
    out.array(rows, defines["SIZE"])[...] = joined[:, : defines["SIZE"]]


def send(
    memory: EmulatedMemory, arguments: Arguments, defines: dict[str, Any], grid: tuple[int, ...]
) -> None:
    x, boxes, tokens, units = arguments
    own, there, _ = memory.array(boxes.address, np.uint64, 3).tolist()
    message = int(_word(memory, own, _SENT)[0])
    if message:
        _wait(memory, own, _TAKEN, message - 1)
    values = x.array(tokens, defines["FEATURES"])
    target = _slot(there, message, units)
    memory.array(target, values.dtype, *values.shape)[...] = values
    _word(memory, own, _SENT)[0] = message + 1
    _store(memory, there, _MAIL_ARRIVED, message + 1)


def receive(
    memory: EmulatedMemory, arguments: Arguments, defines: dict[str, Any], grid: tuple[int, ...]
) -> None:
    out, boxes, tokens, units = arguments
    own, _, there = memory.array(boxes.address, np.uint64, 3).tolist()
    message = int(_word(memory, own, _RECEIVED)[0])
    _wait(memory, own, _MAIL_ARRIVED, message + 1)
    values = out.array(tokens, defines["FEATURES"])
    values[...] = memory.array(_slot(own, message, units), values.dtype, *values.shape)
    _word(memory, own, _RECEIVED)[0] = message + 1
    _store(memory, there, _TAKEN, message + 1)


assert (_MAIL_ARRIVED + MAX_BLOCKS) * 4 <= HEADER_BYTES
assert (_ARRIVED + 2 * MAX_BLOCKS * MAX_RANKS) * 4 <= HEADER_BYTES
KERNELS: dict[str, Kernel] = {
    "all_reduce": all_reduce,
    "all_gather": all_gather,
    "send": send,
    "receive": receive,
}
