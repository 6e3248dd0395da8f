"""benchmarks/tensorrt_gpu.py on the emulated machine, with models that it can compute; what the
benchmark starts is this program again.

    emulated_gpu_benchmark.py prepare|measure|job …    as the benchmark
    emulated_gpu_benchmark.py llmforge …               the command line
    emulated_gpu_benchmark.py ranks … run ENGINE --prompts FILE …
                                                       in place of mpirun: ranks as threads
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [
    str(folder) for folder in (ROOT / "benchmarks", HERE, HERE.parent, HERE.parent / "parity")
]

import models  # noqa: E402
import pytest  # noqa: E402
import tensorrt_gpu  # noqa: E402
import tensorrt_parts as parts  # noqa: E402
import torch  # noqa: E402
from emulated_target import Rig  # noqa: E402
from test_emulated_cli import install, llmforge  # noqa: E402

from llmforge.engine.store import Engine  # noqa: E402
from llmforge.runtime.requests import Request  # noqa: E402

VERSION = "8.6"
CASES = ("llama", "olmoe", "mixtral")
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 101,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    rig = Rig(patch, VERSION)
    command, *arguments = sys.argv[1:]
    if command == "ranks":
        on_ranks(rig, arguments)
        return
    install(patch, rig)
    if command == "llmforge":
        sys.exit(llmforge(*arguments))
    made_small()
    tensorrt_gpu.main()


def made_small() -> None:
    program = (sys.executable, __file__)
    parts.LLMFORGE, parts.MPIRUN = (*program, "llmforge"), (*program, "ranks")
    parts.bandwidth = lambda: 1e12
    parts.EXAMPLE_LIMITS = {"max_batch_size": 2, "max_seq_len": 64, "max_num_tokens": 16}
    parts.SPEED_LIMITS = {"max_batch_size": 8, "max_seq_len": 32, "max_num_tokens": 32}
    parts.SHAPES = {part: SHAPE for part in parts.SHAPES}
    parts.INPUT_LEN, parts.OUTPUT_LENS = 4, dict.fromkeys(parts.OUTPUT_LENS, 3)
    models.CASES = [case for case in models.CASES if case.name in CASES]


def on_ranks(rig: Rig, arguments: list[str]) -> None:
    """As `llmforge run --json` does for prompts that are tokens."""
    at = arguments.index("run")
    directory, prompts = Path(arguments[at + 1]), Path(arguments[arguments.index("--prompts") + 1])
    engine = Engine.open(directory)
    requests = []
    for index, line in enumerate(prompts.read_text().splitlines()):
        given = json.loads(line)
        requests.append(Request(index, tuple(given["token_ids"]), given["max_new_tokens"]))
    vocab_size = engine.config.vocab_size
    done = rig.serve(directory, engine.topology, engine.limits, requests, vocab_size)
    for index, tokens in enumerate(done):
        print(json.dumps({"index": index, "token_ids": tokens}))


if __name__ == "__main__":
    main()
