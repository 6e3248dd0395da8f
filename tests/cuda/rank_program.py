"""One rank of a job for test_cuda_ranks.py: rank_program.py DEED [ARGUMENTS] [nccl], under mpirun.
What it finds wrong it raises, which ends the job. nccl: as where ranks cannot share memory."""

from __future__ import annotations

import functools
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_models import (
    LIMITS,
    MODELS,
    Driver,
    RandomWeights,
    check_running_ahead,
    compile_into,
    of_dtype,
    poison,
    rank_weights,
    steps,
    tolerance,
)
from exchange_rounds import random_round
from op_meanings import check_instructions

from llmforge.comm import Comm, LocalComm, MpiComm
from llmforge.engine.cpu.target import CpuTarget
from llmforge.engine.cuda import executable
from llmforge.engine.cuda.executable import SIZES
from llmforge.engine.cuda.ranks import Ranks, take_device
from llmforge.engine.cuda.target import CudaTarget
from llmforge.engine.step import Int32, SamplingParams, StepBatch
from llmforge.kernels import collectives
from llmforge.kernels.collectives import GROUP_SLOT, MAIL_SLOT, TENSOR_RANK
from llmforge.kernels.compile import DEFAULT_CACHE, compile_kernel
from llmforge.kernels.driver import BoundLaunch, Module, Sizes
from llmforge.kernels.exchange import DriverMemory, Peers, SharedRegions, slot_units
from llmforge.model.decoder import trace
from llmforge.model.reference import Context
from llmforge.parallel import Topology
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request
from llmforge.runtime.sampling import sample

# -- the kernels by themselves ---------------------------------------------------------------------


class Bench:
    """Launches bound to tensors by name."""

    def __init__(self, comm: Comm, device: torch.device, slot: int) -> None:
        self.comm, self.sizes, self.tensors = comm, Sizes(SIZES), {}
        ring = Peers(
            tuple(range(comm.size)), (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        )
        units = slot_units(slot)
        self.regions = SharedRegions(DriverMemory(), comm, ring, 16 * units, 16 * units)
        for name, value in ((TENSOR_RANK, comm.rank), (GROUP_SLOT, units), (MAIL_SLOT, units)):
            self.sizes.set(name, value)
        major, minor = torch.cuda.get_device_capability(device)
        self.arch, self.overlap = f"sm_{major}{minor}", major >= 9
        self.modules: dict[str, Module] = {}

    def run(self, made: collectives.Collective, rows: int) -> None:
        self.sizes.set("tokens", rows)
        spec = made.launch.kernel
        if spec.key not in self.modules:
            image = compile_kernel(spec, self.arch, DEFAULT_CACHE).image
            self.modules[spec.key] = Module(image, spec.entry)
        bound = BoundLaunch(
            made.launch, self.modules[spec.key], self._address, self.sizes, overlap=self.overlap
        )
        bound(torch.cuda.current_stream().cuda_stream)

    def _address(self, name: str) -> int:
        if name in self.regions.addresses:
            return self.regions.addresses[name]
        return self.tensors[name].data_ptr()

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.cuda()


def collectives_alone(comm: Comm, rounds: int) -> None:
    """Exchanges of random sizes one after another, ranks at different speeds."""
    device = take_device(comm)
    bench, rng = Bench(comm, device, 16 << 20), np.random.default_rng(5)
    for number in range(rounds):
        if rng.integers(comm.size) == comm.rank:
            time.sleep(float(rng.random()) * 0.01)
        else:
            rng.random()
        random_round(bench, rng, seed=1000 * number)
    bench.regions.close()


# -- models ---------------------------------------------------------------------------------------


def loaded(comm: Comm, name: str, dtype: str, topology: Topology, directory: Path):
    """This rank's executable and its graph; on rank 0 also the cpu target's of one rank."""
    config = of_dtype(MODELS[name], dtype)
    target = CudaTarget()
    graph = target.prepare(trace(config, topology, comm.rank))
    weights = rank_weights(config, 3, topology, comm.rank)
    out = compile_into(target, graph, weights, LIMITS, directory / f"rank{comm.rank}")
    cuda = target.load(out, topology, LIMITS, comm)
    if comm.rank != 0:
        return config, graph, cuda, None
    whole = CpuTarget().prepare(trace(config, Topology(), 0))
    out = compile_into(CpuTarget(), whole, RandomWeights(config, 3), LIMITS, directory / "cpu")
    return config, graph, cuda, CpuTarget().load(out, Topology(), LIMITS, LocalComm())


def same_logits(comm: Comm, name: str, dtype: str, topology: Topology) -> None:
    """The logits of one rank on the cpu, and the same bits when run again."""
    with tempfile.TemporaryDirectory() as directory:
        config, _, cuda, cpu = loaded(comm, name, dtype, topology, Path(directory))
        results = []
        for _ in range(2):
            driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
            for number, batch in enumerate(steps(driver, decode_steps=4)):
                poison(cuda)
                result = cuda.step(batch)
                if comm.rank == 0:
                    results.append((number, batch, result.logits))
        if cpu is not None:
            half = len(results) // 2
            for (_, batch, got), (_, _, again) in zip(results, results[half:], strict=False):
                assert np.array_equal(got, again), (name, dtype, "another result")
                expected = cpu.step(batch).logits
                worst, bound = np.abs(got - expected).max(), tolerance(config, expected)
                assert np.isfinite(got).all() and worst <= bound, (name, dtype, worst, bound)
        cuda.close()


def same_tokens(comm: Comm, name: str, topology: Topology) -> None:
    """Greedy tokens in float32 of one rank on the cpu."""
    with tempfile.TemporaryDirectory() as directory:
        config, _, cuda, cpu = loaded(comm, name, "float32", topology, Path(directory))
        driver = Driver(LIMITS, config.vocab_size, seed=2, prompts=(40, 7, 21))
        chunks = [40, 7, 21]
        for _ in range(8):
            batch = driver.batch(chunks, SamplingParams())
            tokens = cuda.step(batch).tokens
            expected = None
            if cpu is not None:
                expected = sample(cpu.step(batch).logits, batch.sampling).tolist()
                assert tokens.tolist() == expected, (name, topology)
            driver.append(comm.broadcast(expected), [0, 1, 2])
            chunks = [1, 1, 1]
        cuda.close()


def every_instruction(comm: Comm, name: str, dtype: str, topology: Topology) -> None:
    """Each instruction of this rank beside the ops' meanings, whose collectives go by MPI. All
    ranks stop at the same ones: they meet in some."""
    config = of_dtype(MODELS[name], dtype)
    with tempfile.TemporaryDirectory() as directory:
        config, _, cuda, _ = loaded(comm, name, dtype, topology, Path(directory))
        stage = comm.split(topology.stage(comm.rank))
        for prompts in ((1, 1, 1), (19, 1, 40)):
            batch = Driver(LIMITS, config.vocab_size, 3, prompts).batch(list(prompts))
            sizes = {"tokens": batch.num_tokens, "rows": 3}
            context = Context(comm, stage, sizes)
            check_instructions(cuda, batch, context)
        cuda.close()


def ahead_tokens(comm: Comm, name: str, topology: Topology) -> None:
    """Running ahead or not, the tokens in float32 of one rank on the cpu."""
    with tempfile.TemporaryDirectory() as directory:
        config, _, cuda, cpu = loaded(comm, name, "float32", topology, Path(directory))
        got = check_running_ahead(cuda, config.vocab_size, 8, comm=comm)
        if cpu is not None:
            assert got == check_running_ahead(cpu, config.vocab_size, 8), (name, topology)
        cuda.close()


class _Dying:
    """A rank that ends where its fifth step should begin."""

    def __init__(self, executable: Any) -> None:
        self.limits, self.step, self._executable = executable.limits, executable.step, executable
        self._steps = 0

    def begin(self, batch: StepBatch) -> Callable[[], Int32]:
        self._steps += 1
        if self._steps == 5:
            os._exit(3)
        return self._executable.begin(batch)


def one_dies(comm: Comm) -> None:
    """Rank 1 ends in the middle of a step: rank 0 waits in a kernel, and must not for ever."""
    with tempfile.TemporaryDirectory() as directory:
        _, _, cuda, _ = loaded(comm, "llama", "float32", Topology(2), Path(directory))
        if comm.rank == 1:
            follow(_Dying(cuda), comm)
        else:
            generate(cuda, comm, [Request(0, (1, 2, 3), 20)], vocab_size=300)
        raise AssertionError("steps without rank 1 are not over")


def main() -> None:
    deed, *arguments = sys.argv[1:]
    if arguments[-1:] == ["nccl"]:
        arguments.pop()
        executable.Ranks = functools.partial(Ranks, shared=False)
    comm = MpiComm.world()
    try:
        if deed == "collectives":
            collectives_alone(comm, int(arguments[0]))
        elif deed == "dies":
            one_dies(comm)
        else:
            layout = Topology(*map(int, arguments[0].split(",")))
            deeds = {"logits": same_logits, "instructions": every_instruction}
            for name in arguments[1:]:
                started = time.monotonic()
                if deed in ("tokens", "ahead"):
                    {"tokens": same_tokens, "ahead": ahead_tokens}[deed](comm, name, layout)
                else:
                    # Experts are chosen anew after every rounding, so logits may differ by more.
                    exact = deed == "logits" and MODELS[name].moe is not None
                    for dtype in ("float32",) if exact else ("float32", "bfloat16"):
                        deeds[deed](comm, name, dtype, layout)
                if comm.rank == 0:
                    print(f"{deed} {layout} {name}: {time.monotonic() - started:.1f} s", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        comm.abort(1)


if __name__ == "__main__":
    main()
