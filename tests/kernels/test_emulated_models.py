"""Whole tiny models on emulated GPUs beside the cpu target: steps one after another, ranks that
work together, and the tokens drawn."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_models import (
    LIMITS,
    MODELS,
    SAMPLINGS,
    Driver,
    RandomWeights,
    check_running_ahead,
    check_sampling,
    check_ties,
    compile_into,
    of_dtype,
    poison,
    rank_weights,
    steps,
    tolerance,
    with_equal_logits,
)
from emulation.build import unavailable
from emulation.executable import emulated, emulated_gpu
from thread_comm import run_ranks

from llmforge.comm import Comm, LocalComm
from llmforge.engine.cpu.target import CpuTarget
from llmforge.engine.cuda import executable
from llmforge.engine.cuda.target import CudaTarget
from llmforge.engine.device_sampling import GREEDY, PARAMS
from llmforge.engine.step import SampleRow, SamplingParams
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def cpu_of(config, seed, directory):
    """The cpu target's executable of one rank."""
    graph = CpuTarget().prepare(trace(config, Topology(), 0))
    out = compile_into(CpuTarget(), graph, RandomWeights(config, seed), LIMITS, directory)
    return CpuTarget().load(out, Topology(), LIMITS, LocalComm())


def emulated_rank(config, seed, topology=None, comm=None, arch="sm_90"):
    topology, comm = topology or Topology(), comm or LocalComm()
    graph = CudaTarget().prepare(trace(config, topology, comm.rank))
    weights = rank_weights(config, seed, topology, comm.rank)
    return emulated(graph, weights, LIMITS, arch, comm, topology)


QUICK = (
    ("dynamic-rope", "float32", "1"),
    ("all-biases", "float32", "2"),
    ("wide", "bfloat16", "2"),
    ("llama-tied", "float32", "1,2"),
)
LAYOUTS = ("1", "2", "1,2", "2,2")
CASES = [
    (name, dtype, layout)
    for name in ("all-biases", "wide", "llama-tied", "alibi-parallel", "norms-over-heads",
                 "experts-shared", "sinks-and-limited-experts", "latents")
    for dtype in ("float32", "bfloat16")
    for layout in LAYOUTS
    # Experts are chosen anew after every rounding, so in two-byte types logits may differ by more.
    if dtype == "float32" or MODELS[name].moe is None
]  # fmt: skip
CASES += [("dynamic-rope", "float32", "1"), ("longrope", "float32", "1")]
CASES += [("experts-shared", "float32", "2,1,2"), ("latents", "float32", "2,1,2")]


@pytest.mark.parametrize(
    ("name", "dtype", "layout"),
    [pytest.param(*c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES],
)
def test_logits_of_ranks_are_those_of_one_on_the_cpu(name, dtype, layout, tmp_path):
    config, topology = of_dtype(MODELS[name], dtype), Topology(*map(int, layout.split(",")))

    def work(comm: Comm) -> list:
        cuda = emulated_rank(config, 3, topology, comm)
        driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
        found = []
        for batch in steps(driver, decode_steps=3):
            poison(cuda)
            logits = cuda.step(batch).logits
            # A copy: these lie in the emulated GPU's own memory.
            found.append(None if logits is None else logits.copy())
        cuda.close()
        return found

    with emulated_gpu():
        got = run_ranks(topology.world_size, work)[0]
    cpu = cpu_of(config, 3, tmp_path / "cpu")
    driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 33, 70))
    for batch, logits in zip(steps(driver, decode_steps=3), got, strict=True):
        expected = cpu.step(batch).logits
        bound = tolerance(config, expected)
        worst = np.abs(logits - expected).max()
        assert np.isfinite(logits).all() and worst <= bound, (worst, bound)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_sampling_draws_as_the_runtime_does(sampling):
    config = of_dtype(MODELS["llama"], "bfloat16")
    with emulated_gpu():
        cuda = emulated_rank(config, 4)
        check_sampling(cuda, config.vocab_size, SAMPLINGS[sampling], 6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_running_ahead_gives_the_same_tokens(dtype):
    config = of_dtype(MODELS["llama"], dtype)
    with emulated_gpu():
        cuda = emulated_rank(config, 4)
        check_running_ahead(cuda, config.vocab_size, 6, ends_early=dtype == "float32")


def test_what_runs_beside_waits_for_the_steps_arrays_and_is_waited_for(monkeypatch):
    """By the order of what streams are given: the emulation has no two streams. A kernel may start
    while the one before it runs only where it needs nothing of another stream."""
    bind, overlaps, done = executable.CudaExecutable.bind, {}, []

    def uses(instruction):
        return {o.buffer for o in instruction.operands if not o.buffer.startswith("step.")}

    def record(self, instruction, program, *, overlap=True):
        overlaps[id(instruction)] = overlap
        return bind(self, instruction, program, overlap=overlap)

    monkeypatch.setattr(executable.CudaExecutable, "bind", record)
    with emulated_gpu():
        cuda = emulated_rank(of_dtype(MODELS["llama"], "bfloat16"), 4)
        main, side = (
            SimpleNamespace(cuda_stream=i, wait_stream=lambda _, i=i: done.append(f"{i} waits"))
            for i in range(2)
        )
        monkeypatch.setattr(executable.torch.cuda, "current_stream", lambda: main)
        for runner in (*cuda._general, *cuda._decodes.values()):
            done.clear()
            program, count = runner.program, len(runner.program.instructions)
            beside, joins = program.beside, program.joins
            assert 0 < beside < joins < count
            written = set().union(*map(uses, program.instructions[:beside]))
            assert written & uses(program.instructions[joins])
            assert not any(written & uses(i) for i in program.instructions[beside:joins])
            alone = [i for i in range(count) if not overlaps[id(program.instructions[i])]]
            assert alone == [*range(beside + 1), joins]
            runner._side = side
            runner._fetch = lambda stream: done.append(("fetch", stream))
            runner._calls = [lambda stream, i=i: done.append((i, stream)) for i in range(count)]
            runner._launch_all(stop_after=count - 1)
            assert done == [
                ("fetch", 0),
                "1 waits",
                *((i, 1) for i in range(beside)),
                *((i, 0) for i in range(beside, joins)),
                "0 waits",
                *((i, 0) for i in range(joins, count)),
            ]


def test_steps_have_the_smallest_program_that_fits():
    with emulated_gpu():
        cuda = emulated_rank(MODELS["llama"], 4)
    for count, size in ((1, 1), (2, 2), (3, 4), (4, 4)):
        driver = Driver(LIMITS, 300, seed=1, prompts=(1,) * count)
        batch = driver.batch([1] * count)
        shape = cuda._runner_of(batch).program.shape
        assert shape.decode and shape.tokens == shape.sequences == size
        for rows in (batch.logit_rows[::-1], batch.logit_rows[:-1]):
            other = dataclasses.replace(batch, logit_rows=rows)
            decode = cuda._runner_of(other).program.shape.decode
            assert decode == (count == len(rows) == 1), "all are wanted, in order"


def test_what_fills_up_a_bucket_draws_nothing():
    """Whatever the step before had there: its rows would read histories that are gone."""
    with emulated_gpu():
        cuda = emulated_rank(MODELS["llama"], 4)
        runner, staging = cuda._decodes[4], cuda.memory.next_staging()
        driver = Driver(LIMITS, 300, seed=1, prompts=(5, 9, 8))
        driver.append([1, 2, 3], [0, 1, 2])
        row = SampleRow(SamplingParams(temperature=1.0, top_p=0.5), 6, np.zeros(0, np.int32))
        params = staging.array(runner.program, "sampling", PARAMS)
        for sampling in ((row,) * 3, ()):
            params[:] = 77
            batch = dataclasses.replace(driver.batch([1, 1, 1]), sampling=sampling)
            runner._write(batch, staging)
            assert (params[len(sampling) :] == GREEDY).all()
            assert (params[: len(sampling)] != GREEDY).all(), "these are written before"


def test_the_decode_step_that_is_timed_is_the_one_asked_for():
    """However many run: the graph fetches from two areas in turn."""
    config = of_dtype(MODELS["llama"], "bfloat16")
    driver = Driver(LIMITS, config.vocab_size, seed=1, prompts=(5, 9, 8))
    with emulated_gpu():
        cuda = emulated_rank(config, 4)
        for batch in steps(driver, decode_steps=1):
            wanted = cuda.step(batch).logits.copy()
        other = dataclasses.replace(batch, token_ids=batch.token_ids[::-1].copy())
        for repeat in (1, 2):
            assert not np.array_equal(cuda.step(other).logits, wanted)
            cuda.step(other)
            assert cuda.time_decode(batch, repeat) == 2e-3
            assert np.array_equal(cuda.last_logits(3), wanted)


@pytest.mark.parametrize(
    "layout", ["2", *(pytest.param(other, marks=pytest.mark.slow) for other in ("1,2", "2,2"))]
)
def test_ranks_that_run_ahead_give_the_tokens_of_one(layout):
    config, topology = MODELS["llama"], Topology(*map(int, layout.split(",")))

    def work(comm: Comm) -> list:
        cuda = emulated_rank(config, 4, topology, comm)
        tokens = check_running_ahead(cuda, config.vocab_size, 6, comm=comm)
        cuda.close()
        return tokens

    with emulated_gpu():
        got = run_ranks(topology.world_size, work)[0]
        alone = check_running_ahead(emulated_rank(config, 4), config.vocab_size, 6)
    assert got == alone


@pytest.mark.parametrize(
    "name", [pytest.param("llama"), pytest.param("wide", marks=pytest.mark.slow)]
)
def test_ties_and_equal_logits(name):
    config = of_dtype(MODELS[name], "bfloat16")
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    with emulated_gpu():
        cuda = emulated(graph, with_equal_logits(config), LIMITS)
        check_ties(cuda, config.vocab_size)
