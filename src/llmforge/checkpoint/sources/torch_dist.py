"""torch's distributed checkpoints: `.metadata`, a pickle that says which box of which tensor lies
where, and `__R_N.distcp` files in which each box is what torch.save wrote of it.

Layout: torch/distributed/checkpoint/metadata.py and filesystem.py in
https://github.com/pytorch/pytorch. The pickle is read by an unpickler that knows an explicit list
of names, each of which stands for a plain record here: it cannot import or call anything.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.artifact import listed, stays_inside
from llmforge.checkpoint.sources.blocks import Chunk
from llmforge.checkpoint.sources.files import Slice, Tree
from llmforge.checkpoint.sources.torch_file import load_torch, tensor_view
from llmforge.errors import SourceError
from llmforge.safetensors_io import NUMPY_DTYPES

METADATA = ".metadata"


class _Record:
    """Holds what is put into it; stands for every class that a metadata file may name."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.args = state


def _items(*values: Any) -> Any:
    """torch.Size, and constructors that take an iterable."""
    return tuple(values[0]) if values else ()


_MODULE = "torch.distributed.checkpoint."
_RECORDS = {
    _MODULE + "metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "TensorProperties",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    _MODULE + "filesystem": ("_StorageInfo",),
    _MODULE + "planner": (
        "SavePlan",
        "WriteItem",
        "WriteItemType",
        "TensorWriteData",
        "BytesIOWriteData",
    ),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "WindowsPath"),
}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(module, name): _Record for module, names in _RECORDS.items() for name in names},
    **{("torch", name): name for name in NUMPY_DTYPES},
    ("torch", "float8_e4m3fn"): "float8_e4m3",
    ("torch", "Size"): _items,
    ("collections", "OrderedDict"): dict,
    ("builtins", "list"): _items,
    ("builtins", "tuple"): _items,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]


class _Stored:
    """A box of a tensor, as torch.save wrote it. Opened when it is first read."""

    def __init__(self, part: Slice, dtype: str, sizes: tuple[int, ...]) -> None:
        self._part = part
        self._dtype = dtype
        self._sizes = sizes
        self._offset: int | None = None

    def fill(self, first: int, out: NDArray[np.uint8]) -> None:
        if self._offset is None:
            self._offset = self._find()
        self._part.fill(self._offset + first, out)

    def _find(self) -> int:
        info, offset = tensor_view(self._part, load_torch(self._part, "meta"))
        if (info.dtype, info.shape) != (self._dtype, self._sizes):
            raise SourceError(
                f"{self._part.label} is {list(info.shape)} {info.dtype}, not "
                f"{list(self._sizes)} {self._dtype} as {METADATA} says"
            )
        return offset


def torch_dist_chunks(
    tree: Tree, wanted: Callable[[str], bool]
) -> dict[str, tuple[str, tuple[int, ...], list[Chunk]]]:
    """Tensor → dtype, shape and chunks, of those that are wanted. Raises SourceError."""
    part = tree.require(METADATA)
    try:
        with part.stream() as file:
            metadata = _Unpickler(file).load()
        described = dict(metadata.state_dict_metadata)
        stored = {
            (key.fqn, tuple(key.offset)): value
            for key, value in metadata.storage_data.items()
            if getattr(key, "offset", None) is not None
        }
        tensors = {}
        for name, entry in described.items():
            if hasattr(entry, "chunks") and wanted(name):
                dtype = str(entry.properties.args[0])
                tensors[name] = dtype, tuple(entry.size), _chunks(tree, name, dtype, entry, stored)
    except SourceError:
        raise
    except Exception as error:  # whatever a damaged pickle raises
        lines = str(error).splitlines() or [type(error).__name__]
        raise SourceError(
            f"cannot read {part.label}: it is damaged, or holds more than a checkpoint's table "
            f"({lines[0]})"
        ) from error
    return tensors


def _chunks(
    tree: Tree,
    name: str,
    dtype: str,
    entry: Any,
    stored: Mapping[tuple[str, tuple[int, ...]], Any],
) -> list[Chunk]:
    chunks = []
    for box in entry.chunks:
        offsets, sizes = tuple(box.offsets), tuple(box.sizes)
        place = stored.get((name, offsets))
        if place is None:
            raise SourceError(
                f"{tree.label} does not say where {name} lies from {list(offsets)} on"
            )
        if transforms := getattr(place, "transform_descriptors", None):
            raise SourceError(
                f"{tree.label}: {name} is stored in a changed form ({listed(list(transforms))}), "
                "which is not supported"
            )
        path = str(place.relative_path)
        if not stays_inside(path):
            raise SourceError(f"{tree.label} names a file outside of its directory: {path!r}")
        label = f"{name} from {list(offsets)} on, in {tree.label}/{path}"
        part = tree.require(path).part(int(place.offset), int(place.length), label)
        chunks.append(Chunk(offsets, sizes, _Stored(part, dtype, sizes).fill))
    return chunks
