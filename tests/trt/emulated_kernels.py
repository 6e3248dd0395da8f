"""An emulation, in numpy, of the kernels of ours that run beside TensorRT's engines: what each of
them writes, by the comments of its .cu file."""

from __future__ import annotations

from typing import Any

import emulated_exchange
import numpy as np
from emulated_device import EmulatedMemory, Kernel

from llmforge.engine.device_sampling import PARAMS
from llmforge.engine.step import SampleRow, SamplingParams
from llmforge.errors import RequestError
from llmforge.runtime.sampling import penalised, sample

_BYTES = {"DTYPE_BFLOAT16": 2, "DTYPE_FLOAT16": 2, "DTYPE_FLOAT32": 4}
NOTHING = np.zeros(0, np.int32)
_WORDS: dict[int, np.dtype[Any]] = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32)}


def cache_write(
    memory: EmulatedMemory,
    arguments: list[Any],
    defines: dict[str, Any],
    grid: tuple[int, ...],
) -> None:
    table, past_lens, first_row, tokens = arguments
    _, rows, caches = grid
    word = _WORDS[next(size for name, size in _BYTES.items() if name in defines)]
    heads, capacity, size = (defines[name] for name in ("HEADS", "CAPACITY", "SIZE"))
    past = past_lens.array(rows)
    entries = memory.array(table.address, np.uint64, caches, 2)
    for cache_address, new_address in entries.tolist():
        new = memory.array(new_address, word, rows, heads, tokens, size)
        offset = first_row * heads * capacity * size * word.itemsize
        cache = memory.array(cache_address + offset, word, rows, heads, capacity, size)
        for row in range(rows):
            count = max(0, min(tokens, capacity - int(past[row])))
            cache[row, :, past[row] : past[row] + count] = new[row, :, :count]


def draw(
    memory: EmulatedMemory,
    arguments: list[Any],
    defines: dict[str, Any],
    grid: tuple[int, ...],
) -> None:
    tokens, largest, logits, params, history, *_ = arguments
    rows = grid[0] // defines["PARTS"]
    values = logits.array(rows, defines["VOCAB"]).astype(np.float32)
    given = memory.array(params.address, PARAMS, rows)
    for row in range(rows):
        largest.array(rows)[row] = values[row].max()
        try:
            assert not given[row]["ahead"]
            drawn_by, behind = _rows(given[row], history)
            values[row] = penalised(values[row], drawn_by)
            tokens.array(rows)[row] = sample(values[row : row + 1], [behind])[0]
        except RequestError:  # not finite: the host is told by `largest`
            tokens.array(rows)[row] = 0


def _rows(params: Any, history: Any) -> tuple[SampleRow, SampleRow]:
    """How to draw, in two parts: the repetition penalty, and all behind it."""
    start, length, distinct = (
        int(params[name]) for name in ("history_start", "history_len", "generated")
    )
    given = history.array(start + length + 2 * distinct)[start:] if length + distinct else NOTHING
    tokens, counts = np.split(given[length:], 2)
    position = int(params["position"])
    first = SamplingParams(repetition_penalty=float(params["repetition_penalty"]))
    behind = SamplingParams(
        frequency_penalty=float(params["frequency_penalty"]),
        presence_penalty=float(params["presence_penalty"]),
        temperature=float(params["temperature"]),
        top_k=int(params["top_k"]),
        top_p=float(params["top_p"]),
        min_p=float(params["min_p"]),
        seed=int(params["seed"]),
    )
    generated = np.repeat(tokens, counts)
    return SampleRow(first, position, given[:length]), SampleRow(behind, position, generated)


KERNELS: dict[str, Kernel] = {
    "cache_write": cache_write,
    "sample": draw,
    **emulated_exchange.KERNELS,
}
