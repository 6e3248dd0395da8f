"""Loading an engine, to serve from it until the process ends."""

from __future__ import annotations

import gc

from llmforge.comm import Comm
from llmforge.engine.store import Engine
from llmforge.engine.target import Executable, target


def load_executable(engine: Engine, comm: Comm) -> Executable:
    """This rank's part of an engine, ready. For the errors see `Target.load`."""
    executable = target(engine.target).load(
        engine.rank_directory(comm.rank), engine.topology, engine.limits, comm
    )
    keep_what_exists()
    return executable


def keep_what_exists() -> None:
    """Take all that exists now out of the garbage collector's sight: going through the modules of
    torch while requests are served holds up a step or more."""
    gc.collect()
    gc.freeze()
