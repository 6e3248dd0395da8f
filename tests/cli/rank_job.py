"""A small job for test_ranks.py: rank_job.py SIZE DEED, run like a subcommand of llmforge."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from llmforge.cli.errors import guard
from llmforge.cli.launch import is_speaker
from llmforge.cli.ranks import run_ranks
from llmforge.cli.stdin import read_stdin
from llmforge.comm import Comm
from llmforge.errors import RequestError

SIZE, DEED = int(sys.argv[1]), sys.argv[2]


def main() -> int:
    stdin = read_stdin() if DEED == "stdin" and is_speaker() else None
    return run_ranks(SIZE, lambda comm: work(comm, stdin), stdin=stdin)


def work(comm: Comm, stdin: bytes | None) -> int:
    if stdin is not None:
        print(len(stdin), stdin[-1:], flush=True)
    if DEED == "sum":
        print(sum(comm.gather(comm.rank)), flush=True)
    if DEED == "all raise":
        raise RequestError("alike")
    while DEED == "talk":
        print("more", flush=True)
    if DEED == "sleep":
        Path(sys.argv[3], str(os.getpid())).touch()
        time.sleep(60)
    if comm.rank == 0 and DEED == "first raises":
        raise RequestError("bad prompt")
    if comm.rank == 1:
        match DEED:
            case "raise":
                raise RequestError("bad luck")
            case "crash":
                raise ValueError("a bug")
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(5)
    comm.barrier()
    return 0


if __name__ == "__main__":
    raise SystemExit(guard(main))
