"""convert against `cp -r` of the same bytes: time and peak memory, at two sizes.

Writes random models in the Hugging Face layout (bfloat16, sharded) to a scratch directory, then
measures in turn, several times over: `cp -r`, `cp -r` followed by sync, `llmforge convert` with
the dtype unchanged, and with it changed. Each with the source on the disk only ("cold") and in
the page cache ("warm"). convert returns when its files are on the disk, and so does cp with sync;
cp alone returns earlier. Ratios to both are reported, as medians over the turns.

    python benchmarks/convert.py --scratch /big/disk
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmforge import __version__

GB = 10**9
# Llama shapes of an 8B model; the number of layers makes the size (0.436 GB each in bfloat16).
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
LAYER_BYTES = 436_224_000
OUTER_BYTES = 2 * 2 * 32000 * 4096
SHARD_BYTES = 2 * GB


def write_model(directory: Path, layers: int) -> int:
    """A sharded Hugging Face model. Returns the bytes of its weights."""
    from llmforge.checkpoint.families import FAMILIES
    from llmforge.checkpoint.sources.random import RandomSource
    from llmforge.safetensors_io import SafetensorsWriter

    directory.mkdir()
    config_file = directory / "config.json"
    config_file.write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    source = RandomSource(config_file)
    theirs = {
        rule.ours[0].replace("{i}", str(i)): rule.theirs[0].replace("{i}", str(i))
        for rule in FAMILIES[0].rules
        for i in range(layers)
    }
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in source.tensors.items():
        if filled + info.nbytes > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, 1):
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        entries = [(theirs[n], "bfloat16", source.tensors[n].shape) for n in names]
        with SafetensorsWriter(directory / file, entries, {"format": "pt"}) as writer:
            for name in names:
                writer.write(theirs[name], source.read(name))
            writer.close()
        weight_map |= dict.fromkeys((theirs[n] for n in names), file)
    index_text = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index_text)
    return sum(info.nbytes for info in source.tensors.values())


def run(command: list[str], sync: bool = False) -> tuple[float, int]:
    """Seconds, and the peak resident bytes of the process. Linux counts what this process held
    when it started the other one as that one's, so this one imports little."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}")
    if sync:
        os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def settle(model: Path, cold: bool) -> None:
    """Write out what is pending, and put the model into the page cache or out of it."""
    os.sync()
    for path in model.iterdir():
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(1 << 22):
                    pass


def measure(
    model: Path, scratch: Path, repeat: int, cold: bool
) -> dict[str, list[tuple[float, int]]]:
    """All ways of moving the model, in turn, `repeat` times."""
    output = scratch / "output"
    convert = [sys.executable, "-m", "llmforge", "convert", str(model), "-o", str(output)]
    copy = ["cp", "-r", str(model), str(output)]
    ways: dict[str, Callable[[], tuple[float, int]]] = {
        "cp": lambda: run(copy),
        "cp_sync": lambda: run(copy, sync=True),
        "convert": lambda: run(convert),
        "convert_float16": lambda: run([*convert, "--dtype", "float16"]),
    }
    results: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    for turn in range(repeat):
        for name, way in ways.items():
            settle(model, cold)
            results[name].append(way())
            shutil.rmtree(output)
            click.echo(f"  {turn + 1}/{repeat} {name}: {results[name][-1][0]:.1f} s", err=True)
    return results


def report(results: dict[str, list[tuple[float, int]]]) -> dict[str, Any]:
    seconds = {name: [round(s, 3) for s, _ in runs] for name, runs in results.items()}

    def ratio(way: str, base: str) -> float:
        pairs = zip(seconds[way], seconds[base], strict=True)
        return round(statistics.median(a / b for a, b in pairs), 3)

    return {
        "seconds": seconds,
        "median_seconds": {name: statistics.median(s) for name, s in seconds.items()},
        "peak_rss_gb": {
            name: round(max(rss for _, rss in runs) / GB, 3)
            for name, runs in results.items()
            if name.startswith("convert")
        },
        "ratio_convert_to_cp": ratio("convert", "cp"),
        "ratio_convert_to_cp_sync": ratio("convert", "cp_sync"),
        "ratio_convert_float16_to_cp_sync": ratio("convert_float16", "cp_sync"),
    }


def machine() -> dict[str, Any]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(pages / GB, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    from importlib.metadata import version

    packages = ("torch", "numpy", "ml_dtypes")
    return {
        "llmforge": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


@click.command()
@click.option("--size-gb", type=float, multiple=True, default=(1.0, 6.0), show_default=True)
@click.option("--repeat", type=click.IntRange(min=1), default=3, show_default=True)
@click.option(
    "--scratch",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    default=Path(tempfile.gettempdir()),
    help="Directory on the disk to measure; needs 3 times the largest size.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path(__file__).parent / "results" / "convert.json",
)
def main(size_gb: tuple[float, ...], repeat: int, scratch: Path, output: Path) -> None:
    """Measure and write the report as JSON."""
    free = shutil.disk_usage(scratch).free
    if free < 3 * max(size_gb) * GB:
        raise click.ClickException(f"{scratch} has {free / GB:.0f} GB free: too little")
    sizes = []
    for size in size_gb:
        layers = max(1, round((size * GB - OUTER_BYTES) / LAYER_BYTES))
        with tempfile.TemporaryDirectory(dir=scratch, prefix="llmforge-bench-") as directory:
            model = Path(directory) / "model"
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                nbytes = pool.apply(write_model, (model, layers))
            click.echo(f"{nbytes / GB:.2f} GB in {layers} layers", err=True)
            sizes.append(
                {
                    "weights_gb": round(nbytes / GB, 3),
                    "largest_tensor_gb": round(OUTER_BYTES / 2 / GB, 3),
                    "load_average_before": os.getloadavg()[0],
                    **{
                        label: report(measure(model, Path(directory), repeat, cold))
                        for label, cold in (("cold", True), ("warm", False))
                    },
                }
            )
    result = {"machine": machine(), "versions": versions(), "repeat": repeat, "sizes": sizes}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    click.echo(f"written: {output}")


if __name__ == "__main__":
    main()
