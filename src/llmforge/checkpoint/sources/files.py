"""Files by name, in a directory or in a tar archive, read a range of bytes at a time.

An archive that is not compressed is read in place. One that is has its files unpacked, under
numbers for names, into a directory that the caller gives and removes. Nothing in an archive can
name a place outside of it: members with such names, and links, are refused.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from llmforge.artifact import stays_inside
from llmforge.artifact_writer import check_free_space
from llmforge.errors import SourceError
from llmforge.safetensors_io import LFS_POINTER, read_into

_GZIP = b"\x1f\x8b"
_COMPRESSED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstandard", b"PK\x03\x04": "zip"}
_COPY = 1 << 22
_MOST_WHOLE = 256 << 20  # bytes of a file that is read as one: configs, tokenizers, tables


@dataclass(frozen=True)
class Slice:
    """`size` bytes of the file at `path`, from `start` on. `label` is its name for people."""

    path: Path
    start: int
    size: int
    label: str

    def fill(self, first: int, out: NDArray[np.uint8]) -> None:
        """Copy the bytes from number `first` on into `out`. Raises SourceError."""
        if first + out.size > self.size:
            raise SourceError(f"{self.label} is truncated: it has {self.size} bytes")
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                read_into(fd, self.start + first, out)
            finally:
                os.close(fd)
        except EOFError:
            raise SourceError(f"{self.label} is truncated") from None
        except OSError as error:
            raise SourceError(f"cannot read {self.label}: {error.strerror}") from error

    def read(self) -> bytes:
        """All of it. Raises SourceError, also where it is unreasonably large."""
        if self.size > _MOST_WHOLE:
            raise SourceError(f"{self.label} is too large for what it should be: {self.size} bytes")
        out = np.empty(self.size, np.uint8)
        self.fill(0, out)
        return out.tobytes()

    def part(self, start: int, size: int, label: str) -> Slice:
        if start < 0 or size < 0 or start + size > self.size:
            raise SourceError(
                f"{self.label} is truncated: {label} should end at byte {start + size} of "
                f"{self.size}"
            )
        return Slice(self.path, self.start + start, size, label)

    def stream(self) -> io.BufferedReader:
        """A file object over it."""
        return io.BufferedReader(_Stream(self))


class _Stream(io.RawIOBase):
    def __init__(self, part: Slice) -> None:
        self._slice = part
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._slice.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = max(min(len(buffer), self._slice.size - self._at), 0)
        if count:
            self._slice.fill(self._at, np.frombuffer(buffer, np.uint8)[:count])
        self._at += count
        return count


@dataclass(frozen=True)
class Tree:
    """The files below a directory, or in an archive, by their relative names."""

    label: str
    files: Mapping[str, Slice]

    def require(self, name: str) -> Slice:
        if name not in self.files:
            raise SourceError(f"{self.label} has no {name}")
        return self.files[name]

    def below(self, folder: str) -> Tree:
        """The files in a folder, by their names within it."""
        prefix = f"{folder}/"
        files = {
            name.removeprefix(prefix): part
            for name, part in self.files.items()
            if name.startswith(prefix)
        }
        return Tree(f"{self.label}/{folder}", files)


def whole_file(path: Path) -> Slice:
    """The file. Raises SourceError, also where it is a pointer to a file that was not fetched."""
    try:
        part = Slice(path, 0, path.stat().st_size, str(path))
        with open(path, "rb") as file:
            head = file.read(len(LFS_POINTER))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    if head == LFS_POINTER:
        raise SourceError(
            f"{path} is a Git LFS pointer, not the weights; fetch them with: git lfs pull"
        )
    return part


def directory_tree(directory: Path) -> Tree:
    """All files below a directory. Raises SourceError."""
    files = {}
    try:
        for parent, _, names in os.walk(directory):
            for name in names:
                path = Path(parent) / name
                if path.is_file():
                    relative = path.relative_to(directory).as_posix()
                    files[relative] = Slice(path, 0, path.stat().st_size, str(path))
    except OSError as error:
        raise SourceError(f"cannot read {directory}: {error.strerror}") from error
    return Tree(str(directory), dict(sorted(files.items())))


def archive_tree(path: Path, unpacked: Path) -> Tree:
    """The files in a tar archive. One that is compressed with gzip is unpacked into the directory
    `unpacked`, which is made for it. Raises SourceError, and OutputError where it does not fit."""
    part = whole_file(path)
    head = np.empty(min(part.size, 8), np.uint8)
    part.fill(0, head)
    for magic, name in _COMPRESSED.items():
        if head.tobytes().startswith(magic):
            raise SourceError(
                f"{path} is compressed with {name}; supported: tar, alone or compressed with gzip"
            )
    compressed = head.tobytes().startswith(_GZIP)
    try:
        if compressed:
            # Through GzipFile, which gives no more than it is asked for, however much it has.
            with (
                gzip.open(path) as plain,
                tarfile.open(fileobj=plain, mode="r|", bufsize=_COPY) as tar,
            ):
                files = _unpack(path, tar, unpacked)
        else:
            with tarfile.open(path, "r:") as tar:
                files = _locate(path, tar)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise SourceError(f"{path} is truncated or not a tar archive") from error
    return Tree(str(path), dict(sorted(files.items())))


def _locate(path: Path, tar: tarfile.TarFile) -> dict[str, Slice]:
    size = path.stat().st_size
    files: dict[str, Slice] = {}
    for member in tar:
        name = _checked_name(path, member, files)
        if name is None:
            continue
        if member.offset_data + member.size > size:
            raise SourceError(f"{path} is truncated: it ends in the middle of {name}")
        files[name] = Slice(path, member.offset_data, member.size, f"{name} of {path}")
    return files


def _unpack(path: Path, tar: tarfile.TarFile, unpacked: Path) -> dict[str, Slice]:
    files: dict[str, Slice] = {}
    unpacked.mkdir(parents=True)
    for member in tar:
        name = _checked_name(path, member, files)
        if name is None:
            continue
        check_free_space(unpacked, member.size)
        copy = unpacked / str(len(files))
        reader = tar.extractfile(member)
        assert reader is not None, "a regular file"
        with open(copy, "wb") as file:
            while piece := reader.read(_COPY):
                file.write(piece)
        if copy.stat().st_size != member.size:
            raise SourceError(f"{path} is truncated: it ends in the middle of {name}")
        files[name] = Slice(copy, 0, member.size, f"{name} of {path}")
    return files


def _checked_name(path: Path, member: tarfile.TarInfo, files: Mapping[str, Slice]) -> str | None:
    """The member's name without a leading "./", or None for a directory."""
    if member.isdir():
        return None
    name = PurePosixPath(member.name).as_posix()
    if not stays_inside(member.name):
        raise SourceError(f"{path} holds a file that would lie outside of it: {member.name!r}")
    if not member.isreg() or member.issparse():
        raise SourceError(
            f"{path} holds something that is not a plain file, which is not followed: {name}"
        )
    if name in files:
        raise SourceError(f"{path} holds {name} twice")
    return name
