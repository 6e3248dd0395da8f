"""Families whose code is not in transformers, against plain torch: tokens, logits, layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from case import VOCABULARY
from references import REFERENCES, Reference
from test_layouts import LENGTHS, run
from test_transformers import engine_of

from llmforge.checkpoint.convert import convert
from llmforge.comm import LocalComm
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request
from llmforge.runtime.verify import compare_logits, step_logits
from llmforge.settings import ConvertSettings

by_name = pytest.mark.parametrize("reference", REFERENCES, ids=lambda reference: reference.name)


@by_name
def test_float32_greedy_tokens_are_those_of_plain_torch(
    reference: Reference, tmp_path: Path
) -> None:
    reference.save(tmp_path / "hf", torch.float32)
    engine, executable = engine_of(tmp_path, max_num_tokens=8)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(VOCABULARY, size=n).tolist() for n in (1, 5, 21, 30)]
    requests = [Request(i, tuple(p), max_new_tokens=8) for i, p in enumerate(prompts)]
    vocabulary = engine.config.vocab_size
    completions = generate(executable, LocalComm(), requests, vocab_size=vocabulary)
    for prompt, completion in zip(prompts, completions, strict=True):
        tokens = list(prompt)
        for _ in range(8):
            tokens.append(int(reference.logits(tokens)[-1].argmax()))
        assert list(completion.token_ids) == tokens[len(prompt) :]


@by_name
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_within_what_rounding_explains(
    reference: Reference, dtype: str, tmp_path: Path
) -> None:
    reference.save(tmp_path / "hf", getattr(torch, dtype))
    engine, executable = engine_of(tmp_path)
    tokens = np.random.default_rng(5).integers(VOCABULARY, size=(2, 20))
    got = step_logits(executable, LocalComm(), tokens, 0, 20, 20)
    expected = torch.stack([reference.logits(row)[-1] for row in tokens.tolist()])
    comparison = compare_logits(got, expected.float().numpy(), engine.config)
    assert comparison.passed, comparison


@by_name
def test_two_ranks_give_the_tokens_of_one(reference: Reference, tmp_path: Path) -> None:
    reference.save(tmp_path / "hf", torch.float32)
    convert(str(tmp_path / "hf"), tmp_path / "checkpoint", ConvertSettings())
    expected = run(tmp_path, 1, 1, LENGTHS[2:5])
    for tensor, pipeline in ((2, 1), (1, 2)):
        assert run(tmp_path, tensor, pipeline, LENGTHS[2:5]) == expected, (tensor, pipeline)
