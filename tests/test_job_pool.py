"""benchmarks/job_pool.py: jobs that are late, fail, or want to be alone."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

from job_pool import Job, Pool  # noqa: E402

# A job's part says what it does.
PROGRAM = f"""
import subprocess, sys, time
from pathlib import Path
sys.path.append({str(BENCHMARKS)!r})
from job_pool import alone, report
scratch, part, name = Path(sys.argv[1]), *sys.argv[2:]
label = f"{{part}}.{{name}}"
report(scratch, label, {{"began": True}})
if part == "sleeps":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    report(scratch, label, {{"child": child.pid}})
    time.sleep(60)
elif part == "fails":
    raise SystemExit("this went wrong")
elif part == "ticks":
    path = scratch / "ticks"
    while True:
        path.write_text(str(time.time()))
        time.sleep(0.01)
elif part == "alone":
    time.sleep(0.3)
    with alone(scratch, label):
        before = float((scratch / "ticks").read_text())
        time.sleep(0.4)
        after = float((scratch / "ticks").read_text())
    report(scratch, label, {{"ticked": after - before}})
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a pool with results of earlier measurements, on two cores that this machine may not
    have."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr("os.sched_setaffinity", lambda pid, cores: None)
    (tmp_path / "logs").mkdir()

    def make(results: dict[str, Any] | None = None) -> Pool:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        path = tmp_path / "out" / "results"
        path.parent.mkdir(exist_ok=True)
        return Pool(command, tmp_path, tmp_path / "logs", path, results or {})

    return make


def written(pool: Pool) -> Any:
    return json.loads(pool.path.read_text())


def test_a_job_that_is_late_is_ended_with_what_it_started(pool: Any) -> None:
    running = pool()
    running.run([Job("sleeps", "a", 1, 2.0)], 30)
    child = written(running)["parts"]["sleeps"]["a"]["child"]
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == "zombie"
    assert "more than 2 s" in written(running)["errors"]["sleeps.a"]


def test_all_are_ended_when_the_time_is_over_and_what_they_told_is_kept(pool: Any) -> None:
    running, started = pool(), time.monotonic()
    running.run([Job("sleeps", "a", 2, 60), Job("sleeps", "b", 2, 60)], 2.0)
    assert time.monotonic() - started < 20
    assert "child" in written(running)["parts"]["sleeps"]["a"]
    errors = written(running)["errors"]
    assert errors.keys() == {"sleeps.a"} and "2 s of all jobs" in errors["sleeps.a"]


def test_results_add_to_earlier_ones_and_errors_go_when_it_works(pool: Any) -> None:
    earlier = {
        "notes": "kept",
        "parts": {"works": {"a": 1, "b": 2}},
        "errors": {"works.a": "failed then"},
    }
    running = pool(earlier)
    running.run([Job("works", "a", 1, 30), Job("fails", "a", 1, 30)], 60)
    results = written(running)
    assert results["notes"] == "kept"
    assert results["parts"]["works"] == {"a": {"began": True}, "b": 2}
    assert results["errors"].keys() == {"fails.a"}
    assert "this went wrong" in results["errors"]["fails.a"]


def test_what_was_found_before_stays_where_a_job_does_not_come_as_far(pool: Any) -> None:
    far, less = {"began": True, "same": True}, {}
    running = pool({"parts": {"fails": {"far": far, "less": less}}})
    running.run([Job("fails", "far", 1, 30), Job("fails", "less", 1, 30)], 60)
    assert written(running)["parts"]["fails"] == {"far": far, "less": {"began": True}}
    assert written(running)["errors"].keys() == {"fails.far", "fails.less"}


def test_others_are_stopped_while_a_job_is_alone(pool: Any) -> None:
    running = pool()
    running.run([Job("ticks", "a", 1, 6.0), Job("alone", "a", 1, 30)], 30)
    results = written(running)
    assert results["parts"]["alone"]["a"] == {"ticked": 0.0}
    assert "alone.a" not in results["errors"]
