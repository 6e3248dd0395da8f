"""Attention of steps with prompts: wide_attention.cu, the kernel for all GPUs, and torch's own.

    python benchmarks/cuda_prompts.py [--json FILE]

First wide_attention.cu is checked beside plain torch (prompt_cases.py: random inputs, outputs that
are not numbers before, ragged lengths), and beside the other kernel in every step that is timed.
Then each is timed by itself, as a CUDA graph of launches on several sets of operands that together
are larger than the L2 cache. torch's flash attention has keys and values that lie together, not in
the cache's blocks, and no steps of sequences that are in the cache already. "TFLOP/s" counts what
the rows see, and no product of what is masked.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from attention_cases import TOLERANCE, row_distance
from cuda_attention import Launcher
from cuda_speed import device_seconds, machine, replayed, write_report
from prompt_cases import PROMPTS, Prompts, Tensors, compare, drawn, launches

SETS = 3  # of operands
REPEAT = 10

_8B: dict[str, Any] = {"head_dim": 128, "kv_heads": 8, "block_size": 32}
_1B: dict[str, Any] = {**_8B, "head_dim": 64}
STEPS = {
    "8 x 1024": Prompts((1024,) * 8, (0,) * 8, **_8B),
    "1 x 128": Prompts((128,), (0,), **_8B),
    "1 x 1024": Prompts((1024,), (0,), **_8B),
    "1 x 8192": Prompts((8192,), (0,), **_8B),
    "32 x 256": Prompts((256,) * 32, (0,) * 32, **_8B),
    "2048 behind 14336": Prompts((2048,), (14336,), **_8B),
    "7 x 1024, 200 of 1100": Prompts((1024,) * 7 + (1,) * 200, (0,) * 7 + (1099,) * 200, **_8B),
    "200 of 1100": Prompts((1,) * 200, (1099,) * 200, **_8B),
    "8 x 1024, heads of 64": Prompts((1024,) * 8, (0,) * 8, **_1B),
    "8 x 1024, 16 heads of 256": Prompts(
        (1024,) * 8, (0,) * 8, head_dim=256, kv_heads=4, block_size=32
    ),
}


def check(arch: str) -> list[str]:
    """Complaints."""
    cases = [(case, drawn(case, seed)) for seed, case in enumerate(PROMPTS)]
    launcher = Launcher((each.kernel for c, t in cases for each in launches(c, t)), arch)
    found = []
    for case, tensors in cases:
        off = compare(case, tensors, launcher.run)
        if not off <= TOLERANCE[case.dtype]:
            found.append(f"{case}: off by {off:.1e}")
    return found


def flops(case: Prompts) -> int:
    """Of the products whose results count."""
    seen = (n * p + n * (n + 1) // 2 for n, p in zip(case.tokens, case.past, strict=True))
    return 4 * case.heads * case.head_dim * sum(seen)


def flash_seconds(case: Prompts, sets: list[Tensors]) -> float:
    """What torch's flash attention takes for a set, of prompts without a past."""
    shape = sum(case.tokens), case.kv_heads, case.head_dim
    inputs = [
        (
            tensors["q"].view(len(tensors["q"]), case.heads, case.head_dim),
            torch.randn(shape, device="cuda").to(tensors["q"].dtype),
            torch.randn(shape, device="cuda").to(tensors["q"].dtype),
            tensors["query_starts"],
        )
        for tensors in sets
    ]
    longest = max(case.tokens)

    def run() -> None:
        for q, k, v, starts in inputs:
            torch.ops.aten._flash_attention_forward(
                q, k, v, starts, starts, longest, longest, 0.0, True, False,
                scale=case.head_dim**-0.5,
            )  # fmt: skip

    run()
    return device_seconds(run, REPEAT) / len(sets)


def measure(case: Prompts, arch: str) -> dict[str, Any]:
    """Microseconds of each kernel in a step, and how far the two of ours are apart."""
    sets: list[Tensors] = [drawn(case, seed, "cuda") for seed in range(SETS)]
    calls = {wide: [launches(case, each, wide=wide) for each in sets] for wide in (True, False)}
    specs = [c.kernel for each in calls.values() for launched in each for c in launched]
    launcher = Launcher(specs, arch)
    launcher.set_step(sum(case.tokens), len(case.tokens), max(case.tokens))
    results, seconds = {}, {}
    for wide, each in calls.items():
        bound = [
            [launcher.bind(launch, tensors) for launch in launched]
            for launched, tensors in zip(each, sets, strict=True)
        ]
        for launched in bound:  # lists the items too, once
            for call in launched:
                call(torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        results[wide] = sets[0]["out"].clone()
        sets[0]["out"].fill_(torch.nan)
        seconds[wide] = replayed([launched[-1] for launched in bound])() / len(sets)
    us = {"wide_attention": seconds[True] * 1e6, "others": seconds[False] * 1e6}
    if not any(case.past):
        us["torch flash"] = flash_seconds(case, sets) * 1e6
    off = row_distance(results[True], results[False], case.head_dim)
    return {"us": us, "tflops": flops(case) / seconds[True] / 1e12, "off": off}


def measure_all(arch: str, shown: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    found = {}
    for name, case in STEPS.items():
        found[name] = row = measure(case, arch)
        times = "  ".join(f"{kernel} {us:.1f}" for kernel, us in row["us"].items())
        shown(f"{name:28} {times}  ({row['tflops']:.0f} TFLOP/s, {row['off']:.1e} off)")
        torch.cuda.empty_cache()
    return found


@click.command(help=__doc__)
@click.option("--json", "output", type=Path)
def main(output: Path | None) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        raise click.ClickException("this needs an NVIDIA GPU of compute capability 9.0")
    wrong = check("sm_90")
    for complaint in wrong:
        click.echo(f"wrong: {complaint}")
    click.echo(f"{len(PROMPTS)} cases, wrong: {len(wrong)}")
    click.echo(f"{torch.cuda.get_device_name()}, microseconds")
    steps = measure_all("sm_90", click.echo)
    wrong += [name for name, row in steps.items() if not row["off"] <= TOLERANCE["bfloat16"]]
    if output:
        report = {
            **machine(),
            "steps": steps,
            "wrong": wrong,
        }
        write_report(output, report)
    if wrong:
        raise click.ClickException(f"{len(wrong)} results are wrong: the times mean nothing")


if __name__ == "__main__":
    main()
