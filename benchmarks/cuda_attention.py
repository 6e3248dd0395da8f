"""Attention of decode steps: qkv.cu and attention_mma.cu, or decode_attention.cu for both.

    python benchmarks/cuda_attention.py [--model llama-3.1-8b] [--json FILE]

First both are checked beside plain torch and beside each other (attention_cases.py: random inputs,
outputs that are not numbers before, ragged lengths). Then whole decode steps of two layers are
timed, as CUDA graphs with early starts as the engine launches them, once with each (and tunings of
the second), and once without what follows the product of q, k and v up to attention; the difference
over the layers is what attention costs. The floor of that: the bytes of the keys and values over
the bandwidth that reading a large buffer reaches in the same run.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from attention_cases import CASES, RAGGED, Case, Tensors, compare, drawn, launches, wrong
from cuda_speed import (
    MODELS,
    load,
    machine,
    prepared,
    random_weights,
    read_bandwidth,
    replayed,
    write_report,
)

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.cuda.executable import CudaExecutable
from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.step import Limits, StepBatch
from llmforge.kernels.compile import DEFAULT_CACHE, KernelSpec, compile_kernel
from llmforge.kernels.decode_attention import DecodeTuning
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.launch import Launch
from llmforge.runtime.verify import logit_deviation

LAYERS = 2  # their weights are many times what the L2 cache holds
VOCAB = 1024
BATCHES = (1, 8, 32, 128, 256)
KEYS = (256, 1536, 4096)
LONGEST = 16384
LIMITS = Limits(max(BATCHES), LONGEST, 2048, 32, max(BATCHES) * max(KEYS) // 32)
ROUNDS = 3
VARIANTS = {
    "separate": KernelChoice(attention="separate"),
    "fused": KernelChoice(),
    **{
        f"{warps} to a block": KernelChoice(decode=DecodeTuning(warps=warps))
        for warps in (1, 2, 4, 8)
    },
}
ATTENTION = frozenset({"qkv", "attention", "attention_simple", "decode_plan", "decode_attention"})

LONG = (
    Case((4096, 1, 700), head_dim=128, kv_heads=8, block_size=32),
    Case((40, 4096, 1, 700), head_dim=128, kv_heads=8, block_size=32, warps=1),
    Case((9000, 1, 20), head_dim=128, kv_heads=8, block_size=32, warps=2),
    Case((20000, *RAGGED, 3000), head_dim=128, kv_heads=8, block_size=32),
    Case(tuple(1 + 37 * i % 600 for i in range(256)), kv_heads=8, block_size=32),
)


# -- correctness ---------------------------------------------------------------------------------


class Launcher:
    """Runs single launches on the GPU, of kernels that are compiled side by side before."""

    def __init__(self, specs: Iterable[KernelSpec], arch: str) -> None:
        torch.cuda.synchronize()  # there is a context now, into which modules are loaded
        wanted = {spec.key: spec for spec in specs}
        with ThreadPoolExecutor() as pool:
            compiled = pool.map(
                lambda spec: compile_kernel(spec, arch, DEFAULT_CACHE), wanted.values()
            )
            self._modules = {
                key: Module(result.image, wanted[key].entry)
                for key, result in zip(wanted, compiled, strict=True)
            }
        self._sizes = Sizes(("tokens", "sequences", "longest_query", "processors"))
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        self._sizes.set("processors", processors)

    def bind(self, launch: Launch, tensors: Tensors) -> BoundLaunch:
        """The launch on tensors of the GPU's memory."""
        return BoundLaunch(
            launch,
            self._modules[launch.kernel.key],
            lambda name: tensors[name].data_ptr(),
            self._sizes,
            overlap=torch.cuda.get_device_capability()[0] >= 9,
        )

    def set_step(self, tokens: int, sequences: int, longest: int) -> None:
        """The sizes with which launches start from now on."""
        self._sizes.set("tokens", tokens)
        self._sizes.set("sequences", sequences)
        self._sizes.set("longest_query", longest)

    def run(
        self, launch: Launch, tensors: Tensors, sequences: int, tokens: int | None = None
    ) -> None:
        """On tensors of this machine's memory, into which the results come. tokens: where not one a
        sequence."""
        self.set_step(tokens or sequences, sequences, 1)
        there = {name: tensor.cuda() for name, tensor in tensors.items()}
        self.bind(launch, there)(torch.cuda.current_stream().cuda_stream)
        for name, tensor in there.items():
            tensors[name].copy_(tensor)


def kernels_of(case: Case, tensors: Tensors) -> list[KernelSpec]:
    both = [launches(case, tensors, fused=fused) for fused in (False, True)]
    return [launch.kernel for calls in both for launch in calls]


def check(arch: str) -> list[dict[str, Any]]:
    """What each case is off, and whether that is wrong."""
    cases = [(case, drawn(case, seed)) for seed, case in enumerate((*CASES, *LONG))]
    launcher = Launcher((spec for each in cases for spec in kernels_of(*each)), arch)
    found = []
    for case, tensors in cases:
        off = compare(case, tensors, launcher.run)
        found.append({"case": dataclasses.asdict(case), "off": off, "wrong": wrong(case, off)})
        if found[-1]["wrong"]:
            click.echo(f"wrong: {case}: {off}")
    return found


# -- speed ---------------------------------------------------------------------------------------


def lengths() -> dict[str, tuple[int, ...]]:
    """The steps to time, by name: equal lengths, and a mix of which one sequence is the longest."""
    equal = {f"{batch} x {keys}": (keys,) * batch for batch in BATCHES for keys in KEYS}
    count, shortest = BATCHES[-2], min(KEYS) // 16
    exponents = np.random.default_rng(0).uniform(np.log(shortest), np.log(max(KEYS)), count - 1)
    return equal | {f"{count} mixed": (LONGEST, *np.exp(exponents).astype(int).tolist())}


def step_of(lens: tuple[int, ...]) -> StepBatch:
    """A decode step of sequences of these lengths, in blocks that are anywhere."""
    count, size = len(lens), LIMITS.block_size
    needed = [-(-n // size) for n in lens]
    order = np.random.default_rng(count).permutation(LIMITS.num_blocks).astype(np.int32)
    table = np.zeros((count, max(needed)), np.int32)
    used = 0
    for row, blocks in zip(table, needed, strict=True):
        row[:blocks] = order[used : used + blocks]
        used += blocks
    kv_lens = np.array(lens, np.int32)
    return StepBatch(
        token_ids=np.arange(count, dtype=np.int32), positions=kv_lens - 1,
        query_starts=np.arange(count + 1, dtype=np.int32), kv_lens=kv_lens, block_table=table,
        prompt_lens=kv_lens, logit_rows=np.arange(count, dtype=np.int32),
    )  # fmt: skip


def timed(
    executable: CudaExecutable, step: StepBatch, *, without: frozenset[str] = frozenset()
) -> Callable[[], float]:
    """A function that gives the seconds that the network of a step takes, less the kernels of these
    names: the median of many replays of a graph."""
    executable.step(step)  # its arrays and sizes are those of the graph
    count, programs = step.num_sequences, executable.memory.programs
    (program,) = (p for p in programs if p.shape.decode and p.shape.sequences == count)
    calls = [
        executable.bind(instruction, program)
        for instruction in program.instructions
        if not (isinstance(instruction.call, Launch) and instruction.call.kernel.entry in without)
    ]
    return replayed(calls)


def short(config: ModelConfig) -> ModelConfig:
    """A few layers of the model, and little behind them."""
    return dataclasses.replace(
        config, num_layers=LAYERS, sliding_window=(None,) * LAYERS, vocab_size=VOCAB
    )


def loaded(config: ModelConfig) -> dict[str, CudaExecutable]:
    """An executable of each variant, with the same weights, keys and values."""
    graph = prepared(config)
    weights = random_weights(graph)
    executables = {name: load(graph, weights, LIMITS, choice) for name, choice in VARIANTS.items()}
    for name, executable in executables.items():
        kernels = {key for program in executable.memory.programs for key in program.kernels}
        fused = any(key.startswith("decode_attention") for key in kernels)
        assert fused == (VARIANTS[name].attention == "fused"), name
    first, *others = executables.values()
    for state in graph.states:
        drawn = first.memory.tensors[state.name].normal_()
        for other in others:
            other.memory.tensors[state.name].copy_(drawn)
    torch.cuda.synchronize()  # executables have streams of their own
    return executables


def measured(
    executables: Mapping[str, CudaExecutable], step: StepBatch, allowed: float
) -> dict[str, Any]:
    """What attention takes in a layer with each variant, in microseconds, and how far each one's
    logits are from those of the first, relative to their norm: wrong beyond what is `allowed`."""
    logits = {name: torch.from_numpy(each.step(step).logits) for name, each in executables.items()}
    want = logits["separate"]
    off = {name: float((got - want).norm() / want.norm()) for name, got in logits.items()}
    rest = timed(executables["separate"], step, without=ATTENTION)
    steps = {name: timed(each, step) for name, each in executables.items()}
    times: dict[str, list[float]] = {name: [] for name in executables}
    for _ in range(ROUNDS):
        base = rest()
        for name, seconds in steps.items():
            times[name].append((seconds() - base) / LAYERS * 1e6)
    wrong = [name for name, distance in off.items() if not distance <= allowed]
    us = {name: statistics.median(found) for name, found in times.items()}
    return {"us": us, "logits_off": off, "wrong": wrong}


def measure(name: str, bandwidth: float) -> list[dict[str, Any]]:
    """All steps of a model."""
    config = short(MODELS[name])
    executables = loaded(config)
    rows: list[dict[str, Any]] = []
    click.echo(f"{name}: microseconds a layer; floor, {', '.join(VARIANTS)}; fused over floor")
    for label, lens in lengths().items():
        nbytes = 2 * sum(lens) * config.num_kv_heads * config.head_dim * 2
        row = {"model": name, "step": label, "floor_us": nbytes / bandwidth * 1e6}
        rows.append(row | measured(executables, step_of(lens), logit_deviation(config)))
        times = "  ".join(f"{us:8.1f}" for us in rows[-1]["us"].values())
        over = rows[-1]["us"]["fused"] / row["floor_us"]
        wrong = f"  WRONG: {rows[-1]['wrong']}" if rows[-1]["wrong"] else ""
        click.echo(f"{label:12} {row['floor_us']:8.1f}  {times}  {over:6.2f}{wrong}")
    for executable in executables.values():
        executable.close()
    return rows


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=tuple(MODELS), show_default=True)
@click.option("--json", "output", type=Path)
def main(models: tuple[str, ...], output: Path | None) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this needs an NVIDIA GPU")
    major, minor = torch.cuda.get_device_capability()
    checks = check(f"sm_{major}{minor}")
    failed = [found for found in checks if found["wrong"]]
    worst = max(found["off"]["out"] for found in checks)
    click.echo(f"{len(checks)} cases, at most {worst:.1e} off; wrong: {len(failed)}")
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    click.echo(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    steps = []
    for name in models:
        steps += measure(name, bandwidth)
        torch.cuda.empty_cache()
    failed += [row for row in steps if row["wrong"]]
    if output:
        report = {
            **machine(),
            "read_bandwidth_tb_per_s": bandwidth / 1e12,
            "layers": LAYERS,
            "steps": steps,
            "checks": checks,
        }
        write_report(output, report)
    if failed:
        raise click.ClickException(f"{len(failed)} results are wrong: the times mean nothing")


if __name__ == "__main__":
    main()
