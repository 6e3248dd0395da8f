"""Single files written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llmforge.replacing import may_write, replace_file


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    assert may_write(path)
    replace_file(path, b"long before")
    with open(path, "rb") as before:
        replace_file(path, b"after")
        assert before.read() == b"long before" and path.read_bytes() == b"after"
    assert os.listdir(path.parent) == ["file"]


def test_what_is_no_plain_file_stays_what_it_is(tmp_path: Path) -> None:
    """Written by root, a renamed file would take the place of /dev/null or /dev/stdout."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    replace_file(pipe, b"x")
    assert os.read(reader, 9) == b"x" and pipe.is_fifo() and may_write(pipe)
    os.close(reader)
    link = tmp_path / "link"
    link.symlink_to("target")
    replace_file(link, b"x")
    assert link.is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    assert not may_write(tmp_path)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "file", b"x")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"
