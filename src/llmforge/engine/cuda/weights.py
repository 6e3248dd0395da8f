"""Weights from the engine's file into GPU memory: several threads read into pinned memory and copy
from there, so that reading and copying overlap."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import torch

from llmforge.errors import StoreError
from llmforge.model.graph import Graph
from llmforge.model.reference import DTYPES
from llmforge.safetensors_io import SafetensorsFile

_PIECE = 16 << 20  # bytes read and copied at a time
_READERS = 8


def load_weights(path: Path, graph: Graph, device: torch.device) -> dict[str, torch.Tensor]:
    """The graph's parameters on the device. Raises StoreError where the file is not the graph's."""
    infos = SafetensorsFile(path).tensors
    expected = {p.name: (p.dtype, p.shape) for p in graph.parameters}
    if {name: (info.dtype, info.shape) for name, info in infos.items()} != expected:
        raise StoreError(f"{path} does not hold the weights of its graph; build the engine again")
    weights = {
        name: torch.empty(info.shape, dtype=DTYPES[info.dtype], device=device)
        for name, info in infos.items()
    }
    readers = max(1, min(_READERS, len(os.sched_getaffinity(0))))
    stages: SimpleQueue[_Stage] = SimpleQueue()
    for _ in range(readers):
        stages.put(_Stage(device))
    with open(path, "rb", buffering=0) as file, ThreadPoolExecutor(readers) as pool:

        def copy(piece: tuple[int, torch.Tensor]) -> None:
            stage = stages.get()
            try:
                stage.copy(file.fileno(), *piece, path)
            finally:
                stages.put(stage)

        pieces = (
            piece for name, info in infos.items() for piece in _pieces(info.start, weights[name])
        )
        list(pool.map(copy, pieces))
    torch.cuda.synchronize(device)
    return weights


def _pieces(start: int, tensor: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """(offset in the file, bytes of the tensor) for runs of at most `_PIECE` bytes."""
    flat = tensor.view(-1).view(torch.uint8)
    for first in range(0, len(flat), _PIECE):
        yield start + first, flat[first : first + _PIECE]


class _Stage:
    """A piece of pinned memory, and the stream that copies from it."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True)
        self._view: memoryview = self._pinned.numpy().data
        self._stream = torch.cuda.Stream(device)

    def copy(self, descriptor: int, offset: int, target: torch.Tensor, path: Path) -> None:
        self._stream.synchronize()  # the copy before has left the pinned memory
        done, size = 0, len(target)
        while done < size:
            count = os.preadv(descriptor, [self._view[done:size]], offset + done)
            if count == 0:
                raise StoreError(f"{path} is truncated; build the engine again")
            done += count
        with torch.cuda.stream(self._stream):
            target.copy_(self._pinned[:size], non_blocking=True)
