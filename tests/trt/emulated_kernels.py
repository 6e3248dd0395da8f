"""An emulation, in numpy, of the kernels of ours that run beside TensorRT's engines: what each of
them writes, by the comments of its .cu file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import emulated_exchange
import numpy as np
from emulated_device import EmulatedMemory, Kernel

from llmforge.engine.device_sampling import PARAMS
from llmforge.engine.step import SampleRow, SamplingParams
from llmforge.errors import RequestError
from llmforge.runtime.sampling import penalised, sample

_BYTES = {"DTYPE_BFLOAT16": 2, "DTYPE_FLOAT16": 2, "DTYPE_FLOAT32": 4}
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
            drawn_by = _row(given[row], history)
            values[row] = _deducted(penalised(values[row], drawn_by), given[row], history)
            plain = drawn_by._replace(params=replace(drawn_by.params, repetition_penalty=1.0))
            tokens.array(rows)[row] = sample(values[row : row + 1], [plain])[0]
        except RequestError:  # not finite: the host is told by `largest`
            tokens.array(rows)[row] = 0


def _row(params: Any, history: Any) -> SampleRow:
    start, length = int(params["history_start"]), int(params["history_len"])
    seen = history.array(start + length)[start:] if length else np.zeros(0, np.int32)
    return SampleRow(
        SamplingParams(
            repetition_penalty=float(params["repetition_penalty"]),
            temperature=float(params["temperature"]),
            top_k=int(params["top_k"]),
            top_p=float(params["top_p"]),
            min_p=float(params["min_p"]),
            seed=int(params["seed"]),
        ),
        int(params["position"]),
        seen,
    )


def _deducted(scores: Any, params: Any, history: Any) -> Any:
    start, count = int(params["history_start"] + params["history_len"]), int(params["deductions"])
    if count:
        found = history.array(start + 2 * count)[start:]
        inside = found[:count] < len(scores)
        scores = scores.copy()
        scores[found[:count][inside]] -= found[count:].view(np.float32)[inside]
    return scores


KERNELS: dict[str, Kernel] = {
    "cache_write": cache_write,
    "sample": draw,
    **emulated_exchange.KERNELS,
}
