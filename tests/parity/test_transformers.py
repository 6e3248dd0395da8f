"""Converted and built models against transformers: greedy tokens and logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import CASES, MAX_POSITION, VOCABULARY, Case

from llmforge.checkpoint.convert import convert
from llmforge.comm import LocalComm
from llmforge.engine.build import build
from llmforge.engine.store import Engine
from llmforge.engine.target import Executable, target
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request
from llmforge.runtime.verify import compare_with_transformers
from llmforge.settings import BuildSettings, ConvertSettings

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def engine_of(directory: Path, **settings: object) -> tuple[Engine, Executable]:
    """The one-rank engine of the transformers model in ``directory / "hf"``."""
    convert(str(directory / "hf"), directory / "checkpoint", ConvertSettings())
    limits = {"max_batch_size": 4, "max_seq_len": MAX_POSITION, "block_size": 4, **settings}
    build(directory / "checkpoint", directory / "engine", BuildSettings(**limits))  # type: ignore[arg-type]
    engine = Engine.open(directory / "engine")
    executable = target("cpu").load(
        engine.rank_directory(0), engine.topology, engine.limits, LocalComm()
    )
    return engine, executable


def greedy_by_transformers(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens, cache, ids = [], None, torch.tensor([prompt])
    with torch.inference_mode():
        # With dynamic scaling transformers keeps the frequencies of the longest sequence so far;
        # a short input makes it start anew.
        model(torch.tensor([[0]]))
        for _ in range(count):
            out = model(ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            tokens.append(int(ids))
    return tokens


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_greedy_tokens_are_those_of_transformers(case: Case, tmp_path: Path) -> None:
    model = case.save(tmp_path / "hf", torch.float32)
    # Chunks of 8 tokens cut the longer prompts; the shorter ones are decoded beside them.
    _, executable = engine_of(tmp_path, max_num_tokens=8)
    rng = np.random.default_rng(3)
    prompts = [rng.integers(VOCABULARY, size=n).tolist() for n in (1, 5, 21, 30)]
    requests = [Request(i, tuple(p), max_new_tokens=12) for i, p in enumerate(prompts)]
    completions = generate(executable, LocalComm(), requests, vocab_size=VOCABULARY)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == greedy_by_transformers(model, prompt, 12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_within_what_rounding_explains(case: Case, dtype: str, tmp_path: Path) -> None:
    case.save(tmp_path / "hf", getattr(torch, dtype))
    engine, executable = engine_of(tmp_path)
    # Dynamic scaling depends on the length of the whole input, which the reference sees at once;
    # longrope only on whether that is beyond what was trained, and here it is from the start.
    sizes = {"prompt_len": 8, "decode_steps": 6} if "dynamic" in case.name else {}
    comparison = compare_with_transformers(
        executable, LocalComm(), engine.config, tmp_path / "hf", **sizes
    )
    assert comparison.passed, comparison
