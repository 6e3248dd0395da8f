"""A directory with a manifest, written whole or not at all: what convert and build leave behind.

The files are written into a hidden sibling, `.NAME.partial`, and the manifest last, with the size
and checksum of each of them. Then the sibling is renamed to its place. So a directory that has a
manifest is complete, and a run that fails or is killed leaves nothing at the output path.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from llmforge import checksum
from llmforge.errors import OutputError, StoreError
from llmforge.guard import FileLock, sigterm_raises

Progress = Callable[[str, int, int], None]
"""Called as progress(label, bytes_done, bytes_total) while long work goes on."""

Warn = Callable[[str], None]
"""Called with one sentence about something that is not fatal."""

GB = 10**9
LIST_LIMIT = 10
_HASH_CHUNK = 1 << 22
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What the artifact of each kind is recognised by, and how the user makes one.
_KINDS = {
    "checkpoint": ("manifest.yaml", "llmforge convert MODEL -o CHECKPOINT"),
    "engine": ("engine.yaml", "llmforge build CHECKPOINT -o ENGINE"),
}


def no_progress(label: str, done: int, total: int) -> None:
    """A `Progress` that does nothing."""


def no_warning(message: str) -> None:
    """A `Warn` that does nothing."""


def listed(items: list[str], limit: int = LIST_LIMIT) -> str:
    """The items in one line, cut after `limit` of them."""
    more = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {more} more" if more > 0 else "")


def a_kind(kind: str) -> str:
    """The kind with its article."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def size_text(nbytes: int) -> str:
    """A size for people: 1.2 GB, 3.4 MB."""
    if nbytes >= 10**8:
        return f"{nbytes / GB:.1f} GB"
    return f"{nbytes / 10**6:.1f} MB"


# --- writing


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

    Leaving the context without `commit` (an exception, Ctrl-C, SIGTERM) removes everything that
    was written. A killed run's leftover is removed by the next run to the same output. A lock
    keeps two processes from writing to one output.

    Raises OutputError, on construction and on entry, where `output` cannot be written or holds
    something else; with `overwrite`, only an artifact with the same `manifest_name` is replaced.
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
            self._check_parent()
        except OSError as error:
            raise self._output_error(error) from error

    def _check_parent(self) -> None:
        parent = self.output.parent
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"cannot write {self._shown}: {parent} is not a directory")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {self._shown}: {parent} is not writable")

    def __enter__(self) -> ArtifactWriter:
        self._signals.enter_context(sigterm_raises())
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
                self._recorded.pop(relative) if relative in self._recorded else _hash_file(path)
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
        return Manifest(self._shown, data, _digest(text))

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


def _digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _hash_file(path: Path, advance: Callable[[int], None] = lambda n: None) -> tuple[int, str]:
    digest = checksum.new_checksum()
    size = 0
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            advance(count)
    return size, digest.hexdigest()


# --- reading


@dataclass(frozen=True)
class Manifest:
    """An artifact's manifest. `digest` ("sha256:...") is that of the manifest file's bytes, and so
    stands for the whole artifact: the checksums of all files are in it."""

    directory: Path
    data: dict[str, Any]
    digest: str

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Size and checksum of each file, by its path in the directory."""
        entries = self.data["files"].items()
        return {name: (entry["size"], entry[checksum.NAME]) for name, entry in entries}


def read_manifest(directory: Path, manifest_name: str, kind: str, format_version: int) -> Manifest:
    """The manifest of the artifact of this kind. Raises StoreError where there is none, where it
    is corrupt, of another kind, or of a format newer than `format_version`."""
    import yaml

    path = directory / manifest_name
    try:
        if not path.is_file():
            raise StoreError(_why_no_manifest(directory, manifest_name, kind))
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    try:
        data = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise StoreError(f"{path} is corrupt ({problem}{where}); make it again") from error
    _check_manifest(path, data, kind, format_version)
    return Manifest(directory, data, _digest(text))


def _why_no_manifest(directory: Path, manifest_name: str, kind: str) -> str:
    if not directory.exists():
        return f"{directory} does not exist"
    if not directory.is_dir():
        return f"{directory} is a file, not {a_kind(kind)} directory"
    for other, (name, _) in _KINDS.items():
        if other != kind and (directory / name).is_file():
            return f"{directory} is {a_kind(other)}, not {a_kind(kind)}; {_how_to_make(kind)}"
    if (directory / "config.json").is_file():
        return f"{directory} is a Hugging Face model, not {a_kind(kind)}; {_how_to_make(kind)}"
    return f"{directory} is not {a_kind(kind)}: it has no {manifest_name}; {_how_to_make(kind)}"


def _how_to_make(kind: str) -> str:
    return f"make one with: {_KINDS[kind][1]}"


def _check_manifest(path: Path, data: Any, kind: str, format_version: int) -> None:
    if not isinstance(data, dict) or "kind" not in data:
        raise StoreError(f"{path} is corrupt: it is not a llmforge manifest")
    if data["kind"] != kind:
        raise StoreError(f"{path.parent} is of kind {data['kind']!r}, not {a_kind(kind)}")
    version = data.get("format_version")
    if type(version) is not int or version < 1:
        raise StoreError(f"{path} is corrupt: format_version is {version!r}, not a whole number")
    if version > format_version:
        raise StoreError(
            f"{path.parent} was made by a newer llmforge (format {version}; this one reads up to "
            f"{format_version}); update llmforge or make it again"
        )
    files = data.get("files")
    if not isinstance(files, dict):
        raise StoreError(f"{path} is corrupt: it has no list of files")
    if bad := [str(name) for name, entry in files.items() if not _is_file_entry(name, entry)]:
        raise StoreError(f"{path} is corrupt: not valid as files of it: {listed(bad)}")


def _is_file_entry(name: Any, entry: Any) -> bool:
    if not (isinstance(name, str) and isinstance(entry, dict)):
        return False
    size, digest = entry.get("size"), entry.get(checksum.NAME)
    return stays_inside(name) and type(size) is int and size >= 0 and checksum.is_checksum(digest)


def stays_inside(relative: str) -> bool:
    """Whether a path found in a file names something below the file's own directory."""
    path = PurePosixPath(relative)
    plain = bool(relative) and "\0" not in relative and "\\" not in relative
    return plain and not path.is_absolute() and ".." not in path.parts and path.name != ""


def check_files(manifest: Manifest) -> None:
    """A quick check: every file is there with its size. Raises StoreError that names all others."""
    problems = []
    for name, (size, _) in manifest.files.items():
        if problem := _size_problem(manifest.directory / name, size):
            problems.append(f"{name} {problem}")
    if problems:
        raise StoreError(
            f"{manifest.directory} is damaged: {listed(problems)}; copy or make it again"
        )


def _size_problem(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as error:
        return "is missing" if error.errno == errno.ENOENT else f"cannot be read ({error.strerror})"
    return f"has {found} bytes instead of {size}" if found != size else None


def verify_files(manifest: Manifest, progress: Progress = no_progress) -> list[str]:
    """Read every file and compare checksums. Returns a sentence for each one that differs."""
    problems = []
    total = sum(size for size, _ in manifest.files.values())
    done = 0
    for name, (size, digest) in manifest.files.items():
        path = manifest.directory / name

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress("verifying", done, total)

        if problem := _size_problem(path, size):
            problems.append(f"{name} {problem}")
            continue
        try:
            if _hash_file(path, advance)[1] != digest:
                problems.append(f"{name} has changed: its checksum differs from the manifest's")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems
