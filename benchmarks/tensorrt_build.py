"""`llmforge build --target tensorrt-rtx`: time, peak memory and size, at two models' shapes.

Each model has random bfloat16 weights (converted first, which is not measured). The build is the
command line's own, as a process of its own; its memory is the sum of the resident memory of that
process and its workers, sampled every 50 ms: mapped pages of the checkpoint count, although the
system could drop them. Needs no GPU. The estimate for 8 B parameters is the largest measured
model's ratios, applied to its weights: it was not run.

    python benchmarks/tensorrt_build.py --json benchmarks/results/tensorrt_build.json
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil

from llmforge import __version__

MODELS_DIRECTORY = Path(__file__).parents[1] / "configs" / "models"
# The 1.5 B model is Llama-3.2-1B with a head of its own.
MODELS = {
    "0.5B": ("qwen2.5-0.5b.json", {}),
    "1.5B": ("llama-3.2-1b.json", {"tie_word_embeddings": False}),
}
WEIGHTS_8B = 16_060_522_496  # Llama-3.1-8B in bfloat16


def llmforge(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "llmforge", *map(str, arguments)]


def convert(name: str, scratch: Path) -> Path:
    """The model's checkpoint, made where it is not there yet."""
    file, changes = MODELS[name]
    checkpoint = scratch / f"{name}-checkpoint"
    if not (checkpoint / "manifest.yaml").is_file():
        config = scratch / f"{name}.json"
        config.write_text(
            json.dumps({**json.loads((MODELS_DIRECTORY / file).read_text()), **changes})
        )
        made = ("--from-config", config, "--random-weights", "--dtype", "bfloat16")
        subprocess.run(llmforge("convert", *made, "-o", checkpoint, "--overwrite"), check=True)
    return checkpoint


def weights_bytes(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


class PeakMemory:
    """Watches a process and its children until it ends."""

    def __init__(self, pid: int) -> None:
        self.bytes = 0
        self._root = psutil.Process(pid)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def join(self) -> int:
        self._thread.join()
        return self.bytes

    def _watch(self) -> None:
        while True:
            try:
                tree = [self._root, *self._root.children(recursive=True)]
                if self._root.status() == psutil.STATUS_ZOMBIE:
                    return
                self.bytes = max(self.bytes, sum(_resident(process) for process in tree))
            except psutil.NoSuchProcess:
                return
            time.sleep(0.05)


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def measure(name: str, scratch: Path, archs: str) -> dict[str, Any]:
    checkpoint, engine = convert(name, scratch), scratch / f"{name}-engine"
    for path in checkpoint.glob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:  # from the page cache, as after a convert
            while file.read(1 << 26):
                pass
    options = ("--target", "tensorrt-rtx", "--arch", archs, "--overwrite")
    load = os.getloadavg()[0]
    start = time.perf_counter()
    process = subprocess.Popen(llmforge("build", checkpoint, "-o", engine, *options))
    peak = PeakMemory(process.pid)
    if process.wait() != 0:
        raise SystemExit(f"the build of {name} failed")
    seconds = time.perf_counter() - start
    weights = weights_bytes(checkpoint)
    size = sum(path.stat().st_size for path in engine.rglob("*") if path.is_file())
    return {
        "model": name,
        "archs": archs,
        "weights_bytes": weights,
        "seconds": round(seconds, 2),
        "peak_bytes": peak.join(),
        "peak_by_weights": round(peak.bytes / weights, 3),
        "engine_bytes": size,
        "engine_by_weights": round(size / weights, 4),
        "load_average_before": round(load, 2),
    }


@click.command(help=__doc__)
@click.option("--scratch", type=click.Path(path_type=Path), help="Where models and engines go.")
@click.option("--arch", default="sm_89", help="Architectures, as of llmforge build.")
@click.option("--repeat", default=3, help="Builds of each model; the quickest is reported first.")
@click.option("--json", "output", type=click.Path(path_type=Path), help="Write the report here.")
def main(scratch: Path | None, arch: str, repeat: int, output: Path | None) -> None:
    import tensorrt_rtx

    with tempfile.TemporaryDirectory() as temporary:
        directory = scratch or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        runs = {name: [measure(name, directory, arch) for _ in range(repeat)] for name in MODELS}
    best = {name: min(each, key=lambda run: run["seconds"]) for name, each in runs.items()}
    largest = best["1.5B"]
    report = {
        "llmforge": __version__,
        "tensorrt_rtx": tensorrt_rtx.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "builds": {
            name: sorted(each, key=lambda run: run["seconds"]) for name, each in runs.items()
        },
        "estimate_8B_not_run": {
            "weights_bytes": WEIGHTS_8B,
            "seconds": round(largest["seconds"] * WEIGHTS_8B / largest["weights_bytes"]),
            "peak_bytes": int(largest["peak_by_weights"] * WEIGHTS_8B),
            "engine_bytes": int(largest["engine_by_weights"] * WEIGHTS_8B),
        },
    }
    text = json.dumps(report, indent=2) + "\n"
    print(text, end="")
    if output is not None:
        output.write_text(text)


if __name__ == "__main__":
    main()
