"""Foreign checkpoints, written here from the layouts' public definitions, and their comparison
with the same model in the Hugging Face layout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "parity"))

from models import BY_NAME, Case
from references import BY_REFERENCE
from safetensors.torch import load_file

from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.store import Checkpoint
from llmforge.settings import ConvertSettings

# What the other layouts do not say, or say in another way.
SAID_ELSEWHERE = {"family", "max_position", "bos_token_id", "eos_token_ids"}


@pytest.fixture
def hf(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any], dict[str, torch.Tensor]]]:
    """hf(case name or case, dtype=...): a saved transformers model, or one of references.py, its
    config and its weights."""

    def make(
        case: str | Case, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[Path, dict[str, Any], dict[str, torch.Tensor]]:
        directory = tmp_path / "hf"
        if isinstance(case, str) and case in BY_REFERENCE:
            reference = BY_REFERENCE[case].save(directory, dtype)
            return directory, reference.config, dict(reference.weights)
        model = (BY_NAME[case] if isinstance(case, str) else case).save(directory, dtype)
        return directory, model.config.to_dict(), load_file(directory / "model.safetensors")

    return make


@pytest.fixture
def assert_same(tmp_path: Path) -> Callable[..., Checkpoint]:
    """assert_same(hf directory, foreign path, *other config fields that may differ): both convert
    to the same weights, bit for bit, and the same config. Gives the foreign one's checkpoint."""

    def check(ours: Path, theirs: Path, *differing: str) -> Checkpoint:
        expected_dir, found_dir = tmp_path / "expected", tmp_path / "found"
        settings = ConvertSettings(overwrite=True)
        expected = convert(ours, expected_dir, settings)
        found = convert(theirs, found_dir, settings)
        for key in set(expected.data["config"]) - SAID_ELSEWHERE - set(differing):
            assert found.data["config"][key] == expected.data["config"][key], key
        weights = {n: d for n, d in expected.files.items() if n.endswith(".safetensors")}
        assert weights == {n: d for n, d in found.files.items() if n.endswith(".safetensors")}
        assert not list(tmp_path.glob(".*")), "something is left beside the output"
        return Checkpoint.open(found_dir)

    return check
