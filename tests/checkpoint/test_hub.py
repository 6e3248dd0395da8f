"""Models on the Hub, with the download played by a function."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.sources.hub import is_hub_id
from llmforge.checkpoint.store import Checkpoint
from llmforge.errors import SourceError, UnsupportedModelError
from llmforge.settings import ConvertSettings

COMMIT = "0123abc"


class FakeHub:
    """snapshot_download over a directory; `fetched` lists the files."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache / COMMIT
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []

    def __call__(
        self, repo_id: str, *, revision: str | None, allow_patterns: list[str], tqdm_class: Any
    ) -> str:
        self.revisions.append(revision)
        self.cache.mkdir(parents=True, exist_ok=True)
        bar = tqdm_class(total=0, unit="B", desc="x", name="y")
        for path in sorted(self.remote.iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, self.cache)
                self.fetched.append(path.name)
                bar.total += path.stat().st_size
                bar.update(path.stat().st_size)
        bar.close()
        return str(self.cache)


@pytest.fixture
def hub(hf_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(hf_model("remote"), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    return fake


def test_downloads_what_is_needed(
    hub: FakeHub, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("consolidated.safetensors", "pytorch_model.bin", "README.md"):
        (hub.remote / name).write_bytes(b"x")
    calls: list[str] = []
    manifest = convert(
        "org/name",
        output,
        ConvertSettings(revision="main"),
        progress=lambda label, done, total: calls.append(label),
    )
    assert hub.fetched == ["config.json", "model.safetensors"]
    assert hub.revisions == ["main", COMMIT]
    assert manifest.data["created_from"]["name"] == "org/name"
    assert manifest.data["created_from"]["revision"] == COMMIT
    assert list(dict.fromkeys(calls)) == ["downloading", "converting"]
    assert capfd.readouterr() == ("", "")
    Checkpoint.open(output)


def test_bin_where_there_is_no_safetensors(hub: FakeHub, output: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = hub.remote / "model.safetensors"
    torch.save(load_file(weights), hub.remote / "pytorch_model.bin")
    weights.unlink()
    convert("org/name", output, ConvertSettings())
    assert hub.fetched[-1] == "pytorch_model.bin"


def test_unsupported_is_refused_before_the_weights_come(hub: FakeHub, output: Path) -> None:
    config = hub.remote / "config.json"
    config.write_text(config.read_text().replace("Llama", "Other"))
    with pytest.raises(UnsupportedModelError):
        convert("org/name", output, ConvertSettings())
    assert hub.fetched == ["config.json"]


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("404 Client Error.\n\nMany\nlines",)
    return error


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (errors.RepositoryNotFoundError, "neither a directory here nor a model on the Hub"),
        (errors.GatedRepoError, "is gated: accept its terms"),
        (errors.RevisionNotFoundError, "has no revision 'v9'"),
        (errors.LocalEntryNotFoundError, "cannot be downloaded: 404 Client Error."),
        (ConnectionError, "cannot be downloaded: 404 Client Error."),
    ],
)
def test_hub_errors_are_one_line(
    output: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], words: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError) as caught:
        convert("org/name", output, ConvertSettings(revision="v9"))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_looks_like_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("meta-llama/Llama-3.1-8B")
    for text in ("./org/name", "/org/name", "a/b/c", "../x", "name", "org/na me", "org/"):
        assert not is_hub_id(text)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not is_hub_id("org/name")
