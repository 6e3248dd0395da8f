"""The checkpoint directory: one format for all models, not cut by rank.

    manifest.yaml                      kind, format_version, what it was made from, model config,
                                       a checksum for every file
    model-00001-of-0000N.safetensors   every parameter of params.py, in that order, in one dtype
                                       (but for those whose spec names another)
    tokenizer/                         tokenizer, generation config and chat template, if any

The same source converted with the same settings gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmforge.artifact import Manifest, check_files, listed, read_manifest
from llmforge.artifact_writer import ArtifactWriter
from llmforge.checkpoint.config import DTYPE_BYTES, ModelConfig
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.errors import StoreError
from llmforge.safetensors_io import Array, SafetensorsFile, SafetensorsWriter, TensorInfo

KIND = "checkpoint"
FORMAT_VERSION = 1
MANIFEST = "manifest.yaml"
TOKENIZER = "tokenizer"


class Checkpoint:
    """A checkpoint opened for reading.

    directory: where it is. config: the model. digest: of the manifest, "sha256:...".
    manifest: the manifest's data. tensors: name → TensorInfo, in the order of `parameters`.
    """

    def __init__(
        self, manifest: Manifest, config: ModelConfig, files: Iterable[SafetensorsFile]
    ) -> None:
        self.directory = manifest.directory
        self.manifest = manifest.data
        self.digest = manifest.digest
        self.config = config
        self._file_of = {name: file for file in files for name in file.tensors}
        specs = parameters(config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: self._file_of[name].tensors[name] for name in specs if name in self._file_of
        }
        self._check(specs)

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Opens it and checks that it is whole: sizes of files, names, shapes and dtypes of
        tensors (not checksums: `artifact.verify_files`). Raises StoreError."""
        manifest = read_manifest(path, MANIFEST, KIND, FORMAT_VERSION)
        config, weights = _config_and_weights(manifest)
        check_files(manifest)
        return cls(manifest, config, [SafetensorsFile(path / name) for name in weights])

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Array:
        """A fresh contiguous array of the parameter, or of ``start:stop`` of its dimension `dim`;
        with `rows`, of that run of its first dimension alone. Safe to call from several
        threads."""
        return self._file_of[name].read(name, dim, start, stop, rows)

    def map(self, name: str) -> Array:
        """The parameter where it lies in its file, read-only."""
        return self._file_of[name].map(name)

    def release(self) -> None:
        """Let go of the memory of what is mapped."""
        for file in set(self._file_of.values()):
            file.release()

    def _check(self, specs: Mapping[str, ParamSpec]) -> None:
        problems = []
        if missing := [name for name in specs if name not in self._file_of]:
            problems.append(f"missing: {listed(missing)}")
        if extra := [name for name in self._file_of if name not in specs]:
            problems.append(f"not in the model: {listed(extra)}")
        wrong = []
        for name, info in self.tensors.items():
            dtype, shape = specs[name].stored_as(self.config), specs[name].shape
            if (info.dtype, info.shape) != (dtype, shape):
                found = f"{info.dtype} {list(info.shape)}"
                wrong.append(f"{name} ({found} instead of {dtype} {list(shape)})")
        if wrong:
            problems.append(f"of the wrong kind: {listed(wrong)}")
        if problems:
            raise StoreError(
                f"the weights of {self.directory} are not those of its config: "
                f"{'; '.join(problems)}; convert the model again"
            )


def _config_and_weights(manifest: Manifest) -> tuple[ModelConfig, list[str]]:
    path = manifest.directory / MANIFEST
    config, weights = manifest.data.get("config"), manifest.data.get("weights")
    if not isinstance(config, dict) or not isinstance(weights, list):
        raise StoreError(f"{path} is corrupt: it has no model config or no list of weight files")
    if unknown := [str(name) for name in weights if name not in manifest.files]:
        raise StoreError(f"{path} is corrupt: weights that are no files of it: {listed(unknown)}")
    try:
        result = ModelConfig.from_dict(config)
        parameters(result)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise StoreError(f"{path} is corrupt: its model config is not valid: {error}") from error
    return result, weights


def nbytes(config: ModelConfig, dtype: str) -> int:
    """The bytes of all parameters of a model stored in `dtype`."""
    return sum(
        _count(spec) * DTYPE_BYTES[spec.dtype or dtype] for spec in parameters(config).values()
    )


def num_parameters(config: ModelConfig) -> int:
    return sum(_count(spec) for spec in parameters(config).values())


def _count(spec: ParamSpec) -> int:
    return math.prod(spec.shape)


class WeightsWriter:
    """Streams the parameters, in the order of `parameters`, into weight files of at most
    `shard_bytes` (a larger parameter gets a file of its own) of `writer`'s directory."""

    def __init__(self, writer: ArtifactWriter, config: ModelConfig, shard_bytes: int) -> None:
        self._writer = writer
        self._config = config
        self._shards = _divide(parameters(config).values(), config, shard_bytes)
        count = len(self._shards)
        self.names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        self._current: SafetensorsWriter | None = None
        self._index = -1

    def write_piece(
        self, name: str, piece: Array, release: Callable[[], None] | None = None
    ) -> None:
        """As SafetensorsWriter.write_piece; pieces are in the parameter's dtype."""
        if self._current is None:
            self._open_next()
        assert self._current is not None
        self._current.write_piece(name, piece, release)
        if self._current.complete:
            size, digest = self._current.close()
            self._writer.record(self.names[self._index], size, digest)
            self._current = None

    def _open_next(self) -> None:
        self._index += 1
        shard = self._shards[self._index]
        self._current = SafetensorsWriter(
            self._writer.directory / self.names[self._index],
            [(spec.name, spec.stored_as(self._config), spec.shape) for spec in shard],
            {"format": "pt"},
        )

    def __enter__(self) -> WeightsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._current is not None:
            self._current.abandon()
        assert error is not None or self._index == len(self._shards) - 1, "parameters are left out"


def _divide(
    specs: Iterable[ParamSpec], config: ModelConfig, shard_bytes: int
) -> list[list[ParamSpec]]:
    """Consecutive parameters, as many to a file as fit."""
    shards: list[list[ParamSpec]] = []
    filled = 0
    for spec in specs:
        size = _count(spec) * DTYPE_BYTES[spec.stored_as(config)]
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += size
    return shards


def manifest_data(
    config: ModelConfig,
    weights: list[str],
    created_from: Mapping[str, Any],
    ignored: Mapping[str, Any],
    version: str,
) -> dict[str, Any]:
    """The manifest, all but its list of files."""
    return {
        "kind": KIND,
        "format_version": FORMAT_VERSION,
        "llmforge": version,
        "created_from": dict(created_from),
        "dtype": config.dtype,
        "num_parameters": num_parameters(config),
        "config": config.to_dict(),
        "weights": weights,
        "ignored_source_tensors": dict(ignored),
    }
