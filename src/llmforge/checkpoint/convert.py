"""foreign weights → checkpoint, streaming.

Three things run side by side: a thread reads ahead, this one changes dtypes and writes, a third
computes checksums. Memory does not grow with the model's size: see pipeline.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

from llmforge import __version__
from llmforge.artifact import GB, Manifest, Progress, Warn, listed, no_progress, no_warning
from llmforge.artifact_writer import ArtifactWriter
from llmforge.checkpoint import store
from llmforge.checkpoint.dtypes import convert_into, has_nonfinite, one_torch_thread
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.mapping import Plan
from llmforge.checkpoint.params import parameters
from llmforge.checkpoint.pipeline import BUFFERS, PIECE, BufferPool, Piece, Whole, read_ahead
from llmforge.checkpoint.sources.base import Source
from llmforge.checkpoint.sources.detect import open_path
from llmforge.checkpoint.sources.hf import HfSource
from llmforge.checkpoint.sources.hub import hub_source, is_hub_id
from llmforge.checkpoint.sources.random import RandomSource
from llmforge.checkpoint.tokenizer_files import copy_tokenizer
from llmforge.errors import SettingsError, SourceError
from llmforge.safetensors_io import NUMPY_DTYPES, Array
from llmforge.settings import ConvertSettings


def convert(
    source: str | Path | None,
    output: Path,
    settings: ConvertSettings,
    *,
    progress: Progress = no_progress,
    warn: Warn = no_warning,
    notice: Warn = no_warning,
    from_config: Path | None = None,
    seed: int | None = None,
    own: OwnFamily | None = None,
) -> Manifest:
    """Convert a model into a checkpoint at `output` and return its manifest.

    `source` is a directory or archive, or the id of a model on the Hub; what it holds is found
    out, and told to `notice` before the work begins. With `from_config` there is no source:
    the weights are random, drawn from `seed` (default 0). With `own`, the model is of that family,
    which is not built in. Raises SourceError, OutputError, DefinitionError and SettingsError;
    nothing is left at `output` then.
    """
    with ArtifactWriter(output, store.MANIFEST, overwrite=settings.overwrite) as writer:
        opened = open_source(
            source, settings, writer.scratch, progress, warn, from_config, seed, own
        )
        with contextlib.closing(opened):
            notice(f"source: {opened.kind}")
            config = dataclasses.replace(opened.config, dtype=settings.dtype or opened.config.dtype)
            writer.require_space(store.nbytes(config, config.dtype))
            shard_bytes = int(settings.shard_size_gb * GB)
            with store.WeightsWriter(writer, config, shard_bytes) as weights:
                job = _Conversion(opened, config.dtype, weights, progress)
                job.run()
            job.report(warn)
            if (tokenizer := opened.tokenizer_directory) is not None:
                # Where it was unpacked means nothing to the user.
                unpacked = tokenizer.is_relative_to(writer.scratch)
                where = str(source) if unpacked else str(tokenizer)
                copy_tokenizer(tokenizer, writer.directory / store.TOKENIZER, warn, where)
            origin = dict(opened.description)
            if own is not None:
                origin["definition"] = own.origin
            return writer.commit(
                store.manifest_data(
                    config, weights.names, origin, _ignored(opened.plan), __version__
                )
            )


def open_source(
    source: str | Path | None,
    settings: ConvertSettings,
    scratch: Path,
    progress: Progress = no_progress,
    warn: Warn = no_warning,
    from_config: Path | None = None,
    seed: int | None = None,
    own: OwnFamily | None = None,
) -> Source:
    """The source that the arguments of `convert` name. `scratch` is a directory that it may make
    for what has to be unpacked, and that the caller removes."""
    if from_config is not None:
        if source is not None:
            raise SettingsError("give a source or --from-config, not both")
        return RandomSource(from_config, seed or 0, settings.dtype, own)
    if source is None:
        raise SettingsError("give a source: a model directory, a Hub id, or --from-config FILE")
    if seed is not None:
        raise SettingsError("--seed is for random weights: give --from-config FILE with it")
    if is_hub_id(source):
        return hub_source(str(source), settings.revision, progress, warn, own)
    if settings.revision is not None:
        raise SettingsError(f"--revision is for models on the Hub, and {source} is not one")
    if own is not None:
        return HfSource(Path(source), warn, own=own)
    return open_path(Path(source), scratch, warn)


class _Conversion:
    """Moves every parameter from a source to the weight files."""

    def __init__(
        self, source: Source, dtype: str, weights: store.WeightsWriter, progress: Progress
    ) -> None:
        self._source = source
        self._dtype = dtype
        self._weights = weights
        self._progress = progress
        self._specs = parameters(source.config)
        self._total = store.nbytes(source.config, dtype)
        self._done = 0
        self._pool = BufferPool(BUFFERS, PIECE)
        self._converted = BufferPool(BUFFERS, 2 * PIECE)
        # Names in order of writing; dictionaries because they keep order and drop doubles.
        self._nonfinite: dict[str, None] = {}
        self._overflowed: dict[str, None] = {}

    def run(self) -> None:
        waiting: dict[str, Array] = {}  # results of whole groups that are not due yet
        order = iter(self._specs)
        due = next(order)
        left = math.prod(self._specs[due].shape)
        items = read_ahead(self._source, self._source.plan.groups, self._pool)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(items))
            if any(t.dtype != self._dtype for t in self._source.tensors.values()):
                stack.enter_context(one_torch_thread())
            for item in items:
                if isinstance(item, Whole) and not item.group.part:
                    waiting.update(self._apply(item))
                else:
                    # Groups come in the order of their first parameter, so this one is due.
                    assert item.group.ours == (due,), (item.group.ours, due)
                    left -= self._write_part(due, item)
                del item  # nothing may outlive its turn: read_ahead counts it as gone
                while not left or due in waiting:
                    if left:
                        self._write_whole(due, waiting.pop(due))
                    due = next(order, "")
                    left = math.prod(self._specs[due].shape) if due else -1
        assert not due and not waiting, (due, list(waiting))

    def _apply(self, item: Whole) -> dict[str, Array]:
        convert = item.group.convert
        assert convert is not None
        result = dict(zip(item.group.ours, convert(item.arrays, self._source.config), strict=True))
        for name, array in result.items():
            shape = self._specs[name].shape
            if item.group.part:
                shape = item.group.shape or shape[1:]  # of one expert
            if array.shape != shape:
                raise SourceError(
                    f"{', '.join(item.group.theirs)} give {name} the shape {list(array.shape)}; "
                    f"it must be {list(shape)}"
                )
        return result

    def _write_part(self, name: str, item: Piece | Whole) -> int:
        """Write the next elements of a parameter: how many they are."""
        if isinstance(item, Piece):
            self._write(name, item.values, functools.partial(self._pool.give, item.buffer))
            return item.values.size
        [part] = self._apply(item).values()
        self._write_whole(name, part)
        return part.size

    def _write_whole(self, name: str, array: Array) -> None:
        flat = array.reshape(-1)
        step = PIECE // flat.itemsize
        for first in range(0, flat.size, step):
            self._write(name, flat[first : first + step], lambda: None)

    def _write(self, name: str, values: Array, release: Callable[[], None]) -> None:
        """Write a piece in the checkpoint's dtype, and look at it while it passes."""
        bad = has_nonfinite(values)
        if bad:
            self._nonfinite[name] = None
        dtype = NUMPY_DTYPES[self._specs[name].dtype or self._dtype]
        if values.dtype != dtype:
            buffer = self._converted.take()
            out = buffer[: values.size * dtype.itemsize].view(dtype)
            convert_into(values, out)
            release()
            if not bad and has_nonfinite(out):
                self._overflowed[name] = None
            values, release = out, functools.partial(self._converted.give, buffer)
        self._weights.write_piece(name, values, release)
        self._done += values.nbytes
        self._progress("converting", self._done, self._total)

    def report(self, warn: Warn) -> None:
        """Say what is suspicious about the values."""
        if names := list(self._nonfinite):
            warn(f"NaN or infinite values in {len(names)} parameters: {listed(names)}")
        if names := list(self._overflowed):
            warn(
                f"values too large for {self._dtype}, which became infinite, in {len(names)} "
                f"parameters: {listed(names)}; bfloat16 has the range of float32"
            )


def _ignored(plan: Plan) -> dict[str, object]:
    """Reason → how many tensors, and the first few of them."""
    return {
        reason: {"count": len(names), "examples": sorted(names)[:3]}
        for reason, names in plan.ignored.items()
    }
