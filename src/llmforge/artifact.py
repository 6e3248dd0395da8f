"""A directory with a manifest, what convert and build leave behind: read and checked here, written
by `artifact_writer.py`. And the words that tell of the work: progress, warnings, sizes.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from llmforge import checksum
from llmforge.errors import StoreError

Progress = Callable[[str, int, int], None]
"""Called as progress(label, bytes_done, bytes_total) while long work goes on."""

Warn = Callable[[str], None]
"""Called with one sentence about something that is not fatal."""

GB = 10**9
LIST_LIMIT = 10
_HASH_CHUNK = 1 << 22
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


@dataclass(frozen=True)
class Manifest:
    """An artifact's manifest. `digest` ("sha256:...") is that of the manifest file's bytes, and so
    stands for the whole artifact: the checksums of all files are in it."""

    directory: Path
    data: dict[str, Any]
    digest: str

    @classmethod
    def of(cls, directory: Path, data: dict[str, Any], text: bytes) -> Manifest:
        """The manifest whose file holds `text`."""
        return cls(directory, data, f"sha256:{hashlib.sha256(text).hexdigest()}")

    @property
    def files(self) -> dict[str, tuple[int, str]]:
        """Size and checksum of each file, by its path in the directory."""
        entries = self.data["files"].items()
        return {name: (entry["size"], entry[checksum.NAME]) for name, entry in entries}


def read_manifest(directory: Path, manifest_name: str, kind: str, format_version: int) -> Manifest:
    """The manifest of the artifact of this kind. Raises StoreError where there is none, where it
    is corrupt, of another kind, or of a format newer than `format_version`."""
    path = directory / manifest_name
    try:
        if not path.is_file():
            raise StoreError(_why_no_manifest(directory, manifest_name, kind))
        text = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    data = parse_manifest(path, text)
    _check_manifest(path, data, kind, format_version)
    return Manifest.of(directory, data, text)


def parse_manifest(path: Path, text: bytes) -> Any:
    """What the YAML of a manifest at `path` says, of whatever kind. Raises StoreError where it is
    no YAML."""
    import yaml

    try:
        return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise StoreError(f"{path} is corrupt ({problem}{where}); make it again") from error


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
            if hash_file(path, advance)[1] != digest:
                problems.append(f"{name} has changed: its checksum differs from the manifest's")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def hash_file(path: Path, advance: Callable[[int], None] = lambda n: None) -> tuple[int, str]:
    """Size and checksum of a file. advance: called with the bytes read since the last call."""
    digest = checksum.new_checksum()
    size = 0
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            advance(count)
    return size, digest.hexdigest()
