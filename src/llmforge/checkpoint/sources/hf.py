"""A Hugging Face model directory: config.json and weights, whole or sharded."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from llmforge.artifact import Warn, listed, no_warning, stays_inside
from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.families import plan_for, read_config
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.hf_config import read_json
from llmforge.checkpoint.mapping import SOURCE_DTYPES, Plan
from llmforge.checkpoint.sources.base import common_dtype, same_values
from llmforge.checkpoint.sources.files import whole_file
from llmforge.checkpoint.sources.torch_file import TorchFile
from llmforge.errors import SourceError
from llmforge.safetensors_io import Array, SafetensorsFile, TensorInfo

CONFIG = "config.json"
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_TORCH = (".bin", ".pt", ".pth")
# What training leaves beside the weights.
_TRAINING = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state).*")
_PART = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
_FOREIGN = {".gguf": "GGUF", ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax"}


class _WeightFile(Protocol):
    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Array: ...

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None: ...

    def close(self) -> None: ...


class HfSource:
    """A `Source` over a Hugging Face model directory. Raises SourceError where it is not whole
    and UnsupportedModelError where no family describes it. Code in it is never executed."""

    def __init__(
        self,
        directory: Path,
        warn: Warn = no_warning,
        description: Mapping[str, Any] | None = None,
        own: OwnFamily | None = None,
    ) -> None:
        self.directory = directory
        self.tokenizer_directory: Path | None = directory
        _check_directory(directory)
        family, config = read_config(directory / CONFIG, own)
        self.kind = f"Hugging Face model, family {family.name}"
        paths, index = _weight_files(directory)
        self._files = {str(path.relative_to(directory)): _open(path) for path in paths}
        self._file_of = _locate(self._files, index, directory)
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[name] for name, file in self._file_of.items()
        }
        config = self._untie(config, warn)
        self.plan: Plan = plan_for(family, config, self.tensors, str(directory))
        self.config = dataclasses.replace(config, dtype=common_dtype(self.plan, self.tensors, warn))
        self.description: Mapping[str, Any] = {
            "source": "huggingface",
            "name": directory.resolve().name,
            **(description or {}),
            "family": family.name,
            "config_sha256": hashlib.sha256((directory / CONFIG).read_bytes()).hexdigest(),
            "weights": {name: (directory / name).stat().st_size for name in self._files},
        }

    def read(self, name: str) -> Array:
        return self._file_of[name].read(name)

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        self._file_of[name].fill(name, first, out)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _untie(self, config: ModelConfig, warn: Warn) -> ModelConfig:
        """A head that differs from the embedding though the config ties them is used: so does
        transformers 5 (PreTrainedModel.tie_weights)."""
        embedding, head = _embedding_and_head(self.tensors)
        if not (config.tied_embeddings and embedding and head):
            return config
        ours, theirs = self.tensors[embedding], self.tensors[head]
        if ours.shape != theirs.shape or ours.dtype not in SOURCE_DTYPES:
            return config
        if same_values(self, embedding, head):
            return config
        warn(
            f"{head} differs from {embedding} though the config ties them: the model is "
            "converted as untied"
        )
        return dataclasses.replace(config, tied_embeddings=False)


def _embedding_and_head(tensors: Mapping[str, TensorInfo]) -> tuple[str | None, str | None]:
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    return embedding, "lm_head.weight" if "lm_head.weight" in tensors else None


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        raise SourceError(
            f"{directory} does not exist; give a model's directory or archive, or its id on the "
            "Hub (org/name)"
        )
    if not directory.is_dir():
        raise SourceError(
            f"{directory} is a file; name the directory that holds config.json and the weights"
        )
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise SourceError(f"cannot read {directory}: {error.strerror}") from error
    if not names:
        raise SourceError(f"{directory} is empty; it must hold config.json and the weights")
    if CONFIG not in names and "manifest.yaml" in names:
        raise SourceError(f"{directory} is a llmforge checkpoint already; llmforge build takes it")
    if CONFIG not in names:
        raise SourceError(f"{directory} has no config.json; {_supported(names)}")
    _check_links(directory, [CONFIG])


def _supported(names: list[str]) -> str:
    """What is supported, and which other format the files are of."""
    found = sorted({label for name in names if (label := _FOREIGN.get(Path(name).suffix))})
    but = f"{' and '.join(found)} files are not supported: " if found else ""
    usual = ", ".join(WEIGHT_FILES)
    return (
        f"{but}a model directory holds config.json and one of {usual}, or one .pt or .pth file; "
        "also read are NeMo's, TensorRT-LLM's and Meta's files (see docs/sources.md)"
    )


def _check_links(directory: Path, names: list[str]) -> None:
    """Raises SourceError where names are links that lead nowhere, as in a cache whose files were
    removed, or that was copied without them."""
    if broken := [name for name in names if not (directory / name).exists()]:
        raise SourceError(
            f"{directory} has links that lead nowhere: {listed(broken)}; download the model again, "
            "or copy it with what its links point to (cp -rL)"
        )


def _check_parts(directory: Path, names: list[str]) -> None:
    """Raises SourceError where there are parts of weights, but not the index of them."""
    parts = [name for name in names if _PART.search(name)]
    if parts:
        suffix = Path(parts[0]).suffix
        index = next(name for name in WEIGHT_FILES if name.endswith(f"{suffix}.index.json"))
        raise SourceError(
            f"{directory} has parts of the weights ({listed(parts)}) without their index, {index}; "
            "download the model again"
        )


def has_weights(directory: Path) -> bool:
    """Whether weights that this source reads are there, under their usual names."""
    return any((directory / name).is_file() for name in WEIGHT_FILES)


def _weights_name(directory: Path) -> str | None:
    """The file that holds the weights or their index: one of WEIGHT_FILES, or else the only index,
    or the only torch file, that there is under another name."""
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    usual = [name for name in WEIGHT_FILES if name in names]
    indexes = [name for name in names if name.endswith(".index.json")]
    others = [n for n in names if n.endswith(_TORCH) and not _TRAINING.fullmatch(n)]
    if not usual and not indexes:
        _check_parts(directory, names)
    for found in (usual[:1], indexes, others):
        if len(found) > 1:
            raise SourceError(
                f"{directory} has several files that may hold the weights: {listed(found)}; leave "
                f"one, or name it {WEIGHT_FILES[2]}"
            )
        if found:
            return found[0]
    return None


def _weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The files that hold the weights, and the index (tensor → file name) where there is one."""
    name = _weights_name(directory)
    if name is None:
        names = sorted(path.name for path in directory.iterdir())
        _check_links(directory, names)
        raise SourceError(f"{directory} has no weights; {_supported(names)}")
    path = directory / name
    if not name.endswith(".index.json"):
        return [path], None
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise SourceError(f"{path} has no weight_map, the table that says which file holds what")
    files = sorted({str(file) for file in index.values()})
    if outside := [file for file in files if not stays_inside(file)]:
        raise SourceError(f"{path} names files outside of its directory: {listed(outside)}")
    if missing := [file for file in files if not (directory / file).is_file()]:
        raise SourceError(
            f"{path} names files that are missing ({len(missing)}): {listed(missing)}; "
            "download the model again"
        )
    return [directory / file for file in files], index


def _open(path: Path) -> _WeightFile:
    if path.suffix == ".safetensors":
        return SafetensorsFile(path, SourceError)
    return TorchFile(whole_file(path))


def _locate(
    files: Mapping[str, _WeightFile], index: Mapping[str, str] | None, directory: Path
) -> dict[str, _WeightFile]:
    """Which file each tensor is read from: the index decides, and must be right."""
    found: dict[str, _WeightFile] = {}
    doubled = []
    for file in files.values():
        for name in file.tensors:
            if name in found and name not in (index or {}):
                doubled.append(name)
            found[name] = file
    if doubled:
        raise SourceError(f"{directory} holds these tensors twice: {listed(doubled)}")
    absent = []
    for name, file_name in (index or {}).items():
        file = files[str(Path(file_name))]
        if name in file.tensors:
            found[name] = file
        else:
            absent.append(f"{name} ({file_name})")
    if absent:
        raise SourceError(
            f"the index of {directory} names tensors that are not in their files "
            f"({len(absent)}): {listed(absent)}"
        )
    return found
