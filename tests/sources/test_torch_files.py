"""PyTorch files under other names than transformers' beside a config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmforge.checkpoint.convert import convert
from llmforge.errors import SourceError
from llmforge.settings import ConvertSettings

Hf = Callable[..., Any]


@pytest.fixture
def bare(hf: Hf, tmp_path: Path) -> tuple[Path, Path, dict[str, torch.Tensor]]:
    """A model, and a directory with its config alone."""
    directory, _, state = hf("llama")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((directory / "config.json").read_bytes())
    return directory, other, state


@pytest.mark.parametrize("name", ["model.pt", "weights.pth", "adapterless.bin"])
@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
def test_a_single_file(bare: Any, assert_same: Hf, name: str, wrap: str | None) -> None:
    directory, other, state = bare
    torch.save({wrap: state, "epoch": 3} if wrap else state, other / name)
    torch.save({"lr": 0.1}, other / "optimizer.pt")
    assert_same(directory, other)


def test_an_index(bare: Any, assert_same: Hf) -> None:
    directory, other, state = bare
    names = list(state)
    weight_map = {}
    for file, part in (("a.pt", names[::2]), ("b.pt", names[1::2])):
        torch.save({name: state[name] for name in part}, other / file)
        weight_map |= dict.fromkeys(part, file)
    (other / "weights.pt.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(directory, other)


def test_which_of_several_files_is_not_guessed(bare: Any, tmp_path: Path) -> None:
    _, other, state = bare
    for name in ("a.pt", "b.pth"):
        torch.save(state, other / name)
    with pytest.raises(
        SourceError, match=r"several files that may hold the weights: a\.pt, b\.pth"
    ):
        convert(other, tmp_path / "out", ConvertSettings())


def test_a_table_with_other_things_in_it_is_refused(bare: Any, tmp_path: Path) -> None:
    _, other, state = bare
    torch.save({**state, "epoch": 3}, other / "a.pt")
    with pytest.raises(SourceError, match="not a table of tensors by name: 'epoch' is none"):
        convert(other, tmp_path / "out", ConvertSettings())
