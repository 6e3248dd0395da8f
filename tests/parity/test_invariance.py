"""A request's tokens do not depend on what else runs: greedy and sampled, to the bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from models import BY_NAME, MAX_POSITION, VOCABULARY

from llmforge.checkpoint.convert import convert
from llmforge.comm import LocalComm
from llmforge.engine.build import build
from llmforge.engine.step import SamplingParams
from llmforge.engine.store import Engine
from llmforge.engine.target import target
from llmforge.runtime.requests import Completion, Request
from llmforge.runtime.session import Session
from llmforge.settings import BuildSettings, ConvertSettings

ROOMY = BuildSettings(max_batch_size=8, max_seq_len=MAX_POSITION, block_size=4)
# Prompts are cut into chunks of a few tokens, and the cache is too small for all: some requests
# wait, and some are preempted and computed again.
TIGHT = replace(ROOMY, max_num_tokens=8, kv_cache_tokens=MAX_POSITION + 40)


def requests() -> list[Request]:
    rng = np.random.default_rng(2)
    lengths = (1, 17, 3, 30, 9, 24, 2, 12)
    prompts = [tuple(rng.integers(VOCABULARY, size=n).tolist()) for n in lengths]
    return [
        Request(i, p, 25, SamplingParams(temperature=1.1 * (i % 2), seed=i, top_p=0.9))
        for i, p in enumerate(prompts)
    ]


def serve(engine: Engine, batches: list[list[Request]]) -> tuple[dict[int, Completion], int]:
    """The completions by index, each list served in a session of its own; preemptions."""
    executable = target("cpu").load(
        engine.rank_directory(0), engine.topology, engine.limits, LocalComm()
    )
    done: dict[int, Completion] = {}
    preemptions = 0
    for batch in batches:
        with Session(executable, LocalComm(), vocab_size=VOCABULARY) as session:
            waiting = list(batch)
            while waiting or session.has_work:
                for request in waiting[:3]:  # three more at every step
                    session.add(request)
                del waiting[:3]
                done.update((c.index, c) for c in session.step())
            preemptions += session.scheduler.num_preemptions
    return done, preemptions


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *product(["llama-group-7", "qwen2-window", "llama-dynamic"], ["float32", "bfloat16"]),
        # Capped scores, ALiBi, LayerNorm, learned positions, angles that jump at a length.
        ("gemma2", "bfloat16"),
        ("bloom-6-heads", "float32"),
        ("opt", "bfloat16"),
        ("phi3-longrope", "float32"),
        # Experts shared with other requests, latent attention, sinks.
        ("qwen3-moe", "bfloat16"),
        ("deepseek-v3", "float32"),
        ("deepseek-v3", "bfloat16"),
        ("gpt-oss", "bfloat16"),
    ],
)
def test_tokens_are_the_same_alone_and_in_any_batch(name: str, dtype: str, tmp_path: Path) -> None:
    BY_NAME[name].save(tmp_path / "hf", getattr(torch, dtype))
    convert(str(tmp_path / "hf"), tmp_path / "checkpoint", ConvertSettings())
    results = {}
    for label, settings in (("roomy", ROOMY), ("tight", TIGHT)):
        build(tmp_path / "checkpoint", tmp_path / label, settings)
        engine = Engine.open(tmp_path / label)
        results[label, "together"], preemptions = serve(engine, [requests()])
        assert (preemptions > 0) == (label == "tight"), "the tight engine preempts"
        results[label, "alone"], _ = serve(engine, [[request] for request in requests()])
    expected = {i: c.token_ids for i, c in results["roomy", "alone"].items()}
    for key, completions in results.items():
        assert {i: c.token_ids for i, c in completions.items()} == expected, key
