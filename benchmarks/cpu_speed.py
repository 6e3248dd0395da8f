"""The cpu target beside transformers: the same weights, the same machine, in turn.

    python benchmarks/cpu_speed.py [--config configs/models/qwen2.5-0.5b.json] [--rounds 3]

Makes a model of the config's shapes with random bfloat16 weights, converts and builds it with the
command line, and measures prefill of `--input-len` tokens at batch 1 and decode at each
`--batch-size`: llmforge through `llmforge bench`, transformers through its own forward pass with a
KV cache (logits of the last position only). The two take turns, `--rounds` times, each in a fresh
process; the report has medians, their ratio, and the floor. A decode step reads every weight once,
so it cannot be faster than the weights' bytes over the memory bandwidth; a prefill multiplies each
token by every layer's weights, so it cannot be faster than those operations over the rate of a
large bfloat16 product. Both ceilings are measured in the same run.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parent.parent
OUTPUT_LEN = 33  # the first token belongs to prefill: 32 decode steps


def read_bandwidth() -> float:
    """Bytes a second that all cores together read from memory: a sum over 1 GB, the best of 5."""
    import torch

    buffer = torch.ones(1 << 28, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


def product_rate() -> float:
    """Operations a second of a 4096-cube bfloat16 matrix product, the best of 5."""
    import torch

    a, b = (torch.randn(4096, 4096).bfloat16() for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 4096**3 / best


def ceilings() -> dict[str, float]:
    return {"bytes_per_second": read_bandwidth(), "operations_per_second": product_rate()}


def measure_transformers(model_dir: str, input_len: int, batch_sizes: list[int]) -> dict[str, Any]:
    """TTFT in seconds at batch 1, and TPOT in seconds a step for each batch size."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    generator = torch.Generator().manual_seed(0)

    def generate(batch: int) -> tuple[float, list[float]]:
        ids = torch.randint(model.config.vocab_size, (batch, input_len), generator=generator)
        cache, steps = None, []
        for _ in range(OUTPUT_LEN):
            start = time.perf_counter()
            out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            steps.append(time.perf_counter() - start)
        return steps[0], steps[1:]

    result: dict[str, Any] = {"tpot": {}}
    with torch.inference_mode():
        generate(1)  # warm-up
        result["ttft"] = statistics.median(generate(1)[0] for _ in range(3))
        for batch in batch_sizes:
            generate(batch)
            result["tpot"][str(batch)] = statistics.median(generate(batch)[1])
    return result


def measure_llmforge(engine: str, input_len: int, batch_sizes: list[int]) -> dict[str, Any]:
    """The same figures from the report that `llmforge bench` writes."""
    sizes = [word for batch in batch_sizes for word in ("--batch-size", str(batch))]
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "bench.json"
        llmforge(
            "bench", engine, "--input-len", input_len, "--output-len", OUTPUT_LEN, *sizes,
            "--json", report,
        )  # fmt: skip
        return dict(json.loads(report.read_text()))


def llmforge(*arguments: object) -> None:
    command = [sys.executable, "-m", "llmforge", *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)


def in_fresh_process(function: str, *arguments: Any) -> dict[str, Any]:
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import cpu_speed; "
        f"print(json.dumps(cpu_speed.{function}(*{list(arguments)!r})))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return dict(json.loads(out.splitlines()[-1]))


def make_model(config: Path, directory: Path) -> tuple[int, int]:
    """A transformers model with random weights. Returns the bytes that a decode step reads, and
    the weights that each token of a prompt is multiplied by (the head sees the last one alone)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = AutoConfig.for_model(**json.loads(config.read_text()))
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    total = sum(p.numel() for p in model.parameters())  # tied weights are counted once
    if not settings.tie_word_embeddings:
        total -= settings.vocab_size * settings.hidden_size  # one row of the embedding is read
    layers = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2)
    return 2 * total, layers


def compare(
    scratch: Path, config: Path, input_len: int, batch_sizes: list[int], rounds: int
) -> dict[str, Any]:
    """All measurements, as they go into the report."""
    weight_bytes, layer_weights = make_model(config, scratch / "hf")
    llmforge("convert", scratch / "hf", "-o", scratch / "checkpoint")
    llmforge(
        "build", scratch / "checkpoint", "-o", scratch / "engine", "--max-batch-size",
        max(batch_sizes), "--max-seq-len", input_len + OUTPUT_LEN, "--max-num-tokens",
        input_len * max(batch_sizes),
    )  # fmt: skip
    limits, theirs, ours = [], [], []
    for _ in range(rounds):
        limits.append(in_fresh_process("ceilings"))
        theirs.append(
            in_fresh_process("measure_transformers", str(scratch / "hf"), input_len, batch_sizes)
        )
        ours.append(measure_llmforge(str(scratch / "engine"), input_len, batch_sizes))
    bandwidth, rate = (
        statistics.median(measured[name] for measured in limits)
        for name in ("bytes_per_second", "operations_per_second")
    )
    floor = weight_bytes / bandwidth
    prefill_floor = 2 * layer_weights * input_len / rate

    def case(
        name: str, mine: list[float], peer: list[float], bound: float | None
    ) -> dict[str, Any]:
        a, b = statistics.median(mine), statistics.median(peer)
        row = {"case": name, "llmforge_ms": a * 1e3, "transformers_ms": b * 1e3, "speedup": b / a}
        if bound is not None:
            row |= {"floor_ms": bound * 1e3, "measured_over_floor": a / bound}
        return row

    def mine(batch: int, metric: str) -> list[float]:
        return [
            row[metric]["p50"]
            for report in ours
            for row in report["latency"]
            if row["batch_size"] == batch
        ]

    prefill = [t["ttft"] for t in theirs]
    cases = [
        case(f"prefill {input_len} tokens", mine(1, "ttft"), prefill, prefill_floor),
    ]
    cases += [
        case(f"decode, batch {b}", mine(b, "tpot"), [t["tpot"][str(b)] for t in theirs], floor)
        for b in batch_sizes
    ]
    return {
        "cases": cases,
        "memory_bandwidth_gb_per_s": [x["bytes_per_second"] / 1e9 for x in limits],
        "bf16_product_gflop_per_s": [x["operations_per_second"] / 1e9 for x in limits],
        "bytes_read_a_decode_step": weight_bytes,
        "rounds": rounds,
        "environment": {
            **ours[0]["environment"],
            "transformers": importlib.metadata.version("transformers"),
        },
    }


@click.command(help=__doc__)
@click.option("--config", default=ROOT / "configs/models/qwen2.5-0.5b.json", type=Path)
@click.option("--input-len", default=512, show_default=True)
@click.option("--batch-size", "batch_sizes", multiple=True, default=(1, 8), show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--json", "output", default=ROOT / "benchmarks/results/cpu.json", type=Path)
def main(
    config: Path, input_len: int, batch_sizes: tuple[int, ...], rounds: int, output: Path
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        report = compare(Path(scratch), config, input_len, list(batch_sizes), rounds)
    output.write_text(json.dumps(report, indent=2) + "\n")
    for row in report["cases"]:
        click.echo(
            f"{row['case']:20} llmforge {row['llmforge_ms']:8.1f} ms   transformers "
            f"{row['transformers_ms']:8.1f} ms   {row['speedup']:.2f}x"
            + (f"   {row['measured_over_floor']:.2f} of floor" if "floor_ms" in row else "")
        )


if __name__ == "__main__":
    main()
