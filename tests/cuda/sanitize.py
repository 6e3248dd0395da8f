"""compute-sanitizer over the cuda target's kernels: sanitize.py [TOOL]...

Once without it, which compiles what is to be watched; then all at once: memcheck over steps of
models of every kind and over exchanges of two ranks, racecheck, synccheck and initcheck over steps
of a few. Prints what they found; the exit status is 1 where that is anything.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmforge.cli.ranks import find_mpirun

HERE = Path(__file__).parent
STEPS, RANKS = str(HERE / "sanitized_steps.py"), str(HERE / "rank_program.py")
LIMIT = 240  # seconds, for each
FOUND = 99  # the exit status where a tool found something
PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")
OPTIONS = {
    # Calls of the API that fail are how libraries find out what a driver can do.
    "memcheck": ("--report-api-errors", "no"),
    # Of a block, which has a ring of them for every warp: more than the tool expects.
    "synccheck": ("--num-cuda-barriers", "256"),
}
# The driver says this where its debugging interface is shut, as in containers under gVisor.
UNFIT = "Device not supported"


def find_sanitizer() -> str | None:
    return shutil.which("compute-sanitizer", path=os.pathsep.join((os.environ["PATH"], *PLACES)))


def jobs(sanitizer: str) -> dict[str, list[str]]:
    """The commands, by what is said of them."""

    def under(tool: str) -> list[str]:
        options = ["--error-exitcode", str(FOUND), "--print-limit", "10", *OPTIONS.get(tool, ())]
        return [sanitizer, "--tool", tool, *options, sys.executable]

    found = {"memcheck": [*under("memcheck"), STEPS, "all"]}
    for tool in ("racecheck", "synccheck", "initcheck"):
        found[tool] = [*under(tool), STEPS, "few"]
    if mpirun := find_mpirun():
        start = [mpirun, "-n", "2", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
        found["memcheck of two ranks"] = [*start, *under("memcheck"), RANKS, "collectives", "6"]
    return found


def run(command: Sequence[str]) -> tuple[int, str, float]:
    """The exit status, what was printed, and seconds."""
    began, environment = time.monotonic(), dict(os.environ)
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    late = ""
    try:
        output, _ = job.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGTERM)
        output, _ = job.communicate()
        late = f"\nnot done after {LIMIT} s"
    return job.returncode, output.decode(errors="replace") + late, time.monotonic() - began


def main(tools: Sequence[str]) -> int:
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer is not installed; it comes with the CUDA toolkit")
        return 1
    wanted = {name: job for name, job in jobs(sanitizer).items() if not tools or name in tools}
    status, output, seconds = run([sys.executable, STEPS, "all"])
    print(f"without a tool, {seconds:.0f} s: {output if status else 'runs'}", flush=True)
    if status:
        return 1
    clean = True
    with ThreadPoolExecutor() as pool:
        results = pool.map(run, wanted.values())
        for name, (status, output, seconds) in zip(wanted, results, strict=True):
            if UNFIT in output:
                print(f"{name}: the driver does not let compute-sanitizer watch this GPU here")
            print(f"{name}, {seconds:.0f} s: {f'status {status}' if status else 'clean'}")
            if status:
                print(output)
            sys.stdout.flush()
            clean &= status == 0
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
