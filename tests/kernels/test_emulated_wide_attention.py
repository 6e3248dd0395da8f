"""wide_attention.cu on an emulated GPU beside its plain-torch meaning; attention_plan.cu."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_models import LIMITS, MODELS, Driver, RandomWeights, of_dtype
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu
from op_meanings import check_instructions

from llmforge.engine.cuda.target import CudaTarget
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from attention_cases import TOLERANCE  # noqa: E402
from prompt_cases import MIXED, PROMPTS, Prompts, compare, drawn, launches  # noqa: E402

GUARD = 7.5


def check(case: Prompts, processors: int = 3, seed: int = 0) -> None:
    tensors = drawn(case, seed)
    whole = {}
    for name in ("out", "items"):  # with what lies behind them, where nothing is to be written
        rows = tensors[name]
        whole[name] = torch.cat((rows, torch.full((5, rows.shape[1]), GUARD).to(rows.dtype)))

    def run(launch: Launch, tensors: Any, sequences: int, tokens: int) -> None:
        bench = Bench(seed)
        bench.tensors = tensors | whole
        bench.run(launch, tokens=tokens, sequences=sequences, processors=processors)
        for name, rows in whole.items():
            count = len(tensors[name])
            tensors[name].copy_(rows[:count])
            assert (rows[count:] == torch.tensor(GUARD).to(rows.dtype)).all(), name

    off = compare(case, tensors, run)
    assert off <= TOLERANCE[case.dtype], off


@pytest.mark.parametrize("case", PROMPTS, ids=str)
def test_shapes(case: Prompts) -> None:
    check(case)


@pytest.mark.parametrize("processors", [1, 2, 5, 40])
def test_blocks_take_several_items(processors: int) -> None:
    for seed in range(2):  # the blocks run in either order
        check(Prompts(**MIXED, head_dim=16), processors, seed)


@pytest.mark.parametrize("keys", [16, 48, 96])
@pytest.mark.parametrize("window", [None, 1, 40])
def test_tiles(keys: int, window: int | None) -> None:
    check(Prompts(**MIXED, head_dim=16, keys=keys, window=window))


_MANY = tuple((1 + 37 * i % 200 * (i % 3 == 0), 97 * i % 3000) for i in range(70))


@pytest.mark.parametrize(
    ("sequences", "options"),
    [
        (_MANY, {}),  # more sequences than a block has warps
        (_MANY, {"window": 150}),
        (((200, 0), (1, 300)), {"group": 64, "kv_heads": 1}),  # more items than a warp has lanes
        (((3, 17_000), (1, 20), (2, 18_000), (40, 0)), {"head_dim": 16}),  # more tiles than places
    ],
    ids=["many", "window", "large-group", "long"],
)
def test_the_list_has_every_token_once_and_long_items_first(
    sequences: tuple[tuple[int, int], ...], options: dict[str, Any]
) -> None:
    count, (tokens, past) = len(sequences), zip(*sequences, strict=True)
    case = Prompts(tokens, past, keys=16, **options)
    window = case.window
    bench = Bench()
    bench.tensors = drawn(case, 0)
    launch, _ = launches(case, bench.tensors)
    bench.run(launch, sequences=count)
    (found, *_), *rows = bench.tensors["items"].tolist()
    starts = bench.tensors["query_starts"].tolist()
    items, most = [], case.plan.tokens
    for sequence, token, left, position in rows[:found]:
        assert token + left == starts[sequence + 1]
        assert position == case.lens[sequence] - left
        first = max(0, position - window + 1) if window else 0
        end = -(-(position + min(left, most)) // case.plan.keys)
        items.append((end - first // case.plan.keys, range(token, token + min(left, most))))
    assert sorted(t for _, each in items for t in each) == list(range(sum(tokens)))
    lengths = [min(tiles, 1023) for tiles, _ in items]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 1
    assert all(row == [-9] * 4 for row in rows[found:])


@pytest.mark.parametrize("name", ["wide", "head-dim-128", "scaled-and-capped"])
def test_every_instruction_of_steps_with_prompts(name: str) -> None:
    config = dataclasses.replace(
        of_dtype(MODELS[name], "bfloat16"),
        num_layers=1,
        sliding_window=MODELS[name].sliding_window[:1],
    )
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    weights = RandomWeights(config, seed=5)
    with emulated_gpu():
        cuda = emulated(graph, weights, LIMITS)
        driver = Driver(LIMITS, config.vocab_size, 3, (41, 30, 35))
        for counts in ([40, 30, 20], [1, 0, 15]):
            batch = driver.batch(counts)
            calls = [i.call for i in cuda.instructions(batch)]
            kernels = [call.kernel.entry for call in calls if isinstance(call, Launch)]
            assert kernels.count("wide_attention") == kernels.count("attention_plan") == 1
            check_instructions(cuda, batch)
