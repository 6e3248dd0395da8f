"""Serving on this machine's GPU: how long an engine takes to start, and requests in flight.

    python benchmarks/cuda_serving.py [--model llama-3.1-8b] [--peer FILE] [--json FILE]

start: the rank's directory as `llmforge build` writes it, with random weights, in the page cache; a
new process imports the cuda target, loads the directory and draws a token. in flight: all requests
submitted at once, continuous batching until the last is done; the floor of a decode step at the
middle of the generation beside it. --peer: what another program gave for the same requests in the
same minutes, as JSON lines with "model", "batch", "in", "out" and "out_tok_s"; "peer" and "version"
say whose.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from cuda_speed import (
    MODELS,
    bytes_read,
    load,
    machine,
    peer_of,
    prepared,
    random_weights,
    read_bandwidth,
    read_peers,
    write_report,
)

from llmforge.comm import LocalComm
from llmforge.engine.cuda.target import CudaTarget
from llmforge.engine.step import Limits
from llmforge.model.graph import Graph, Parameter
from llmforge.parallel import Topology
from llmforge.runtime.bench import bench
from llmforge.runtime.requests import Request
from llmforge.runtime.session import Session
from llmforge.settings import BenchSettings

START_LIMITS = Limits(128, 2048, 2048, 32, 4096)


class GpuWeights:
    """Random weights for `CudaTarget.compile`."""

    def __init__(self, graph: Graph) -> None:
        self._weights = random_weights(graph)

    def read(self, parameter: Parameter) -> np.ndarray[Any, Any]:
        import ml_dtypes

        tensor = self._weights.pop(parameter.name).cpu()
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def start(name: str, scratch: Path) -> dict[str, float]:
    """Write a rank's directory, and start it in a process of its own."""
    directory = Path(tempfile.mkdtemp(dir=scratch))
    try:
        graph = prepared(MODELS[name])
        CudaTarget().compile(graph, GpuWeights(graph), START_LIMITS, directory)  # type: ignore[arg-type]
        torch.cuda.empty_cache()
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--started", str(directory)], check=True, capture_output=True
        )
        found: dict[str, float] = json.loads(done.stdout)
        return {"process_s": time.perf_counter() - began, **found}
    finally:
        shutil.rmtree(directory)


def started(directory: Path) -> dict[str, float]:
    """In the new process: seconds to load the directory, and from then to the first token."""
    began = time.perf_counter()
    executable = CudaTarget().load(directory, Topology(), START_LIMITS, LocalComm())
    loaded = time.perf_counter()
    with Session(executable, LocalComm(), vocab_size=1000) as session:
        session.add(Request(0, tuple(range(1, 129)), 1, ignore_eos=True))
        while session.has_work:
            session.step()
    return {"load_s": loaded - began, "first_token_s": time.perf_counter() - loaded}


def in_flight(
    name: str, requests: int, input_len: int, output_len: int, bandwidth: float
) -> dict[str, Any]:
    """Output tokens a second, and the floor of a decode step of all requests."""
    config = MODELS[name]
    graph = prepared(config)
    total = input_len + output_len
    limits = Limits(requests, total, max(8192, requests), 32, requests * -(-total // 32))
    executable = load(graph, random_weights(graph), limits)
    warm = BenchSettings(input_len=input_len, output_len=4, num_requests=8, warmup=0)
    settings = BenchSettings(
        input_len=input_len, output_len=output_len, num_requests=requests, warmup=0
    )
    for each in (warm, settings):
        report = bench(
            executable, LocalComm(), each,
            vocab_size=config.vocab_size, engine_digest="", environment={},
        )  # fmt: skip
    executable.close()
    assert report.throughput is not None
    floor = bytes_read(graph, config, input_len + output_len // 2, requests) / bandwidth
    return {
        "model": name,
        **report.throughput.to_dict(),
        "decode_floor_ms": floor * 1e3,
        "decode_floor_tokens_per_s": requests / floor,
    }


def beside(case: dict[str, Any], peers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The peer's figure for the same requests, and ours over it."""
    asked = (case["model"], case["num_requests"], case["input_len"], case["output_len"])
    line = peer_of(peers, "out_tok_s", asked)
    if line is None:
        return {}
    return {
        "peer": f"{line['peer']} {line['version']}",
        "peer_output_tokens_per_s": line["out_tok_s"],
        "ours_over_peer": case["output_tokens_per_s"] / line["out_tok_s"],
    }


@click.command(help=__doc__)
@click.option("--model", type=click.Choice(list(MODELS)), default="llama-3.1-8b", show_default=True)
@click.option("--requests", default=256, show_default=True)
@click.option("--input-len", default=1024, show_default=True)
@click.option("--output-len", default=1024, show_default=True)
@click.option("--scratch", type=Path, default=tempfile.gettempdir(), show_default=True)
@click.option("--peer", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "output", type=Path)
@click.option("--started", "directory", type=Path, hidden=True)
def main(
    model: str,
    requests: int,
    input_len: int,
    output_len: int,
    scratch: Path,
    peer: Path | None,
    output: Path | None,
    directory: Path | None,
) -> None:
    if directory is not None:
        click.echo(json.dumps(started(directory)))
        return
    if not torch.cuda.is_available():
        raise click.ClickException("this needs an NVIDIA GPU")
    began = start(model, scratch)
    click.echo(f"{model}: " + ", ".join(f"{k} {v:.2f}" for k, v in began.items()))
    bandwidth = read_bandwidth()
    torch.cuda.empty_cache()
    case = in_flight(model, requests, input_len, output_len, bandwidth)
    case |= beside(case, read_peers(peer))
    click.echo(json.dumps(case, indent=2))
    if output:
        report = {
            **machine(),
            "read_bandwidth_tb_per_s": bandwidth / 1e12,
            "start": {"model": model, **began},
            "in_flight": case,
        }
        write_report(output, report)


if __name__ == "__main__":
    main()
