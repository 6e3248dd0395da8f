"""The cuda target on this machine's GPU: decode and prefill latency at real shapes, random weights.

    python benchmarks/cuda_speed.py [--model llama-3.1-8b] [--batch-size 1] [--json FILE]

Weights are drawn on the GPU, so no checkpoint of that size is written. Requests go through the same
`Session` that `llmforge run` and `bench` use. Reported for each batch size, medians of three: the
time to the first token of all sequences; TPOT, what each further token of all sequences adds: the
time of a whole generation less that of one token, by the number of tokens between; the device time
of one decode step at the middle of the generation; and the floor: the bytes that a step must read
(weights, and the keys and values of that step) over the bandwidth that a read of a large buffer
reaches in the same run. --peer FILE: what another program gave for the same cases in the same
minutes, as JSON lines with "model", "batch", "in", "out", "ms_per_step" and "first_token_ms";
"peer" and "version" say whose.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from llmforge.checkpoint.config import ModelConfig, RopeConfig  # noqa: E402
from llmforge.comm import Comm, LocalComm  # noqa: E402
from llmforge.engine.cuda.executable import CudaExecutable  # noqa: E402
from llmforge.engine.cuda.ranks import Ranks  # noqa: E402
from llmforge.engine.cuda.state import MEASURED, KernelChoice  # noqa: E402
from llmforge.engine.cuda.target import CudaTarget, engine_kernels  # noqa: E402
from llmforge.engine.step import Limits, StepBatch  # noqa: E402
from llmforge.kernels.compile import (  # noqa: E402
    DEFAULT_CACHE,
    compile_kernel,
    compiler_version,
)
from llmforge.kernels.driver import Module  # noqa: E402
from llmforge.model.decoder import trace  # noqa: E402
from llmforge.model.graph import Graph  # noqa: E402
from llmforge.model.reference import DTYPES  # noqa: E402
from llmforge.parallel import Topology  # noqa: E402
from llmforge.runtime.loading import keep_what_exists  # noqa: E402
from llmforge.runtime.requests import Request  # noqa: E402
from llmforge.runtime.session import Session  # noqa: E402

REPEAT = 3
REPLAYS = 20  # of a graph


def _llama(
    hidden: int, layers: int, heads: int, head_dim: int, mlp: int, tied: bool
) -> ModelConfig:
    return ModelConfig(
        family="llama", dtype="bfloat16", vocab_size=128256, hidden_size=hidden,
        num_layers=layers, num_heads=heads, num_kv_heads=8, head_dim=head_dim,
        intermediate_size=mlp, max_position=131072, norm_eps=1e-5,
        rope=RopeConfig(500000.0, head_dim), tied_embeddings=tied,
        sliding_window=(None,) * layers,
    )  # fmt: skip


MODELS = {
    "llama-3.2-1b": _llama(2048, 16, 32, 64, 8192, True),
    "llama-3.1-8b": _llama(4096, 32, 32, 128, 14336, False),
}


def device_seconds(run: Callable[[], Any], repeat: int) -> float:
    """Seconds of device time that `run` takes on the current stream: the median of `repeat`."""
    times = []
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def read_bandwidth() -> float:
    """Bytes a second that a sum over 8 GB reads: the median of 10."""
    buffer = torch.ones(2 << 30, dtype=torch.float32, device="cuda")
    return buffer.nbytes / device_seconds(buffer.sum, repeat=10)


def random_weights(graph: Graph) -> dict[str, torch.Tensor]:
    """Parameters of order 1 / sqrt(columns), which keep activations of order one."""
    weights = {}
    torch.manual_seed(0)
    for parameter in graph.parameters:
        tensor = torch.empty(parameter.shape, dtype=DTYPES[parameter.dtype], device="cuda")
        is_norm = len(parameter.shape) == 1
        weights[parameter.name] = (
            tensor.fill_(1.0) if is_norm else tensor.normal_(0, tensor.shape[-1] ** -0.5)
        )
    return weights


def prepared(config: ModelConfig, topology: Topology | None = None, rank: int = 0) -> Graph:
    """The graph that the cuda target lowers, of one rank or of one of several."""
    return CudaTarget().prepare(trace(config, topology or Topology(), rank))


def load(
    graph: Graph,
    weights: Mapping[str, torch.Tensor],
    limits: Limits,
    choice: KernelChoice = MEASURED,
    ranks: Ranks | None = None,
) -> CudaExecutable:
    """An executable, its kernels compiled now; of one rank where `ranks` does not say otherwise."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    kernels = engine_kernels(graph, limits, arch, choice)
    with ThreadPoolExecutor() as pool:
        compiled = pool.map(
            lambda spec: compile_kernel(spec, arch, DEFAULT_CACHE), kernels.values()
        )
        modules = {
            key: Module(result.image, kernels[key].entry)
            for key, result in zip(kernels, compiled, strict=True)
        }
    if ranks is None:
        ranks = Ranks(LocalComm(), Topology(), torch.device("cuda", torch.cuda.current_device()))
    executable = CudaExecutable(graph, weights, modules, arch, limits, ranks, choice)
    keep_what_exists()
    return executable


def bytes_read(graph: Graph, config: ModelConfig, kv_len: int, batch: int = 1) -> int:
    """What a decode step must read: all weights, but of the embedding only one row a token, and
    the keys and values of every sequence."""
    weights = sum(math.prod(int(d) for d in p.shape) * 2 for p in graph.parameters)
    if not config.tied_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    kv_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * 2 * kv_len
    return weights + batch * kv_bytes


def serve(
    executable: CudaExecutable,
    vocab: int,
    batch: int,
    input_len: int,
    output_len: int,
    comm: Comm | None = None,
) -> float:
    """Seconds to serve one static batch; on other ranks than 0, `follow` goes with it."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(vocab, size=(batch, input_len)).tolist()
    with Session(executable, comm or LocalComm(), vocab_size=vocab) as session:
        began = time.perf_counter()
        for index, prompt in enumerate(prompts):
            session.add(Request(index, tuple(prompt), output_len, ignore_eos=True))
        while session.has_work:
            session.step()
        return time.perf_counter() - began


def decode_step(batch: int, kv_len: int, block_size: int) -> StepBatch:
    """A decode step with `kv_len` tokens a sequence."""
    blocks = -(-kv_len // block_size)
    ones = np.ones(batch, np.int32)
    return StepBatch(
        token_ids=ones, positions=ones * (kv_len - 1),
        query_starts=np.arange(batch + 1, dtype=np.int32), kv_lens=ones * kv_len,
        block_table=np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks),
        prompt_lens=ones * 128, logit_rows=np.arange(batch, dtype=np.int32),
    )  # fmt: skip


def device_step(executable: CudaExecutable, batch: int, kv_len: int) -> float:
    """Seconds of device time of one decode step with `kv_len` tokens a sequence."""
    step = decode_step(batch, kv_len, executable.limits.block_size)
    return executable.time_decode(step, repeat=REPLAYS)


def replayed(calls: Sequence[Callable[[int], None]]) -> Callable[[], float]:
    """A function that gives the seconds of device time that these calls take, as one CUDA graph:
    the median of some replays."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for call in calls:
            call(stream.cuda_stream)
        stream.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call(stream.cuda_stream)

    def seconds() -> float:
        with torch.cuda.stream(stream):
            return device_seconds(graph.replay, REPLAYS)

    return seconds


def peer_of(
    peers: Sequence[Mapping[str, Any]], figure: str, case: tuple[str, int, int, int]
) -> Mapping[str, Any] | None:
    """A peer's line that has this figure of the same case: model, requests, tokens in and out."""
    keys = ("model", "batch", "in", "out")
    same = (line for line in peers if figure in line and case == tuple(line[k] for k in keys))
    return next(same, None)


def beside(row: Mapping[str, Any], peers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a peer gave for the same case, and ours over it."""
    line = peer_of(peers, "ms_per_step", (row["model"], row["batch"], row["in"], row["out"]))
    if line is None:
        return {}
    return {
        "peer": f"{line['peer']} {line['version']}",
        "peer_tpot_ms": line["ms_per_step"],
        "peer_first_token_ms": line["first_token_ms"],
        "tpot_over_peer": row["tpot_ms"] / line["ms_per_step"],
    }


def read_peers(path: Path | None) -> list[dict[str, Any]]:
    """The lines of a --peer file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path else []


def _shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def bench(
    name: str,
    batches: Sequence[int],
    input_len: int,
    output_len: int,
    bandwidth: float,
    peers: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    config = MODELS[name]
    total = input_len + output_len
    most = max(batches)
    prefill = min(16384, max(2048, most * input_len))  # all prompts in a step or two, as peers do
    limits = Limits(most, total, prefill, 32, most * -(-total // 32))
    graph = prepared(config)
    executable = load(graph, random_weights(graph), limits)
    rows = []
    for batch in batches:
        serve(executable, config.vocab_size, batch, input_len, 8)
        first, whole = (
            statistics.median(
                serve(executable, config.vocab_size, batch, input_len, count) for _ in range(REPEAT)
            )
            for count in (1, output_len)
        )
        tpot = (whole - first) / (output_len - 1)
        middle = input_len + output_len // 2
        floor = bytes_read(graph, config, middle, batch) / bandwidth
        row = {
            "model": name, "batch": batch, "in": input_len, "out": output_len,
            "first_token_ms": first * 1e3, "tpot_ms": tpot * 1e3,
            "device_step_ms": device_step(executable, batch, middle) * 1e3,
            "floor_ms": floor * 1e3, "tpot_over_floor": tpot / floor,
        }  # fmt: skip
        rows.append(row | beside(row, peers))
        click.echo("  ".join(f"{key} {_shown(value)}" for key, value in rows[-1].items()))
    if click.get_current_context().params["profile"]:
        for batch in batches:
            profile(executable, batch, input_len + output_len // 2)
    executable.close()
    return rows


def profile(executable: CudaExecutable, batch: int, kv_len: int) -> None:
    """Print what each kernel of a decode step takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as trace_of:
        device_step(executable, batch, kv_len)
    click.echo(f"batch {batch}")
    for event in sorted(trace_of.key_averages(), key=lambda e: -e.device_time_total)[:6]:
        click.echo(
            f"  {event.key[:60]:60} {event.count:6} x "
            f"{event.device_time_total / event.count:8.2f} us"
        )


def machine() -> dict[str, Any]:
    """What a report says of where it was made."""
    versions = {
        "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda, "nvrtc": compiler_version(),
    }  # fmt: skip
    return {"gpu": torch.cuda.get_device_name(), "versions": versions}


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Keep what a benchmark found as JSON, in a folder that is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")


@click.command(help=__doc__)
@click.option("--model", "models", multiple=True, default=tuple(MODELS), show_default=True)
@click.option("--batch-size", "batches", multiple=True, default=(1, 8, 32, 128), show_default=True)
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=256, show_default=True)
@click.option("--profile/--no-profile", default=False)
@click.option("--peer", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "output", type=Path)
def main(
    models: tuple[str, ...],
    batches: tuple[int, ...],
    input_len: int,
    output_len: int,
    profile: bool,
    peer: Path | None,
    output: Path | None,
) -> None:
    if not torch.cuda.is_available():
        raise click.ClickException("this needs an NVIDIA GPU")
    bandwidth = read_bandwidth()
    click.echo(f"{torch.cuda.get_device_name()}: reads {bandwidth / 1e12:.2f} TB/s")
    cases = []
    for name in models:
        cases += bench(name, batches, input_len, output_len, bandwidth, read_peers(peer))
    if output:
        report = {
            **machine(),
            "read_bandwidth_tb_per_s": bandwidth / 1e12,
            "cases": cases,
        }
        write_report(output, report)


if __name__ == "__main__":
    main()
