"""Steps of tiny models for compute-sanitizer to watch (sanitize.py): prompts, and decode steps of
one sequence and of several, drawn in every way, in CUDA graphs as always.

    sanitized_steps.py few|all
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_models import LIMITS, MODELS, SAMPLINGS, Driver, RandomWeights, of_dtype

from llmforge.checkpoint.config import ModelConfig
from llmforge.comm import LocalComm
from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.ranks import Ranks
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import CudaTarget, engine_kernels
from llmforge.kernels.compile import DEFAULT_CACHE, KernelSpec, compile_kernel
from llmforge.kernels.driver import Module
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES
from llmforge.parallel import Topology

STREAMED = KernelChoice("stream_gemm", attention="separate", few_rows="stream_gemm")
"""The kernels in whose place the measured choice has others."""

# Most kernels of one rank.
FEW = (
    ("wide", "bfloat16", MEASURED),
    ("wide", "bfloat16", STREAMED),
    ("all-biases", "float32", MEASURED),
    ("experts-shared", "bfloat16", MEASURED),
    ("latents", "bfloat16", MEASURED),
)
ALL = (
    *FEW,
    ("wide-biases", "float16", MEASURED),
    ("head-dim-128", "bfloat16", MEASURED),
    ("scaled-and-capped", "bfloat16", MEASURED),
    ("odd-sizes", "bfloat16", MEASURED),
    ("alibi-parallel", "float32", MEASURED),
    ("layer-norm", "bfloat16", MEASURED),
    ("sinks-and-limited-experts", "bfloat16", MEASURED),
    ("experts", "float32", MEASURED),
)
CHUNKS = ([5, 16, 0], [1, 17, 70], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1])
"""Tokens of three sequences in each step: a first prompt, the others in it, then decode steps."""


def modules_of(specs: dict[str, KernelSpec], arch: str) -> dict[str, Module]:
    with ThreadPoolExecutor() as pool:
        images = pool.map(lambda s: compile_kernel(s, arch, DEFAULT_CACHE).image, specs.values())
        compiled = zip(specs.items(), images, strict=True)
        return {key: Module(image, spec.entry) for (key, spec), image in compiled}


def loaded(config: ModelConfig, choice: KernelChoice) -> tuple[CudaExecutable, set[str]]:
    """An executable of one rank, and the names of its kernels."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    specs = engine_kernels(graph, LIMITS, arch, choice)
    values = RandomWeights(config, seed=3)
    weights: dict[str, Any] = {
        p.name: torch.from_numpy(values.read(p).astype(np.float32)).to("cuda", DTYPES[p.dtype])
        for p in graph.parameters
    }
    ranks = Ranks(LocalComm(), Topology(), torch.device("cuda", torch.cuda.current_device()))
    made = CudaExecutable(graph, weights, modules_of(specs, arch), arch, LIMITS, ranks, choice)
    return made, {spec.entry for spec in specs.values()}


def run(config: ModelConfig, choice: KernelChoice) -> set[str]:
    """All steps, each drawn in another way. Returns the names of the kernels."""
    executable, names = loaded(config, choice)
    ways = list(SAMPLINGS.values())
    driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
    for number, chunks in enumerate(CHUNKS):
        batch = driver.batch(chunks, ways[number % len(ways)])
        tokens = executable.step(batch).tokens
        assert tokens is not None and (tokens < config.vocab_size).all()
        chosen = [i for i, count in enumerate(chunks) if count]
        drawn = [i for i in chosen if driver.computed[i] == len(driver.tokens[i])]
        driver.append(tokens.tolist(), drawn)
    executable.close()
    return names


def main() -> None:
    started, names = time.monotonic(), set()
    for name, dtype, choice in {"few": FEW, "all": ALL}[sys.argv[1]]:
        print(f"{name} {dtype}, {time.monotonic() - started:.0f} s", flush=True)
        names |= run(of_dtype(MODELS[name], dtype), choice)
    print(f"{time.monotonic() - started:.0f} s: {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
