"""Directories of zarr arrays, one a tensor, as Megatron Core wrote its first distributed
checkpoints.

Layout: ZarrSaveShardedStrategy in https://github.com/NVIDIA/Megatron-LM
(megatron/core/dist_checkpointing/strategies/zarr.py, up to release 0.12): format 2, not compressed,
a chunk for what one rank held, bfloat16 under that name; and the storage specification of version
2, https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

from llmforge.artifact import listed
from llmforge.checkpoint.sources.blocks import Chunk
from llmforge.checkpoint.sources.files import Slice, Tree
from llmforge.errors import SourceError
from llmforge.safetensors_io import NUMPY_DTYPES

ARRAY = ".zarray"
_DTYPES = {
    "bfloat16": "bfloat16",
    "<f2": "float16",
    "<f4": "float32",
    "<f8": "float64",
    "|u1": "uint8",
    "<i4": "int32",
    "<i8": "int64",
}
_PLAIN = {"zarr_format": 2, "compressor": None, "filters": None, "order": "C"}


def zarr_chunks(
    tree: Tree, wanted: Callable[[str], bool]
) -> dict[str, tuple[str, tuple[int, ...], list[Chunk]]]:
    """Tensor → dtype, shape and chunks, of those that are wanted. Raises SourceError."""
    folders: dict[str, dict[str, Slice]] = {}
    for path, part in tree.files.items():
        name, _, file = path.partition("/")
        folders.setdefault(name, {})[file] = part
    return {
        name: _array(Tree(f"{tree.label}/{name}", files))
        for name, files in folders.items()
        if ARRAY in files and wanted(name)
    }


def _array(tree: Tree) -> tuple[str, tuple[int, ...], list[Chunk]]:
    part = tree.require(ARRAY)
    try:
        header = json.loads(part.read())
        shape, sizes = tuple(header["shape"]), tuple(header["chunks"])
        theirs = str(header["dtype"])
        separator = header.get("dimension_separator", ".")
    except (ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{part.label} is not the header of a zarr array") from error
    _check_header(part.label, header, theirs, shape, sizes)
    dtype = _DTYPES[theirs]
    nbytes = math.prod(sizes) * NUMPY_DTYPES[dtype].itemsize
    chunks, missing = [], []
    for index in itertools.product(*(range(-(-n // k)) for n, k in zip(shape, sizes, strict=True))):
        file = separator.join(map(str, index)) or "0"
        if file not in tree.files:
            missing.append(file)
            continue
        stored = tree.files[file]
        if stored.size != nbytes:
            raise SourceError(f"{stored.label} has {stored.size} bytes; it must have {nbytes}")
        offsets = tuple(i * k for i, k in zip(index, sizes, strict=True))
        # The last chunk is stored whole where the first dimension does not divide.
        kept = tuple(min(k, n - o) for k, n, o in zip(sizes, shape, offsets, strict=True))
        chunks.append(Chunk(offsets, kept, stored.fill))
    if missing:
        raise SourceError(f"{tree.label} lacks chunks ({len(missing)}): {listed(missing)}")
    return dtype, shape, chunks


def _check_header(
    label: str, header: Any, dtype: str, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    if dtype not in _DTYPES:
        raise SourceError(
            f"{label}: dtype {dtype!r} is not supported; supported: {', '.join(_DTYPES)}"
        )
    for key, plain in _PLAIN.items():
        if header.get(key) != plain:
            raise SourceError(
                f"{label}: {key} = {header.get(key)!r} is not supported, only {plain}"
            )
    good = len(shape) == len(sizes) and all(type(n) is int and n > 0 for n in (*shape, *sizes))
    if not good or any(n % k for n, k in zip(shape[1:], sizes[1:], strict=True)):
        raise SourceError(f"{label}: chunks of {list(sizes)} do not divide the shape {list(shape)}")
