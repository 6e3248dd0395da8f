"""Opening checkpoints that are not what they should be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from llmforge.artifact import read_manifest, verify_files
from llmforge.checkpoint.convert import convert
from llmforge.checkpoint.store import KIND, MANIFEST, Checkpoint
from llmforge.errors import StoreError
from llmforge.settings import ConvertSettings


@pytest.fixture
def checkpoint(hf_model: Callable[..., Path], output: Path) -> Path:
    convert(hf_model(), output, ConvertSettings(shard_size_gb=2e-6))
    return output


def change(checkpoint: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = checkpoint / MANIFEST
    data = yaml.safe_load(path.read_text())
    edit(data)
    path.write_text(yaml.safe_dump(data, sort_keys=False))


def test_reads_slices_across_files(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    assert len(opened.manifest["weights"]) > 3
    assert opened.manifest["num_parameters"] == sum(
        opened.read(name).size for name in opened.tensors
    )
    whole = opened.read("layers.1.attention.o.weight")
    part = opened.read("layers.1.attention.o.weight", 1, 4, 8)
    assert np.array_equal(part, whole[:, 4:8])


def test_changed_byte_is_found_by_verify_only(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    Checkpoint.open(checkpoint)
    problems = verify_files(read_manifest(checkpoint, MANIFEST, KIND, 1))
    assert problems == [f"{path.name} has changed: its checksum differs from the manifest's"]


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda data: data.pop("config"), "has no model config"),
        (lambda data: data.update(weights="x"), "has no model config or no list"),
        (lambda data: data["weights"].append("other"), "weights that are no files of it: other"),
        (lambda data: data["weights"].pop(), "missing: "),
        (lambda data: data["config"].pop("rope"), "model config is not valid"),
        (lambda data: data["config"].update(extra=1), "model config is not valid"),
        (lambda data: data["config"].update(num_kv_heads=0), "model config is not valid"),
        (lambda data: data["config"].update(hidden_size="x"), "model config is not valid"),
        (lambda data: data["config"].update(hidden_size=8), r"embed.weight \(bfloat16 \[33, 16\]"),
        (lambda data: data["config"].update(dtype="float16"), "instead of float16"),
        (lambda data: data["config"].update(tied_embeddings=True), "not in the model: head.weight"),
        (lambda data: data["config"].update(qk_norm=True), "missing: layers.0.attention.q_norm"),
    ],
)
def test_manifest_and_weights_disagree(
    checkpoint: Path, edit: Callable[[dict[str, Any]], Any], words: str
) -> None:
    change(checkpoint, edit)
    with pytest.raises(StoreError, match=words) as caught:
        Checkpoint.open(checkpoint)
    assert "\n" not in str(caught.value)


def test_damaged_weight_files(checkpoint: Path) -> None:
    files = sorted(checkpoint.glob("*.safetensors"))
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    with pytest.raises(StoreError, match=r"is damaged: .*00001.* is missing, .*00002.* has \d+"):
        Checkpoint.open(checkpoint)


def test_weight_file_with_a_bad_header(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.safetensors"))
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(StoreError, match="is not a safetensors file"):
        Checkpoint.open(checkpoint)
