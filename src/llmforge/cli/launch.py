"""Whether this process is a rank of a job, from the environment alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

# What launchers set for each rank: the job's size and the process's rank. Open MPI; MPICH, Intel
# MPI and others with Hydra; a Slurm step.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


class Job(NamedTuple):  # not a dataclass: `llmforge --help` loads this file
    """The job that this process is a rank of. `size` is None where only MPI can tell."""

    rank: int
    size: int | None


def current_job(environ: Mapping[str, str] | None = None) -> Job | None:
    """The job, or None for a process that no MPI launcher started."""
    environ = os.environ if environ is None else environ
    for size_name, rank_name in _LAUNCHERS:
        size, rank = environ.get(size_name, ""), environ.get(rank_name, "")
        if not (size.isdecimal() and rank.isdecimal()):
            continue
        if size_name.startswith("SLURM") and size == "1":
            continue  # an interactive shell under Slurm looks like a step of one task
        return Job(int(rank), int(size))
    rank = environ.get("PMIX_RANK", "")
    return Job(int(rank), None) if rank.isdecimal() else None


def is_speaker() -> bool:
    """Whether this process is the one that prints: the only one, or rank 0 of its job."""
    job = current_job()
    return job is None or job.rank == 0
