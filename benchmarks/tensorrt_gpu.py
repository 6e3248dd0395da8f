"""Real TensorRT engines on this machine's GPU: the tokens they give, and their speed.

    python benchmarks/tensorrt_gpu.py prepare DATA       (anywhere, with torch and transformers)
    python benchmarks/tensorrt_gpu.py measure DATA OUT   (with TensorRT and a GPU; no torch)

`prepare` writes checkpoints and what the cpu target gives for them. `measure` builds and runs them
in parts, each a process of its own with a time limit, and writes OUT/tensorrt_gpu.json:

    example   examples/drama-3m: float32 tokens equal the cpu target's, float16 logits are close
    tiny      a tiny random model of every architecture: float32 tokens equal the cpu target's
    ranks     the example on two tensor-parallel ranks of one GPU, and on two pipeline stages
    speed     a Llama-3.2-1B-shaped float16 model: build time, size, TPOT beside the floor

All parts run at once, since a build takes one core; `speed` waits for the others to end before it
measures. Build times are therefore those of a busy machine.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# In place of this file's directory.
sys.path[0] = str(ROOT / "src")

from llmforge.checkpoint.config import ModelConfig  # noqa: E402
from llmforge.checkpoint.store import Checkpoint  # noqa: E402
from llmforge.comm import LocalComm  # noqa: E402
from llmforge.engine.build import build  # noqa: E402
from llmforge.engine.step import StepBatch  # noqa: E402
from llmforge.engine.store import Engine  # noqa: E402
from llmforge.engine.target import target  # noqa: E402
from llmforge.runtime.generate import generate  # noqa: E402
from llmforge.runtime.requests import Request  # noqa: E402
from llmforge.runtime.verify import compare_logits  # noqa: E402
from llmforge.settings import BuildSettings  # noqa: E402

TARGET = "tensorrt"
EXAMPLE = ROOT / "examples/drama-3m"
SPEED_MODEL = ROOT / "configs/models/llama-3.2-1b.json"
EXAMPLE_LIMITS = {"max_batch_size": 4, "max_seq_len": 256, "max_num_tokens": 64}
TINY_LIMITS = {"max_batch_size": 3, "max_seq_len": 48, "max_num_tokens": 16}
SPEED_LIMITS = {"max_batch_size": 8, "max_seq_len": 512, "max_num_tokens": 512}
INPUT_LEN, OUTPUT_LEN, SPEED_BATCHES = 128, 256, (1, 8)
PARTS = {"example": 180, "ranks": 240, "tiny": 270, "speed": 330}  # seconds
TINY_AT_ONCE = 11


# -- what is computed, on any target --------------------------------------------------------------


def requests(vocab_size: int, limits: dict[str, int], count: int) -> list[Request]:
    """More requests than fit at once, prompts longer and shorter than a chunk, greedy."""
    random = np.random.default_rng(1)
    longest = limits["max_seq_len"] - 2
    lengths = [1, 3, limits["max_num_tokens"] + 5, longest // 2, longest - 4, 7][:count]
    return [
        Request(index, tuple(random.integers(vocab_size, size=length).tolist()), 12)
        for index, length in enumerate(lengths)
    ]


def tokens(engine: Path, limits: dict[str, int], count: int = 6) -> list[list[int]]:
    """What an engine of one rank generates for `requests`."""
    opened = Engine.open(engine)
    comm = LocalComm()
    executable = target(opened.target).load(
        opened.rank_directory(0), opened.topology, opened.limits, comm
    )
    vocab_size = opened.config.vocab_size
    done = generate(executable, comm, requests(vocab_size, limits, count), vocab_size=vocab_size)
    executable.close()
    return [list(completion.token_ids) for completion in done]


def logits(engine: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The logits of two prompts of 24 tokens, then of 8 decode steps."""
    opened = Engine.open(engine)
    executable = target(opened.target).load(
        opened.rank_directory(0), opened.topology, opened.limits, LocalComm()
    )
    drawn = np.random.default_rng(2).integers(opened.config.vocab_size, size=(2, 32))
    size = opened.limits.block_size
    blocks = -(-32 // size)
    rows = []
    for start, stop in [(0, 24), *((at, at + 1) for at in range(24, 32))]:
        new = stop - start
        batch = StepBatch(
            token_ids=np.ascontiguousarray(drawn[:, start:stop].reshape(-1), np.int32),
            positions=np.tile(np.arange(start, stop, dtype=np.int32), 2),
            query_starts=np.array([0, new, 2 * new], np.int32),
            kv_lens=np.full(2, stop, np.int32),
            block_table=np.arange(2 * blocks, dtype=np.int32).reshape(2, blocks),
            prompt_lens=np.full(2, 24, np.int32),
            logit_rows=np.array([new - 1, 2 * new - 1], np.int32),
        )
        result = executable.step(batch).logits
        assert result is not None
        rows.append(result)
    executable.close()
    return np.stack(rows)


def build_for(
    name: str, checkpoint: Path, engine: Path, limits: dict[str, int], **more: Any
) -> float:
    """Build, and return the seconds that took."""
    started = time.perf_counter()
    build(checkpoint, engine, BuildSettings(target=name, overwrite=True, **limits, **more))
    return time.perf_counter() - started


# -- prepare --------------------------------------------------------------------------------------


def prepare(data: Path) -> None:
    import tempfile

    import torch

    sys.path.append(str(ROOT / "tests/parity"))
    import models  # type: ignore[import-not-found]

    from llmforge.checkpoint.convert import convert
    from llmforge.errors import LlmforgeError
    from llmforge.settings import ConvertSettings

    shutil.rmtree(data, ignore_errors=True)
    data.mkdir(parents=True)
    expected: dict[str, Any] = {"tiny": {}}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        for dtype in ("float32", "float16"):
            checkpoint = data / f"example-{dtype}"
            convert(str(EXAMPLE), checkpoint, ConvertSettings(dtype=dtype))
            engine = scratch / f"example-{dtype}"
            build_for("cpu", checkpoint, engine, EXAMPLE_LIMITS)
            if dtype == "float32":
                expected["example"] = tokens(engine, EXAMPLE_LIMITS)
            np.save(data / f"example-{dtype}.npy", logits(engine))
        for case in models.CASES:
            case.save(scratch / case.name, torch.float32)
            checkpoint = data / "tiny" / case.name
            checkpoint.parent.mkdir(exist_ok=True)
            try:
                convert(str(scratch / case.name), checkpoint, ConvertSettings(dtype="float32"))
                build_for("cpu", checkpoint, scratch / f"{case.name}-engine", TINY_LIMITS)
            except LlmforgeError as error:
                print(f"{case.name}: left out ({error})", file=sys.stderr)
                shutil.rmtree(checkpoint, ignore_errors=True)
                continue
            expected["tiny"][case.name] = tokens(scratch / f"{case.name}-engine", TINY_LIMITS)
            print(case.name, file=sys.stderr)
    (data / "expected.json").write_text(json.dumps(expected))


# -- measure --------------------------------------------------------------------------------------


def example(data: Path, scratch: Path, report: Callable[[Any], None]) -> None:
    expected = json.loads((data / "expected.json").read_text())["example"]
    found: dict[str, Any] = {}

    def built(dtype: str) -> float:
        return build_for(
            TARGET, data / f"example-{dtype}", scratch / f"example-{dtype}", EXAMPLE_LIMITS
        )

    for dtype, seconds in at_once(built, ["float32", "float16"]):
        engine = scratch / f"example-{dtype}"
        got = tokens(engine, EXAMPLE_LIMITS)
        config: ModelConfig = Engine.open(engine).config
        comparison = compare_logits(logits(engine), np.load(data / f"example-{dtype}.npy"), config)
        found[dtype] = {
            "build_s": seconds,
            "same_tokens": sum(a == b for a, b in zip(got, expected, strict=True)),
            "requests": len(expected),
            "logits": {
                "rows": comparison.rows,
                "max_difference": comparison.max_difference,
                "tolerance": comparison.tolerance,
                "same_greedy": comparison.greedy_rows,
            },
        }
        report(found)


def at_once(function: Callable[[str], Any], names: Iterable[str], most: int = 4) -> Iterator[Any]:
    """(name, function(name)) as they are done. Builds are processes of their own."""
    with concurrent.futures.ThreadPoolExecutor(most) as pool:
        jobs = {pool.submit(function, name): name for name in names}
        for job in concurrent.futures.as_completed(jobs):
            yield jobs[job], job.result()


def tiny_one(data: Path, scratch: Path, name: str) -> dict[str, Any]:
    expected = json.loads((data / "expected.json").read_text())["tiny"][name]
    seconds = build_for(TARGET, data / "tiny" / name, scratch / name, TINY_LIMITS)
    got = tokens(scratch / name, TINY_LIMITS)
    return {"build_s": seconds, "same": got == expected, "tokens": got}


def tiny(data: Path, scratch: Path, report: Callable[[Any], None]) -> None:
    """Several at a time, each in a process of its own."""
    expected = json.loads((data / "expected.json").read_text())["tiny"]
    found: dict[str, Any] = {}

    def one(name: str) -> Any:
        command = [sys.executable, __file__, "one", str(data), str(scratch), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=150)
        except subprocess.TimeoutExpired:
            return {"error": "more than 150 s"}
        if done.returncode:
            return {"error": done.stderr.strip().splitlines()[-1:]}
        return json.loads(done.stdout.splitlines()[-1])

    for name, result in at_once(one, expected, TINY_AT_ONCE):
        found[name] = result
        report(found)


def ranks(data: Path, scratch: Path, report: Callable[[Any], None]) -> None:
    """Through the command line, as a user does."""
    expected = json.loads((data / "expected.json").read_text())["example"]
    checkpoint = data / "example-float32"
    lines = [
        json.dumps({"token_ids": request.token_ids, "max_new_tokens": request.max_new_tokens})
        for request in requests(Checkpoint.open(checkpoint).config.vocab_size, EXAMPLE_LIMITS, 6)
    ]
    prompts = scratch / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    found: dict[str, Any] = {}

    def built(layout: str) -> float:
        return build_for(TARGET, checkpoint, scratch / layout, EXAMPLE_LIMITS, **{layout: 2})

    for layout, seconds in at_once(built, ["tensor_parallel", "pipeline_parallel"]):
        command = ["mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none", sys.executable]
        command += ["-m", "llmforge", "run", str(scratch / layout), "--prompts", str(prompts)]
        command += ["--json", "--temperature", "0", "--ignore-eos"]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        got = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        by_index = {line["index"]: line["token_ids"] for line in got}
        found[layout] = {
            "build_s": seconds,
            "run_s": time.perf_counter() - started,
            "same_tokens": sum(by_index.get(i) == e for i, e in enumerate(expected)),
            "requests": len(expected),
            "error": done.stderr.strip().splitlines()[-3:] if done.returncode else None,
        }
        report(found)


def speed(data: Path, scratch: Path, report: Callable[[Any], None]) -> None:
    """Waits, once built, until nothing else runs (the file `quiet` is there)."""
    found: dict[str, Any] = {}
    checkpoint, engine = scratch / "speed-checkpoint", scratch / "speed"
    llmforge("convert", "--from-config", SPEED_MODEL, "--random-weights", "--dtype", "float16",
             "-o", checkpoint)  # fmt: skip
    limits = [f"--{n.replace('_', '-')}={v}" for n, v in SPEED_LIMITS.items()]
    started = time.perf_counter()
    llmforge("build", checkpoint, "-o", engine, "--target", TARGET, *limits)
    found["build_s"] = time.perf_counter() - started
    files = [f for f in engine.rglob("*") if f.is_file()]
    found["engine_bytes"] = sum(f.stat().st_size for f in files)
    report(found)
    while not (scratch / "quiet").exists():
        time.sleep(0.2)
    found["bandwidth"] = bandwidth()
    config = Engine.open(engine).config
    batches = [option for b in SPEED_BATCHES for option in ("--batch-size", str(b))]
    llmforge("bench", engine, *batches, "--input-len", INPUT_LEN, "--output-len", OUTPUT_LEN,
             "--warmup", 1, "--repeat", 3, "--json", scratch / "bench.json")  # fmt: skip
    found["bench"] = json.loads((scratch / "bench.json").read_text())
    context = INPUT_LEN + OUTPUT_LEN // 2
    found["floor_ms"] = {
        str(b): step_bytes(config, b, context) / found["bandwidth"] * 1e3 for b in SPEED_BATCHES
    }
    report(found)


def step_bytes(config: ModelConfig, batch: int, context: int) -> int:
    """What a decode step must read: the weights, but of an embedding that is only looked up, and
    the keys and values of `context` tokens a sequence. All in two bytes."""
    heads, kv, size = config.num_heads, config.num_kv_heads, config.head_dim
    layer = config.hidden_size * size * 2 * (heads + kv)
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = config.num_layers * layer + config.vocab_size * config.hidden_size
    cache = config.num_layers * 2 * kv * size * context * batch
    return 2 * (weights + cache)


def bandwidth() -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    from cuda.bindings import driver

    from llmforge.engine.tensorrt.device import CudaDevice
    from llmforge.kernels.driver import check

    device, nbytes, repeat = CudaDevice(), 4 << 30, 20
    source, to = device.allocate(nbytes), device.allocate(nbytes)
    best = 0.0
    for _ in range(5):
        device.synchronize()
        started = time.perf_counter()
        for _ in range(repeat):
            check(driver.cuMemcpyDtoDAsync(to, source, nbytes, device.stream))
        device.synchronize()
        best = max(best, 2 * nbytes * repeat / (time.perf_counter() - started))
    device.close()
    return best


def llmforge(*arguments: Any) -> None:
    command = [sys.executable, "-m", "llmforge", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[2:4])}: {done.stderr.strip()[-2000:]}")


def measure(data: Path, out: Path, parts: Sequence[str]) -> None:
    """Run the parts, all at once."""
    scratch = Path(os.environ.get("TMPDIR", "/tmp")) / "tensorrt_gpu"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    started = time.perf_counter()
    results: dict[str, Any] = {"machine": machine(), "parts": {}, "errors": {}}
    waiting = {part: start(part, data, scratch, out) for part in parts}
    while waiting:
        seconds = time.perf_counter() - started
        for part, process in tuple(waiting.items()):
            if process.poll() is None and seconds < PARTS[part]:
                continue
            process.kill()
            if process.wait():
                late = f"more than {PARTS[part]} s: " if seconds >= PARTS[part] else ""
                results["errors"][part] = late + (out / f"{part}.log").read_text()[-3000:]
            del waiting[part]
            print(f"{seconds:6.1f} s  {part} {results['errors'].get(part, '')}")
        if set(waiting) <= {"speed"}:
            (scratch / "quiet").touch()
        for part in parts:
            if (path := scratch / f"{part}.json").exists():
                results["parts"][part] = json.loads(path.read_text())
        (out / "tensorrt_gpu.json").write_text(json.dumps(results, indent=1))
        time.sleep(0.5)
    print(json.dumps({k: v for k, v in results["parts"].items() if k != "tiny"})[-6000:])
    tiny = results["parts"].get("tiny", {})
    print(f"tiny: {sum(r.get('same', False) for r in tiny.values())} of {len(tiny)} the same")
    for name, result in tiny.items():
        if not result.get("same"):
            print(name, result)


def start(part: str, data: Path, scratch: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "part", str(data), str(scratch), part]
    with open(out / f"{part}.log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def machine() -> dict[str, Any]:
    from llmforge.engine.tensorrt.device import CudaDevice
    from llmforge.engine.tensorrt.package import Package

    return {
        "gpu": CudaDevice().description,
        "tensorrt": Package.load(TARGET).version,
        "python": platform.python_version(),
    }


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "prepare":
        prepare(Path(arguments[0]))
    elif command == "measure":
        measure(Path(arguments[0]), Path(arguments[1]), arguments[2:] or list(PARTS))
    elif command == "one":
        data, scratch, name = arguments
        print(json.dumps(tiny_one(Path(data), Path(scratch), name)))
    elif command == "part":
        data, scratch, part = arguments
        path = Path(scratch) / f"{part}.json"
        functions = {
            "example": example,
            "tiny": tiny,
            "ranks": ranks,
            "speed": speed,
        }

        def report(found: Any) -> None:
            path.with_suffix(".new").write_text(json.dumps(found))
            path.with_suffix(".new").replace(path)

        functions[part](Path(data), Path(scratch), report)
    else:
        raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
