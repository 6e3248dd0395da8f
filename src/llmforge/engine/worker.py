"""The process that `apart.py` starts: compiles the rank that its standard input describes, and says
how it goes in lines of JSON to the file descriptor that is its argument."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from typing import Any

from llmforge.checkpoint.store import Checkpoint
from llmforge.engine.apart import RankJob
from llmforge.engine.target import Checksums
from llmforge.engine.target import target as find_target
from llmforge.engine.weights import RankWeights
from llmforge.errors import LlmforgeError

_PR_SET_PDEATHSIG = 1


class _ReportingWeights(RankWeights):
    """Weights that tell the parent how far the target is."""

    def report(self, fraction: float) -> None:
        _say(fraction=round(fraction, 4))


def main() -> None:
    _die_with_parent()
    try:
        _say(checksums=_compile(RankJob.from_json(sys.stdin.read())))
    except (LlmforgeError, OSError) as error:
        _say(error=type(error).__name__, text=str(error))
    except Exception as error:
        traceback.print_exc()
        _say(error="BuildError", text=f"internal error: {type(error).__name__}: {error}")


def _compile(job: RankJob) -> Checksums:
    name = job.settings.target
    assert name is not None
    target = find_target(name).configured(job.settings)
    checkpoint = Checkpoint.open(job.checkpoint)
    weights = _ReportingWeights(checkpoint, job.topology, job.rank)
    return target.compile(job.graph, weights, job.limits, job.out)


def _say(**message: Any) -> None:
    os.write(int(sys.argv[1]), (json.dumps(message) + "\n").encode())


def _die_with_parent() -> None:
    """Have the kernel end this process if its parent is killed (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main()
