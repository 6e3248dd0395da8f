"""Compiling ranks in processes of their own, several at a time: for targets whose compiler takes
long, cannot be interrupted, and may crash.

The parent starts `worker.py` for each rank. A worker that is told to stop, or whose parent dies, is
gone at once, whatever its compiler is doing.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmforge import errors
from llmforge.artifact import Progress
from llmforge.engine.step import Limits
from llmforge.engine.target import Checksums
from llmforge.errors import BuildError, LlmforgeError
from llmforge.model.graph import Graph
from llmforge.parallel import Topology
from llmforge.settings import BuildSettings


@dataclass(frozen=True)
class RankJob:
    """One rank to compile. graph: prepared. nbytes: of its weights; peak_bytes: the memory that
    compiling takes."""

    checkpoint: Path
    topology: Topology
    rank: int
    graph: Graph
    settings: BuildSettings
    limits: Limits
    out: Path
    nbytes: int
    peak_bytes: int

    def to_json(self) -> str:
        return json.dumps(
            {
                **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)},
                "checkpoint": str(self.checkpoint),
                "topology": dataclasses.asdict(self.topology),
                "graph": self.graph.to_json(),
                "settings": dataclasses.asdict(self.settings),
                "limits": dataclasses.asdict(self.limits),
                "out": str(self.out),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> RankJob:
        values: dict[str, Any] = json.loads(text)
        settings = values["settings"]
        lists = {k: tuple(v) for k, v in settings.items() if isinstance(v, list)}
        return cls(
            **{
                **values,
                "checkpoint": Path(values["checkpoint"]),
                "topology": Topology(**values["topology"]),
                "graph": Graph.from_json(values["graph"]),
                "settings": BuildSettings(**{**settings, **lists}),
                "limits": Limits(**values["limits"]),
                "out": Path(values["out"]),
            }
        )


def compile_apart(jobs: Sequence[RankJob], progress: Progress) -> list[Checksums]:
    """Compile all, as many at a time as memory and cores allow; what each `compile` returned.

    Raises the first worker's error. However this is left, no worker is left running.
    """
    waiting = list(enumerate(jobs))
    running: dict[int, _Worker] = {}
    results: dict[int, Checksums] = {}
    messages: queue.Queue[tuple[int, dict[str, Any]]] = queue.Queue()
    most = at_a_time(jobs, psutil.virtual_memory().available)
    total, done = sum(job.nbytes for job in jobs), dict.fromkeys(range(len(jobs)), 0.0)
    label = "building" if len(jobs) == 1 else f"building {len(jobs)} ranks"
    try:
        while len(results) < len(jobs):
            while waiting and len(running) < most:
                index, job = waiting.pop(0)
                running[index] = _Worker(index, job, messages)
            index, message = messages.get()
            if "error" in message:
                raise _error(message, jobs[index])
            done[index] = message.get("fraction", 1.0)
            if "checksums" in message:
                results[index] = {n: (s, c) for n, (s, c) in message["checksums"].items()}
                running.pop(index).stop()
            read = sum(int(jobs[i].nbytes * share) for i, share in done.items())
            progress(label, total if len(results) == len(jobs) else read, total)
    finally:
        for worker in running.values():
            worker.stop()
    return [results[index] for index in range(len(jobs))]


def at_a_time(jobs: Sequence[RankJob], available: int) -> int:
    """How many of the jobs fit into the memory that is available, and have a core."""
    fitting = available // max(1, *(job.peak_bytes for job in jobs))
    return max(1, min(len(jobs), fitting, len(os.sched_getaffinity(0))))


def _error(message: dict[str, Any], job: RankJob) -> LlmforgeError:
    """The worker's error as it would have been raised here."""
    kind = getattr(errors, message["error"], BuildError)
    where = f"rank {job.rank}: " if job.topology.world_size > 1 else ""
    error: LlmforgeError = kind(f"{where}{message['text']}")
    return error


class _Worker:
    """A process that compiles one rank, and the thread that hears what it says."""

    def __init__(
        self, index: int, job: RankJob, messages: queue.Queue[tuple[int, dict[str, Any]]]
    ) -> None:
        self._index, self._messages = index, messages
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `stop`)
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "llmforge.engine.worker", str(writer)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(writer,),
                start_new_session=True,  # Ctrl-C reaches the parent, which stops its workers
            )
        finally:
            os.close(writer)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(job.to_json().encode())
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died: the thread says so
        self._thread = threading.Thread(target=self._listen, args=(reader,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._thread.join()
        self._log.close()

    def _listen(self, reader: int) -> None:
        ended = False
        with open(reader, encoding="utf-8") as lines:
            for line in lines:
                message = json.loads(line)
                ended = ended or "checksums" in message or "error" in message
                self._messages.put((self._index, message))
        if not ended:
            status = self._process.wait()
            self._messages.put((self._index, {"error": "BuildError", "text": self._death(status)}))

    def _death(self, status: int) -> str:
        self._log.seek(0)
        said = self._log.read().decode(errors="replace").strip().splitlines()
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        hint = ""
        if status == -signal.SIGKILL:
            hint = "; the machine may be out of memory"
        elif status < 0:  # a fault of the package's
            hint = "; another version of its package, or another --target, may build this model"
        last = f"; its last words: {said[-1]}" if said else ""
        return f"the compiler's process was ended {how}{hint}{last}"
