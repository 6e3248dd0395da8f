"""Files that are written as their content comes."""

from __future__ import annotations

import os
from pathlib import Path

from llmforge.checksum import new_checksum


class WrittenFile:
    """A file written in pieces, with its checksum."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = 0
        self._digest = new_checksum()

    def __enter__(self) -> WrittenFile:
        self._file = open(self._path, "xb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, data: memoryview) -> None:
        self._digest.update(data)
        while data:
            count = self._file.write(data)
            start, self.size = self.size, self.size + count
            os.posix_fadvise(self._file.fileno(), start, count, os.POSIX_FADV_DONTNEED)
            data = data[count:]

    def finish(self) -> tuple[int, str]:
        return self.size, self._digest.hexdigest()
