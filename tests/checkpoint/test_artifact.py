"""Artifacts: whole or not at all, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from llmforge.artifact import check_files, read_manifest, verify_files
from llmforge.artifact_writer import ArtifactWriter, check_free_space
from llmforge.errors import OutputError, StoreError

NAME = "manifest.yaml"
DATA = {"kind": "checkpoint", "format_version": 1}


def write(output: Path, text: str = "hello", overwrite: bool = False) -> str:
    with ArtifactWriter(output, NAME, overwrite=overwrite) as writer:
        (writer.directory / "sub").mkdir()
        (writer.directory / "sub" / "a.txt").write_text(text)
        return writer.commit(DATA).digest


def read(output: Path, version: int = 1):  # type: ignore[no-untyped-def]
    return read_manifest(output, NAME, "checkpoint", version)


def test_round_trip(output: Path) -> None:
    digest = write(output)
    manifest = read(output)
    assert manifest.digest == digest
    assert manifest.files["sub/a.txt"][0] == 5
    check_files(manifest)
    assert verify_files(manifest) == []
    assert sorted(p.name for p in output.parent.iterdir()) == [output.name]


def test_missing_parents_are_made_and_removed_again(output: Path) -> None:
    write(output / "x" / "y")
    assert (output / "x" / "y" / NAME).is_file()
    with pytest.raises(RuntimeError), ArtifactWriter(output / "p" / "q" / "r", NAME):
        raise RuntimeError
    assert not (output / "p").exists()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_without_commit(
    output: Path, assert_nothing_left: Callable[[], None], error: type[BaseException]
) -> None:
    with pytest.raises(error), ArtifactWriter(output, NAME) as writer:
        (writer.directory / "file").write_text("half")
        raise error
    assert_nothing_left()


def test_refuses_to_replace(output: Path) -> None:
    write(output)
    with pytest.raises(OutputError, match="exists already; give --overwrite"):
        write(output, "new")
    old = read(output).digest
    assert write(output, "new", overwrite=True) != old
    assert (output / "sub" / "a.txt").read_text() == "new"
    assert [p.name for p in output.parent.iterdir()] == [output.name]


def test_never_replaces_what_is_not_ours(output: Path) -> None:
    output.mkdir()
    (output / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="holds something else"):
        write(output, overwrite=True)
    assert (output / "thesis.txt").read_text() == "years"


def test_what_others_put_beside_the_files_is_not_lost(output: Path) -> None:
    write(output)
    (output / "sub" / "notes.txt").write_text("mine")
    (output / "engine").mkdir()
    (output / "engine" / NAME).write_text("mine")
    with pytest.raises(OutputError, match=f"lost: engine/{NAME}, sub/notes.txt; move them"):
        write(output, overwrite=True)
    assert (output / "sub" / "notes.txt").read_text() == "mine"
    (output / NAME).write_text("corrupt")
    write(output, "new", overwrite=True)
    assert read(output).files.keys() == {"sub/a.txt"}


def test_failed_overwrite_keeps_the_old_one(output: Path) -> None:
    write(output)
    with pytest.raises(RuntimeError), ArtifactWriter(output, NAME, overwrite=True):
        raise RuntimeError
    assert verify_files(read(output)) == []


def test_empty_directory_and_link_are_fine(output: Path, tmp_path: Path) -> None:
    output.mkdir()
    write(output)
    link = tmp_path / "link"
    link.symlink_to(output)
    write(link, "new", overwrite=True)
    assert link.is_symlink() and (output / "sub" / "a.txt").read_text() == "new"


def test_output_is_a_file_or_below_one(output: Path) -> None:
    output.write_text("x")
    with pytest.raises(OutputError, match="is a file; name a directory"):
        write(output)
    with pytest.raises(OutputError, match=r"not a directory|Not a directory"):
        write(output / "below")


def test_unwritable_parent(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the operating system is played.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        write(output)


def test_read_only_file_system(output: Path) -> None:
    with pytest.raises(OutputError, match="cannot write /proc/self/x") as caught:
        write(Path("/proc/self/x"))
    assert "\n" not in str(caught.value)


def test_not_enough_space(output: Path) -> None:
    with pytest.raises(OutputError, match="not enough space"):
        check_free_space(output / "deep" / "down", 10**18)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_disk_full_is_one_sentence(
    output: Path, assert_nothing_left: Callable[[], None], code: int
) -> None:
    with pytest.raises(OutputError, match="no space left while writing") as caught:  # noqa: SIM117
        with ArtifactWriter(output, NAME):
            raise OSError(code, os.strerror(code))
    assert "\n" not in str(caught.value)
    assert_nothing_left()


def test_errors_of_reading_pass_through(output: Path) -> None:
    with pytest.raises(FileNotFoundError), ArtifactWriter(output, NAME):
        raise FileNotFoundError(errno.ENOENT, "gone", "/elsewhere")


def test_two_writers_of_one_output(output: Path) -> None:
    with ArtifactWriter(output, NAME) as first:
        with pytest.raises(OutputError, match="another llmforge process is writing"):
            write(output)
        (first.directory / "a").write_text("first")
        first.commit(DATA)
    assert (output / "a").is_file()


SLEEPER = """
import sys, time
from pathlib import Path
from llmforge.artifact_writer import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1]), "manifest.yaml") as writer:
    (writer.directory / "half").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL])
def test_killed_writer(output: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.wait(timeout=20) != 0
    process.stdout.close()
    assert not output.exists()
    left = sorted(p.name for p in output.parent.iterdir())
    if number == signal.SIGKILL:
        assert left == [f".{output.name}.lock", f".{output.name}.partial"]
    else:
        assert left == []
    write(output)
    assert [p.name for p in output.parent.iterdir()] == [output.name]
    assert not (output / "half").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_second_signal_does_not_stop_the_cleaning_up(
    output: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ctrl-C is pressed twice."""
    remove = shutil.rmtree

    def slow(path: Path, ignore_errors: bool) -> None:
        signal.raise_signal(number)
        remove(path, ignore_errors=ignore_errors)

    before = signal.getsignal(number)
    with pytest.raises((SystemExit, KeyboardInterrupt)), ArtifactWriter(output, NAME):
        monkeypatch.setattr(shutil, "rmtree", slow)
        signal.raise_signal(number)
    assert list(output.parent.iterdir()) == []
    assert signal.getsignal(number) is before


def test_an_ignored_signal_is_left_alone(output: Path) -> None:
    """Under nohup, the end of the terminal does not end the work."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ArtifactWriter(output, NAME) as writer:
            signal.raise_signal(signal.SIGHUP)
            writer.commit(DATA)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert output.is_dir()


def test_killed_between_the_two_renames(output: Path) -> None:
    digest = write(output)
    os.rename(output, output.parent / f".{output.name}.old")
    with pytest.raises(OutputError, match="exists already"):
        write(output)
    assert read(output).digest == digest


# --- reading


def test_what_a_directory_is_instead(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere does not exist$"):
        read(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"has no manifest\.yaml; make one with: llmforge convert"):
        read(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(StoreError, match="is a Hugging Face model, not a checkpoint"):
        read(tmp_path)
    (tmp_path / "engine.yaml").write_text("")
    with pytest.raises(StoreError, match="is an engine, not a checkpoint"):
        read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file, not a checkpoint directory"):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "engine"}, "is of kind 'engine', not a checkpoint"),
        ({"format_version": 2}, r"made by a newer llmforge \(format 2; this one reads up to 1\)"),
        ({"format_version": "1"}, "format_version is '1'"),
        ({"format_version": None}, "format_version is None"),
        ({"files": None}, "has no list of files"),
        ({"files": {"../evil": {"size": 1, "xxh3_128": "0" * 32}}}, r"not valid .*: \.\./evil"),
        ({"files": {"/etc/x": {"size": 1, "xxh3_128": "0" * 32}}}, "not valid .*: /etc/x"),
        ({"files": {"a": {"size": -1, "xxh3_128": "0" * 32}}}, "not valid .*: a"),
        ({"files": {"a": 5}}, "not valid .*: a"),
    ],
)
def test_bad_manifest(output: Path, change: dict[str, object], words: str) -> None:
    write(output)
    path = output / NAME
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(StoreError, match=words) as caught:
        read(output)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"a: [", b"\xff\xfe\x00", b"", b"- 1", b"a: !!python/x 1"])
def test_corrupt_manifest(output: Path, text: bytes) -> None:
    write(output)
    (output / NAME).write_bytes(text)
    with pytest.raises(StoreError, match="is corrupt") as caught:
        read(output)
    assert "\n" not in str(caught.value)


def test_changed_files_are_found(output: Path) -> None:
    with ArtifactWriter(output, NAME) as writer:
        for name in "abcd":
            (writer.directory / name).write_text("hello")
        writer.commit(DATA)
    (output / "a").write_text("hallo")
    (output / "b").write_text("hi")
    (output / "c").unlink()
    manifest = read(output)
    with pytest.raises(StoreError, match="b has 2 bytes instead of 5, c is missing"):
        check_files(manifest)
    calls: list[tuple[int, int]] = []
    problems = verify_files(manifest, lambda label, done, total: calls.append((done, total)))
    assert [p.split()[0] for p in problems] == ["a", "b", "c"]
    assert "checksum" in problems[0]
    assert calls[-1][1] == 20


def test_leftover_of_a_running_process_is_not_touched(output: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(output)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        with pytest.raises(OutputError, match="another llmforge process"):
            write(output)
        assert (output.parent / f".{output.name}.partial" / "half").is_file()
    finally:
        process.terminate()
        process.communicate(timeout=20)
