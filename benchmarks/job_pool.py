"""Jobs of a measurement that has little time: processes, each on cores of its own, the most wanted
first, and what each has found kept from the moment that it is known.

A job is `[*command, part, name]`. It tells what it has found by `report`, and, before it measures
how long something takes, has all others stopped by `alone`. Results are merged into those of
earlier measurements, PART by PART and NAME by NAME, so that what is not run again stays.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from llmforge.replacing import replace_file

TICK = 0.2
LAST_WORDS = 3000  # characters of a failed job's log


@dataclass(frozen=True)
class Job:
    """cores: on which it runs, and nothing else does. seconds: after which it is ended; while it
    is stopped for another's sake does not count."""

    part: str
    name: str
    cores: int
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.part}.{self.name}"


# -- within a job ----------------------------------------------------------------------------------


def report(scratch: Path, label: str, found: Any) -> None:
    """What a job has found so far, in place of what it told before."""
    replace_file(scratch / f"{label}.json", json.dumps(found).encode())


@contextlib.contextmanager
def alone(scratch: Path, label: str) -> Iterator[None]:
    """Meanwhile no other job of the pool runs, and this one on all cores."""
    asked, granted = scratch / f"{label}.asks", scratch / f"{label}.alone"
    asked.touch()
    while not granted.exists():
        time.sleep(TICK / 4)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)
        asked.unlink()
        while granted.exists():
            time.sleep(TICK / 4)


# -- the pool --------------------------------------------------------------------------------------


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    cores: list[int]
    ends: float


@dataclass
class Pool:
    """command: of a job, its part and name are appended. scratch: where jobs write; logs: where
    their output goes. results: of earlier measurements, added to; written to `path` whenever they
    change."""

    command: Sequence[str]
    scratch: Path
    logs: Path
    path: Path
    results: dict[str, Any]
    _running: dict[Job, _Running] = field(default_factory=dict)
    _seen: dict[str, str] = field(default_factory=dict)
    _before: dict[str, Any] = field(default_factory=dict)  # of jobs that are run again

    def run(self, jobs: Sequence[Job], seconds: float) -> None:
        """Run the jobs, the first ones first; what is not done after so many seconds is ended."""
        end = time.monotonic() + seconds
        waiting, free = list(jobs), sorted(os.sched_getaffinity(0))
        for key in ("parts", "errors", "seconds"):
            self.results.setdefault(key, {})
        try:
            while (waiting or self._running) and time.monotonic() < end:
                for job in list(waiting):
                    # A job that wants more cores than there are gets all.
                    most = len(free) + sum(len(r.cores) for r in self._running.values())
                    if (count := min(job.cores, most)) <= len(free):
                        self._start(job, [free.pop(0) for _ in range(count)])
                        waiting.remove(job)
                free += self._ended()
                self._let_one_be_alone()
                self._collect()
                time.sleep(TICK)
        finally:
            for job in tuple(self._running):
                self._end(job)
                self._fail(job, f"not done after {seconds:.0f} s of all jobs")
            self._write()

    def _start(self, job: Job, cores: list[int]) -> None:
        with open(self.logs / f"{job.label}.log", "wb") as log:
            process = subprocess.Popen(
                [*self.command, job.part, job.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        self._running[job] = _Running(process, cores, time.monotonic() + job.seconds)

    def _ended(self) -> list[int]:
        """The cores of the jobs that are over."""
        cores: list[int] = []
        for job, running in tuple(self._running.items()):
            late = time.monotonic() > running.ends
            if running.process.poll() is None and not late:
                continue
            self._end(job)
            cores += running.cores
            if late or running.process.returncode:
                log = (self.logs / f"{job.label}.log").read_text(errors="replace")
                why = f"more than {job.seconds:.0f} s: " if late else ""
                self._fail(job, why + log[-LAST_WORDS:])
            else:
                self.results["errors"].pop(job.label, None)
        return cores

    def _end(self, job: Job) -> None:
        running = self._running.pop(job)
        for process in reversed(_tree(running.process.pid)):
            with contextlib.suppress(psutil.Error):
                process.kill()
        running.process.wait()
        taken = time.monotonic() - running.ends + job.seconds
        self.results["seconds"][job.label] = round(taken, 1)
        for name in ("asks", "alone"):
            (self.scratch / f"{job.label}.{name}").unlink(missing_ok=True)

    def _fail(self, job: Job, why: str) -> None:
        """What it told stays, unless an earlier measurement came as far."""
        self._collect()
        self.results["errors"][job.label] = why
        found = self.results["parts"].get(job.part, {})
        if len(before := self._before.get(job.label, {})) >= len(found.get(job.name, {})) > 0:
            found[job.name] = before
        self._write()

    def _let_one_be_alone(self) -> None:
        """Where a job asks for it: the others are stopped until it is over or asks no more."""
        for job, running in tuple(self._running.items()):
            asks, alone = (self.scratch / f"{job.label}.{name}" for name in ("asks", "alone"))
            if not asks.exists():
                continue
            began = time.monotonic()
            others = [r for j, r in self._running.items() if j is not job]
            stopped = [p for other in others for p in _tree(other.process.pid)]
            _each(stopped, "suspend")
            alone.touch()
            while asks.exists() and running.process.poll() is None:
                if time.monotonic() > running.ends:
                    break
                self._collect()
                time.sleep(TICK / 4)
            _each(stopped, "resume")
            alone.unlink(missing_ok=True)
            for other in others:
                other.ends += time.monotonic() - began

    def _collect(self) -> None:
        """Take over what jobs have told, and write it down."""
        changed = False
        for path in self.scratch.glob("*.json"):
            text = path.read_text()
            if (seen := self._seen.get(path.name)) == text:
                continue
            self._seen[path.name], changed = text, True
            part, name = path.stem.split(".", 1)
            found = self.results["parts"].setdefault(part, {})
            if seen is None and name in found:
                self._before[path.stem] = found[name]
            found[name] = json.loads(text)
        if changed:
            self._write()

    def _write(self) -> None:
        replace_file(self.path, (json.dumps(self.results, indent=1) + "\n").encode())


def _tree(pid: int) -> list[psutil.Process]:
    """A process and those that it has started, and theirs."""
    try:
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    except psutil.Error:
        return []


def _each(processes: Sequence[psutil.Process], action: str) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            getattr(process, action)()
