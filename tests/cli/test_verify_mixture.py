"""`llmforge verify --against` on a mixture of experts: agreement, and what it says where there is
none in 16 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from llmforge.cli.errors import guard
from llmforge.cli.main import cli

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def llmforge(*arguments: object) -> int:
    words = [str(argument) for argument in arguments]
    return guard(lambda: cli.main(words, prog_name="llmforge", standalone_mode=False))


def save(directory: Path, dtype: torch.dtype, seed: int) -> None:
    config: Any = transformers.MixtralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(dtype).save_pretrained(directory)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_a_mixture(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (0, 1):
        save(tmp_path / str(seed), getattr(torch, dtype), seed)
    assert llmforge("convert", tmp_path / "0", "-o", tmp_path / "checkpoint") == 0
    capsys.readouterr()
    assert llmforge("verify", tmp_path / "checkpoint", "--against", tmp_path / "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["passed"]
    assert llmforge("verify", tmp_path / "checkpoint", "--against", tmp_path / "1") != 0
    error = capsys.readouterr().err
    assert "the logits are not those of transformers" in error
    assert ("rounding may choose another expert" in error) == (dtype != "float32")
