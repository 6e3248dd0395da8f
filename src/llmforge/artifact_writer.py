"""An artifact written whole or not at all.

The files are written into a hidden sibling, `.NAME.partial`, and the manifest last, with the size
and checksum of each of them. Then the sibling is renamed to its place. So a directory that has a
manifest is complete, and a run that fails or is killed leaves nothing at the output path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from llmforge import checksum
from llmforge.artifact import Manifest, hash_file, listed, parse_manifest, size_text
from llmforge.errors import OutputError, StoreError
from llmforge.guard import FileLock, interrupts_wait, signals_raise

_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_free_space(output: Path, nbytes: int) -> None:
    """Raises OutputError where the file system of `output` has fewer than `nbytes` free."""
    free = _free_space(Path(os.path.realpath(output)))
    if free < nbytes:
        raise OutputError(
            f"not enough space for {output}: {size_text(nbytes)} needed, {size_text(free)} free"
        )


def _free_space(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


class ArtifactWriter:
    """Writes an artifact: a context manager whose `directory` is to be filled, then `commit`.
    `scratch` is a directory beside it that may be made for the time until then.

    Leaving the context without `commit` (an exception, Ctrl-C, SIGTERM, SIGHUP) removes everything
    that was written. A killed run's leftover is removed by the next run to the same output. A lock
    keeps two processes from writing to one output.

    Raises OutputError, on construction and on entry, where `output` cannot be written or holds
    something else; with `overwrite`, only an artifact with the same `manifest_name` is replaced,
    and only where it holds nothing else.
    """

    def __init__(self, output: Path, manifest_name: str, *, overwrite: bool = False) -> None:
        # A link is followed: the directory it points to is what gets replaced.
        self.output = Path(os.path.realpath(output))
        self.directory = self._sibling("partial")
        self.scratch = self._sibling("scratch")
        self._shown = output
        self._manifest_name = manifest_name
        self._overwrite = overwrite
        self._recorded: dict[str, tuple[int, str]] = {}
        self._created_parents: list[Path] = []
        self._lock = FileLock(self._sibling("lock"))
        self._signals = contextlib.ExitStack()
        self._committed = False
        self._needed = 0
        self._check_output()

    def _sibling(self, suffix: str) -> Path:
        return self.output.parent / f".{self.output.name}.{suffix}"

    def _check_output(self) -> None:
        output, shown = self.output, self._shown
        try:
            if not output.exists():
                self._check_parent()
                return
            if not output.is_dir():
                raise OutputError(f"{shown} is a file; name a directory for the output")
            if os.path.ismount(output):
                raise OutputError(f"{shown} is a mount point; name a directory inside it")
            if any(output.iterdir()):
                if not (output / self._manifest_name).is_file():
                    raise OutputError(
                        f"{shown} exists and holds something else (there is no "
                        f"{self._manifest_name}): name another output or remove it yourself"
                    )
                if not self._overwrite:
                    raise OutputError(
                        f"{shown} exists already; give --overwrite to replace it, "
                        "or name another output"
                    )
                if others := self._others():
                    raise OutputError(
                        f"{shown} holds files beside its own, which would be lost: "
                        f"{listed(others)}; move them, or name another output"
                    )
            self._check_parent()
        except OSError as error:
            raise self._output_error(error) from error

    def _others(self) -> list[str]:
        """The files at the output that its manifest does not list; none where that is corrupt."""
        manifest = self.output / self._manifest_name
        try:
            own = set(parse_manifest(manifest, manifest.read_bytes())["files"])
        except (StoreError, LookupError, TypeError):
            return []
        found = set(_files_below(self.output)) - {self._manifest_name}
        return sorted(found - own)

    def _check_parent(self) -> None:
        parent = self.output.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"cannot write {self._shown}: {parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {self._shown}: {parent} is not writable")

    def __enter__(self) -> ArtifactWriter:
        self._signals.enter_context(signals_raise())
        try:
            self._make_parents()
            if not self._lock.acquire():
                raise OutputError(
                    f"another llmforge process is writing {self._shown}; wait until it is done "
                    "or name another output"
                )
            self._clear_leftovers()
            self._check_output()
            self.directory.mkdir()
        except BaseException as error:
            self._leave()
            if isinstance(error, OSError):
                raise self._output_error(error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with interrupts_wait():
            if not self._committed:
                shutil.rmtree(self.directory, ignore_errors=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self._leave()
        if isinstance(error, OSError) and self._is_ours(error):
            raise self._output_error(error) from error

    def _leave(self) -> None:
        self._lock.release()
        if not self._committed:
            self._remove_parents()
        self._signals.close()

    def require_space(self, nbytes: int) -> None:
        """Raises OutputError where `nbytes` more do not fit."""
        self._needed = nbytes
        check_free_space(self.output, nbytes)

    def record(self, relative: str, size: int, digest: str) -> None:
        """Take over the checksum of a file that was hashed while it was written."""
        self._recorded[relative] = (size, digest)

    def commit(self, manifest: Mapping[str, Any]) -> Manifest:
        """Write the manifest, with the entry `files` added, and put the directory in its place.

        Files that were not recorded are hashed now. Everything is on disk when this returns.
        """
        import yaml

        files: dict[str, dict[str, Any]] = {}
        for relative in sorted(_files_below(self.directory)):
            path = self.directory / relative
            size, digest = (
                self._recorded.pop(relative) if relative in self._recorded else hash_file(path)
            )
            assert size == path.stat().st_size, f"{path} has another size than was recorded"
            files[relative] = {"size": size, checksum.NAME: digest}
            _fsync(path)
        assert not self._recorded, f"recorded, but not written: {sorted(self._recorded)}"
        data = {**manifest, "files": files}
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100).encode()
        path = self.directory / self._manifest_name
        path.write_bytes(text)
        _fsync(path)
        for directory, _, _ in os.walk(self.directory):
            _fsync(Path(directory))
        self._put_in_place()
        return Manifest.of(self._shown, data, text)

    def _put_in_place(self) -> None:
        old = self._sibling("old")
        if self.output.exists() and any(self.output.iterdir()):
            os.rename(self.output, old)
        os.rename(self.directory, self.output)
        self._committed = True
        with contextlib.suppress(OSError):  # the result is there; this only makes it durable
            _fsync(self.output.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _clear_leftovers(self) -> None:
        """Undo what a killed run left: its partial directory, a replaced directory moved aside."""
        shutil.rmtree(self.directory, ignore_errors=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        old = self._sibling("old")
        if old.is_dir():
            if self.output.exists() and any(self.output.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
            else:
                os.rename(old, self.output)

    def _make_parents(self) -> None:
        missing = []
        parent = self.output.parent
        while not parent.exists():
            missing.append(parent)
            parent = parent.parent
        for directory in reversed(missing):
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                self._created_parents.insert(0, directory)

    def _remove_parents(self) -> None:
        for directory in self._created_parents:
            with contextlib.suppress(OSError):  # somebody else put something there
                directory.rmdir()

    def _is_ours(self, error: OSError) -> bool:
        """Whether the error is about writing here, not about something that was read."""
        if error.errno in _SPACE_ERRORS:
            return True
        names = (error.filename, error.filename2)
        below = str(self.output.parent) + os.sep
        return any(name and os.path.realpath(name).startswith(below) for name in names)

    def _output_error(self, error: OSError) -> OutputError:
        if error.errno in _SPACE_ERRORS:
            needed = f" ({size_text(self._needed)} needed)" if self._needed else ""
            return OutputError(
                f"no space left while writing {self._shown}{needed}: {error.strerror}; "
                "free some space or name an output elsewhere"
            )
        return OutputError(f"cannot write {self._shown}: {error.strerror or error}")


def _files_below(directory: Path) -> Iterator[str]:
    for parent, _, names in os.walk(directory):
        for name in names:
            yield (Path(parent) / name).relative_to(directory).as_posix()


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(fd)
