"""foreign weights → checkpoint, streaming.

Three things run side by side: a thread reads ahead, this one changes dtypes and writes, a third
computes checksums. Memory is bounded by the largest group of tensors or READ_AHEAD, whichever is
more, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections import deque
from collections.abc import Generator, Iterable
from pathlib import Path

from llmforge import __version__
from llmforge.artifact import (
    ArtifactWriter,
    Manifest,
    Progress,
    Warn,
    listed,
    no_progress,
    no_warning,
)
from llmforge.checkpoint import store
from llmforge.checkpoint.config import DTYPE_BYTES
from llmforge.checkpoint.dtypes import convert_parts, has_nonfinite
from llmforge.checkpoint.mapping import Group, Plan
from llmforge.checkpoint.params import parameters
from llmforge.checkpoint.sources.base import Source
from llmforge.checkpoint.sources.hf import HfSource
from llmforge.checkpoint.sources.hub import hub_source, is_hub_id
from llmforge.checkpoint.sources.random import RandomSource
from llmforge.checkpoint.tokenizer_files import copy_tokenizer
from llmforge.errors import SettingsError, SourceError
from llmforge.safetensors_io import Array
from llmforge.settings import ConvertSettings

READ_AHEAD = 256 << 20
_MOST_IN_FLIGHT = 1 << 30
_GB = 10**9


def convert(
    source: str | Path | None,
    output: Path,
    settings: ConvertSettings,
    *,
    progress: Progress = no_progress,
    warn: Warn = no_warning,
    from_config: Path | None = None,
    seed: int | None = None,
) -> Manifest:
    """Convert a model into a checkpoint at `output` and return its manifest.

    `source` is a directory or the id of a model on the Hub. With `from_config` there is no source:
    the weights are random, drawn from `seed` (default 0). Raises SourceError, OutputError and
    SettingsError; nothing is left at `output` then.
    """
    writer = ArtifactWriter(output, store.MANIFEST, overwrite=settings.overwrite)
    opened = open_source(source, settings, progress, warn, from_config, seed)
    try:
        config = dataclasses.replace(opened.config, dtype=settings.dtype or opened.config.dtype)
        writer.require_space(store.nbytes(config, config.dtype))
        with writer:
            job = _Conversion(opened, config.dtype, progress)
            shard_bytes = int(settings.shard_size_gb * _GB)
            with store.WeightsWriter(writer, config, shard_bytes) as weights:
                job.run(weights)
            job.report(warn)
            if opened.tokenizer_directory is not None:
                copy_tokenizer(opened.tokenizer_directory, writer.directory / store.TOKENIZER, warn)
            return writer.commit(
                store.manifest_data(
                    config, weights.names, opened.description, _ignored(opened.plan), __version__
                )
            )
    finally:
        opened.close()


def open_source(
    source: str | Path | None,
    settings: ConvertSettings,
    progress: Progress = no_progress,
    warn: Warn = no_warning,
    from_config: Path | None = None,
    seed: int | None = None,
) -> Source:
    """The source that the arguments of `convert` name."""
    if from_config is not None:
        if source is not None:
            raise SettingsError("give a source or --from-config, not both")
        return RandomSource(from_config, seed or 0, settings.dtype)
    if source is None:
        raise SettingsError("give a source: a model directory, a Hub id, or --from-config FILE")
    if seed is not None:
        raise SettingsError("--seed is for random weights: give --from-config FILE with it")
    if is_hub_id(source):
        return hub_source(str(source), settings.revision, progress, warn)
    if settings.revision is not None:
        raise SettingsError(f"--revision is for models on the Hub, and {source} is not one")
    return HfSource(Path(source), warn)


class _Conversion:
    """Moves every parameter from a source to the weight files."""

    def __init__(self, source: Source, dtype: str, progress: Progress) -> None:
        self._source = source
        self._dtype = dtype
        self._progress = progress
        self._specs = parameters(source.config)
        self._nonfinite: list[str] = []
        self._overflowed: list[str] = []

    def run(self, weights: store.WeightsWriter) -> None:
        total = store.nbytes(self._source.config, self._dtype)
        done = 0
        waiting: dict[str, Array] = {}  # results of a group that are not due yet
        order = iter(self._specs)
        due = next(order, None)
        with contextlib.closing(read_ahead(self._source, self._source.plan.groups)) as stream:
            for group, arrays in stream:
                waiting.update(self._apply(group, arrays))
                del arrays  # no array may outlive its turn: read_ahead counts it as gone
                while due in waiting:
                    done += waiting[due].size * DTYPE_BYTES[self._dtype]
                    weights.write(due, self._parts(due, waiting.pop(due)))
                    self._progress("converting", done, total)
                    due = next(order, None)
        assert due is None and not waiting, (due, list(waiting))

    def _apply(self, group: Group, arrays: list[Array]) -> dict[str, Array]:
        if group.convert is not None:
            arrays = group.convert(arrays, self._source.config)
        result = dict(zip(group.ours, arrays, strict=True))
        for name, array in result.items():
            if array.shape != (shape := self._specs[name].shape):
                raise SourceError(
                    f"{', '.join(group.theirs)} give {name} the shape {list(array.shape)}; "
                    f"it must be {list(shape)}"
                )
        return result

    def _parts(self, name: str, array: Array) -> Iterable[Array]:
        """The array in the checkpoint's dtype, a piece at a time, looked at as it passes."""
        nonfinite = overflowed = False
        for before, after in convert_parts(array, self._dtype):
            bad = has_nonfinite(before)
            nonfinite |= bad
            overflowed |= before is not after and not bad and has_nonfinite(after)
            yield after
        if nonfinite:
            self._nonfinite.append(name)
        if overflowed:
            self._overflowed.append(name)

    def report(self, warn: Warn) -> None:
        """Say what is suspicious about the values."""
        if names := self._nonfinite:
            warn(f"{len(names)} parameters hold NaN or infinite values: {listed(names)}")
        if names := self._overflowed:
            warn(
                f"{len(names)} parameters hold values too large for {self._dtype}, which became "
                f"infinite: {listed(names)}; bfloat16 has the range of float32"
            )


def _ignored(plan: Plan) -> dict[str, object]:
    """Reason → how many tensors, and the first few of them."""
    return {
        reason: {"count": len(names), "examples": sorted(names)[:3]}
        for reason, names in plan.ignored.items()
    }


def read_ahead(
    source: Source, groups: Iterable[Group]
) -> Generator[tuple[Group, list[Array]], None, None]:
    """The groups with their arrays, read by a thread while the caller works on earlier ones.

    At most READ_AHEAD bytes are held, the group that the caller works on included; or two groups,
    where these are larger but fit _MOST_IN_FLIGHT; or one group of any size.
    """
    ready: deque[tuple[Group, list[Array]] | BaseException | None] = deque()
    changed = threading.Condition()
    in_flight = [0, 0]  # bytes, groups
    stopped = False

    def has_room(nbytes: int) -> bool:
        after = in_flight[0] + nbytes
        return (
            stopped
            or in_flight[1] == 0
            or after <= READ_AHEAD
            or (in_flight[1] == 1 and after <= _MOST_IN_FLIGHT)
        )

    def put(item: tuple[Group, list[Array]] | BaseException | None) -> None:
        with changed:
            ready.append(item)
            changed.notify_all()

    def work() -> None:
        try:
            for group in groups:
                with changed:
                    changed.wait_for(functools.partial(has_room, group.nbytes))
                    if stopped:
                        return
                    in_flight[0] += group.nbytes
                    in_flight[1] += 1
                put((group, [source.read(name) for name in group.theirs]))
            put(None)
        except BaseException as error:  # raised again in the caller's thread
            put(error)

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: bool(ready))
                item = ready.popleft()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            size = item[0].nbytes
            yield item
            del item
            with changed:
                in_flight[0] -= size
                in_flight[1] -= 1
                changed.notify_all()
    finally:
        with changed:
            stopped = True
            changed.notify_all()
        thread.join()
