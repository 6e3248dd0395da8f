"""Ranks on GPUs of their own beside one: decode latency at real shapes, all-reduces by themselves.

    mpirun -n 2 python benchmarks/cuda_ranks.py [--batch-size 1] [--json FILE]

The model's weights are drawn on the GPUs, bfloat16, and divided among the ranks (tensor parallel),
which exchange in memory that they share, then by NCCL; last, the model on the GPU of rank 0 alone.
Figures as in cuda_speed.py: TPOT through `Session` and `follow`, the device time of a decode step
in the middle of the generation, and the floor: what one GPU must read, divided among the ranks.
All-reduces of a step's rows, with residual and norm: two for each layer in a CUDA graph, in one
shot and in two, beside NCCL's gather with our sum, and NCCL's own all-reduce (the sum alone).
"""

from __future__ import annotations

import statistics
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed
from cuda_speed import (
    MODELS,
    REPEAT,
    bytes_read,
    decode_step,
    load,
    machine,
    prepared,
    random_weights,
    read_bandwidth,
    replayed,
    serve,
    write_report,
)

from llmforge.checkpoint.config import ModelConfig
from llmforge.comm import Comm, LocalComm, MpiComm
from llmforge.engine.cuda.executable import SIZES, CudaExecutable
from llmforge.engine.cuda.program import Transfer
from llmforge.engine.cuda.ranks import Ranks, take_device
from llmforge.engine.step import Limits
from llmforge.kernels import collectives
from llmforge.kernels.collectives import GROUP_SLOT, PARTS, TENSOR_RANK, Collective, Group
from llmforge.kernels.compile import DEFAULT_CACHE, compile_kernel
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.exchange import DriverMemory, Peers, SharedRegions, slot_units
from llmforge.kernels.launch import Operand
from llmforge.parallel import Topology
from llmforge.runtime.session import follow

Call = Callable[[int], None]
STEPS = 20


@dataclass(frozen=True)
class TwoShot(Group):
    """Ranks that share the work of every sum."""

    def two_shot(self, row_bytes: int) -> bool:
        return self.direct


class Sums:
    """All-reduces of one rank with the others, of rows of `features` in bfloat16."""

    def __init__(self, comm: Comm, nccl: Ranks, features: int, most: int) -> None:
        """nccl: by which the ranks exchange where they do not share memory."""
        self._comm, self._nccl, self._features = comm, nccl, features
        rows = ("x", "out", "sum", "residual")
        self._tensors = {
            name: torch.randn(most, features, dtype=torch.bfloat16, device="cuda") for name in rows
        }
        self._tensors["weight"] = torch.ones(features, dtype=torch.bfloat16, device="cuda")
        nbytes = 2 * comm.size * self._tensors["x"].nbytes
        self._tensors[PARTS] = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
        units = slot_units(nbytes)
        peers = Peers(tuple(range(comm.size)))
        self._regions = SharedRegions(DriverMemory(), comm, peers, 16 * units, 0)
        self._sizes = Sizes(SIZES)
        self._sizes.set(TENSOR_RANK, comm.rank)
        self._sizes.set(GROUP_SLOT, units)

    def close(self) -> None:
        torch.cuda.synchronize()
        self._regions.close()

    def seconds(self, rows: int, times: int) -> dict[str, float]:
        """Of one of `times` all-reduces of `rows`, by how it is done."""
        self._sizes.set("tokens", rows)
        ranks = self._comm.size
        parts, x = self._tensors[PARTS], self._tensors["x"][:rows]
        summed = self._bound(self._made(Group(ranks, False, rows)))
        transfer = Transfer("gather", self._operand("x"))

        def gathered(stream: int) -> None:
            self._nccl.transfer(transfer, x, parts)
            summed(stream)

        calls: dict[str, Call] = {
            "one shot": self._bound(self._made(Group(ranks, True, rows))),
            "two shots": self._bound(self._made(TwoShot(ranks, True, rows))),
            "nccl gather": gathered,
            "nccl all-reduce": lambda stream: torch.distributed.all_reduce(x),
        }
        found = {}
        for name, call in calls.items():
            replay = replayed([call] * times)
            self._comm.barrier()
            found[name] = replay() / times
        return found

    def _made(self, group: Group) -> Collective:
        out, out_sum, x, residual = map(self._operand, ("out", "sum", "x", "residual"))
        weight = Operand("weight", (self._features,), "bfloat16", self._features)
        return collectives.all_reduce(
            out, x, group, residual=residual, weight=weight, out_sum=out_sum, eps=1e-5
        )

    def _operand(self, name: str) -> Operand:
        return Operand(name, ("tokens", self._features), "bfloat16", self._features)

    def _bound(self, made: Collective) -> Call:
        major, minor = torch.cuda.get_device_capability()
        spec = made.launch.kernel
        image = compile_kernel(spec, f"sm_{major}{minor}", DEFAULT_CACHE).image
        module = Module(image, spec.entry)
        return BoundLaunch(made.launch, module, self._address, self._sizes, overlap=major >= 9)

    def _address(self, name: str) -> int:
        if name in self._regions.addresses:
            return self._regions.addresses[name]
        return self._tensors[name].data_ptr()


def timed_serve(
    executable: CudaExecutable, comm: Comm, vocab: int, shape: tuple[int, int, int]
) -> float:
    """Seconds to serve a static batch on all ranks; shape: requests, tokens in and out."""
    if comm.rank == 0:
        return serve(executable, vocab, *shape, comm)
    follow(executable, comm)
    return 0.0


def case(
    executable: CudaExecutable, comm: Comm, vocab: int, shape: tuple[int, int, int]
) -> dict[str, float]:
    """The times of one static batch. All ranks call it."""
    batch, input_len, output_len = shape
    timed_serve(executable, comm, vocab, (batch, input_len, 8))
    first, whole = (
        statistics.median(
            timed_serve(executable, comm, vocab, (batch, input_len, count)) for _ in range(REPEAT)
        )
        for count in (1, output_len)
    )
    step = decode_step(batch, input_len + output_len // 2, executable.limits.block_size)
    comm.barrier()
    return {
        "first_token_ms": first * 1e3,
        "tpot_ms": (whole - first) / (output_len - 1) * 1e3,
        "device_step_ms": executable.time_decode(step, STEPS) * 1e3,
    }


def cases(
    config: ModelConfig,
    comm: Comm,
    ranks: Ranks | None,
    batches: Sequence[int],
    lengths: tuple[int, int],
) -> list[dict[str, Any]]:
    """Of a model on the ranks of `comm`, for each batch size."""
    most, total = max(batches), sum(lengths)
    limits = Limits(most, total, max(2048, most * lengths[0]), 32, most * -(-total // 32))
    graph = prepared(config, Topology(comm.size), comm.rank)
    executable = load(graph, random_weights(graph), limits, ranks=ranks)
    found = []
    for batch in batches:
        times = case(executable, comm, config.vocab_size, (batch, *lengths))
        kv_len = lengths[0] + lengths[1] // 2
        nbytes = bytes_read(prepared(config), config, kv_len, batch) / comm.size
        found.append({"ranks": comm.size, "batch": batch, **times, "floor_bytes": nbytes})
    executable.close()
    return found


def show(row: dict[str, Any]) -> None:
    shown = (f"{k} {v:.4f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
    click.echo("  ".join(shown))


def measure(
    comm: Comm, name: str, batches: Sequence[int], lengths: tuple[int, int]
) -> dict[str, Any]:
    """Everything, on rank 0; it prints as it goes."""
    device, config = take_device(comm), MODELS[name]
    bandwidth = min(comm.gather(read_bandwidth()))
    torch.cuda.empty_cache()
    gpus = len(set(comm.gather(str(torch.cuda.get_device_properties(device).uuid))))
    found: list[dict[str, Any]] = []
    reduced: list[dict[str, Any]] = []

    def add(rows: Sequence[dict[str, Any]], exchange: str) -> None:
        for row in rows:
            floor = row.pop("floor_bytes") / bandwidth * 1e3
            row |= {"floor_ms": floor, "tpot_over_floor": row["tpot_ms"] / floor}
            found.append({"model": name, "exchange": exchange, **row})
            if comm.rank == 0:
                show(found[-1])

    if comm.rank == 0:
        click.echo(
            f"{torch.cuda.get_device_name()}: {gpus} of them read {bandwidth / 1e12:.2f} TB/s"
        )
    if comm.size > 1:
        shared = Ranks(comm, Topology(comm.size), device)
        add(cases(config, comm, shared, batches, lengths), "shared memory")
    if gpus == comm.size > 1:
        nccl = Ranks(comm, Topology(comm.size), device, shared=False)
        sums = Sums(comm, nccl, config.hidden_size, max(batches))
        for rows in batches:
            times = sums.seconds(rows, 2 * config.num_layers)
            reduced.append({"rows": rows, **{k: v * 1e6 for k, v in times.items()}})
            if comm.rank == 0:
                show(reduced[-1])
        sums.close()
        add(cases(config, comm, nccl, batches, lengths), "nccl")
    if comm.rank == 0:
        add(cases(config, LocalComm(), None, batches, lengths), "none")
    comm.barrier()
    return {
        **machine(),
        "gpus": gpus,
        "read_bandwidth_tb_per_s": bandwidth / 1e12,
        "cases": found,
        "all_reduce_us": reduced,
    }


@click.command(help=__doc__)
@click.option("--model", default="llama-3.1-8b", show_default=True)
@click.option("--batch-size", "batches", multiple=True, default=(1, 8, 32, 128), show_default=True)
@click.option("--input-len", default=128, show_default=True)
@click.option("--output-len", default=256, show_default=True)
@click.option("--json", "output", type=Path)
def main(
    model: str, batches: tuple[int, ...], input_len: int, output_len: int, output: Path | None
) -> None:
    comm = MpiComm.world()
    try:
        report = measure(comm, model, batches, (input_len, output_len))
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        comm.abort(1)
    if output and comm.rank == 0:
        write_report(output, report)


if __name__ == "__main__":
    main()
