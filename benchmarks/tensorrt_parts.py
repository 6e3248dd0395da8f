"""What the jobs of tensorrt_gpu.py compute. No torch here: it runs where TensorRT does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from job_pool import alone, report
from tensorrt_variants import build_variant

from llmforge.checkpoint.config import ModelConfig
from llmforge.checkpoint.store import Checkpoint
from llmforge.comm import LocalComm
from llmforge.engine.build import build
from llmforge.engine.step import StepBatch
from llmforge.engine.store import Engine
from llmforge.engine.target import target
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request
from llmforge.runtime.verify import compare_logits
from llmforge.settings import BuildSettings

ROOT = Path(__file__).resolve().parent.parent
TARGET = "tensorrt"
EXAMPLE = ROOT / "examples/drama-3m"
SPEED_MODEL = ROOT / "configs/models/llama-3.2-1b.json"
EXAMPLE_LIMITS = {"max_batch_size": 4, "max_seq_len": 256, "max_num_tokens": 64}
TINY_LIMITS = {"max_batch_size": 3, "max_seq_len": 48, "max_num_tokens": 16}
SPEED_LIMITS = {"max_batch_size": 8, "max_seq_len": 512, "max_num_tokens": 512}
INPUT_LEN, SPEED_BATCHES = 128, (1, 8)
OUTPUT_LENS = {"speed": 256, "level": 64}
# What a part changes of the model's configuration, and how many tokens it times.
SHAPES: dict[str, dict[str, int]] = {
    "speed": {},
    "level": {"num_hidden_layers": 2, "vocab_size": 8192},
}

LLMFORGE: tuple[str, ...] = (sys.executable, "-m", "llmforge")
MPIRUN: tuple[str, ...] = ("mpirun", "-n", "2", "--oversubscribe", "--bind-to", "none")


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
    """The logits of two prompts of 24 tokens in chunks of 8, then of 8 decode steps."""
    opened = Engine.open(engine)
    executable = target(opened.target).load(
        opened.rank_directory(0), opened.topology, opened.limits, LocalComm()
    )
    drawn = np.random.default_rng(2).integers(opened.config.vocab_size, size=(2, 32))
    size = opened.limits.block_size
    blocks = -(-32 // size)
    rows = []
    for start, stop in [(0, 8), (8, 16), (16, 24), *((at, at + 1) for at in range(24, 32))]:
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


# -- the jobs --------------------------------------------------------------------------------------


class Place:
    """Where a job finds and leaves things."""

    def __init__(self, data: Path, scratch: Path, part: str, name: str) -> None:
        self.data, self.scratch, self.name = data, scratch, name
        self.label = f"{part}.{name}"
        self.engine = scratch / f"{self.label}-engine"

    def expected(self, part: str) -> Any:
        return json.loads((self.data / "expected.json").read_text())[part]

    def report(self, found: Any) -> None:
        report(self.scratch, self.label, found)


def example(place: Place) -> None:
    """name: a dtype."""
    seconds = build_for(TARGET, place.data / f"example-{place.name}", place.engine, EXAMPLE_LIMITS)
    found: dict[str, Any] = {"build_s": seconds}
    place.report(found)
    got, expected = tokens(place.engine, EXAMPLE_LIMITS), place.expected("example")
    found |= {"same_tokens": equal(got, expected), "requests": len(expected)}
    found["logits"] = compared(place.engine, place.data / f"example-{place.name}.npy")
    place.report(found)


def tiny(place: Place) -> None:
    """name: a case."""
    checkpoint = place.data / "tiny" / place.name
    seconds = build_for(TARGET, checkpoint, place.engine, TINY_LIMITS)
    place.report({"build_s": seconds})
    same = tokens(place.engine, TINY_LIMITS) == place.expected("tiny")[place.name]
    place.report({"build_s": seconds, "same": same})


def half(place: Place) -> None:
    """name: a mixture of experts, here in float16 with every expert chosen."""
    checkpoint = place.data / "half" / place.name
    seconds = build_for(TARGET, checkpoint, place.engine, TINY_LIMITS)
    place.report({"build_s": seconds})
    logits_are = compared(place.engine, place.data / "half" / f"{place.name}.npy")
    place.report({"build_s": seconds, "logits": logits_are})


def ranks(place: Place) -> None:
    """name: a layout, of the example."""
    expected = place.expected("example")
    on_two_ranks(place, place.data / "example-float32", EXAMPLE_LIMITS, place.name, expected)


def tiny_ranks(place: Place) -> None:
    """name: a case, on two tensor-parallel ranks."""
    checkpoint, expected = place.data / "tiny" / place.name, place.expected("tiny")[place.name]
    on_two_ranks(place, checkpoint, TINY_LIMITS, "tensor_parallel", expected)


def on_two_ranks(
    place: Place, checkpoint: Path, limits: dict[str, int], layout: str, expected: Any
) -> None:
    """Through the command line, as a user does."""
    found: dict[str, Any] = {
        "build_s": build_for(TARGET, checkpoint, place.engine, limits, **{layout: 2})
    }
    place.report(found)
    vocab_size = Checkpoint.open(checkpoint).config.vocab_size
    lines = [
        json.dumps({"token_ids": request.token_ids, "max_new_tokens": request.max_new_tokens})
        for request in requests(vocab_size, limits, len(expected))
    ]
    prompts = place.scratch / f"{place.label}-prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n")
    command = [*MPIRUN, *LLMFORGE, "run", str(place.engine), "--prompts", str(prompts)]
    command += ["--json", "--temperature", "0", "--ignore-eos"]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    got = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    by_index = {line["index"]: line["token_ids"] for line in got}
    found["run_s"] = time.perf_counter() - started
    found["same_tokens"] = equal([by_index.get(i) for i in range(len(expected))], expected)
    place.report(found | {"requests": len(expected)})


def speed(place: Place) -> None:
    """name: options of its build, without their dashes and joined by +."""
    build_and_bench(place, "speed", options_of(place.name), repeat=3)


def level(place: Place) -> None:
    """name: an optimisation level."""
    build_and_bench(place, "level", ("--optimization-level", place.name), repeat=1)


def variant(place: Place) -> None:
    """name: a change of TensorRT's configuration; the build of a few layers."""
    checkpoint = made_checkpoint(place, "level")
    limits = SPEED_LIMITS
    place.report(build_variant(TARGET, place.name, checkpoint, place.engine, limits))


def options_of(name: str) -> tuple[str, ...]:
    return () if name == DEFAULT else tuple(f"--{option}" for option in name.split("+"))


DEFAULT = "default"


def build_and_bench(place: Place, part: str, options: tuple[str, ...], repeat: int) -> None:
    """The 1B's shape, as the part changes it, in float16."""
    found: dict[str, Any] = {}
    checkpoint = made_checkpoint(place, part)
    limits = [f"--{n.replace('_', '-')}={v}" for n, v in SPEED_LIMITS.items()]
    started = time.perf_counter()
    llmforge("build", checkpoint, "-o", place.engine, "--target", TARGET, *limits, *options)
    found["build_s"] = time.perf_counter() - started
    files = [f for f in place.engine.rglob("*") if f.is_file()]
    found["engine_bytes"] = sum(f.stat().st_size for f in files)
    place.report(found)
    with alone(place.scratch, place.label):
        found["bandwidth"] = bandwidth()
        place.report(found)
        benched = place.scratch / f"{place.label}.bench"
        batches = [option for b in SPEED_BATCHES for option in ("--batch-size", b)]
        llmforge("bench", place.engine, *batches, "--input-len", INPUT_LEN,
                 "--output-len", OUTPUT_LENS[part], "--warmup", 1, "--repeat", repeat,
                 "--json", benched)  # fmt: skip
    found["bench"] = json.loads(benched.read_text())
    config, context = Engine.open(place.engine).config, INPUT_LEN + OUTPUT_LENS[part] // 2
    found["floor_ms"] = {
        str(b): step_bytes(config, b, context) / found["bandwidth"] * 1e3 for b in SPEED_BATCHES
    }
    place.report(found)


def made_checkpoint(place: Place, part: str) -> Path:
    config_file = place.scratch / f"{place.label}.config"
    checkpoint = place.scratch / f"{place.label}-checkpoint"
    config_file.write_text(json.dumps(json.loads(SPEED_MODEL.read_text()) | SHAPES[part]))
    llmforge("convert", "--from-config", config_file, "--random-weights", "--dtype", "float16",
             "-o", checkpoint)  # fmt: skip
    return checkpoint


def equal(got: list[Any], expected: list[Any]) -> int:
    return sum(a == b for a, b in zip(got, expected, strict=True))


def compared(engine: Path, reference: Path) -> dict[str, Any]:
    """An engine's logits beside those of the cpu target."""
    config: ModelConfig = Engine.open(engine).config
    comparison = compare_logits(logits(engine), np.load(reference), config)
    return {
        "rows": comparison.rows,
        "max_difference": comparison.max_difference,
        "tolerance": comparison.tolerance,
        "same_greedy": comparison.greedy_rows,
    }


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
    command = [*LLMFORGE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(f"{command[len(LLMFORGE)]}: {done.stderr.strip()[-2000:]}")


PARTS: dict[str, Callable[[Place], None]] = {
    "speed": speed,
    "example": example,
    "ranks": ranks,
    "tiny": tiny,
    "tiny_ranks": tiny_ranks,
    "half": half,
    "level": level,
    "variant": variant,
}
