"""The settings of every stage: one frozen dataclass each, the only place of a default.

The command line makes its options of these fields (`tensor_parallel` is `--tensor-parallel`) and
one YAML file may hold a section a stage. None stands for "decided by the stage", as each help
text says.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
) -> Any:
    """A dataclass field with what the command line and the YAML check need to know of it."""
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum}
    if isinstance(default, list):
        return field(default_factory=lambda: tuple(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ConvertSettings:
    """Foreign weights → checkpoint."""

    dtype: str | None = _option(
        None,
        "Data type of the checkpoint's weights. Default: the source's.",
        choices=("bfloat16", "float16", "float32"),
    )
    revision: str | None = _option(
        None, "Revision of a Hub model: branch, tag or commit. Default: the main branch."
    )
    shard_size_gb: float = _option(
        5.0, "Largest size of one weight file, in GB (10^9 bytes).", minimum=0.001
    )
    overwrite: bool = _option(False, "Replace an existing checkpoint at the output path.")


@dataclass(frozen=True)
class BuildSettings:
    """Checkpoint → engine."""

    target: str | None = _option(
        None, "Target to compile for; `llmforge doctor` lists them. Default: cpu."
    )
    tensor_parallel: int = _option(1, "Ranks that share each layer.", minimum=1)
    pipeline_parallel: int = _option(1, "Stages that the layers are divided into.", minimum=1)
    max_batch_size: int = _option(8, "Most sequences in one step.", minimum=1)
    max_seq_len: int | None = _option(
        None,
        "Most tokens of a sequence, prompt and generated. "
        "Default: the model's trained length, at most 4096.",
        minimum=1,
    )
    max_num_tokens: int | None = _option(
        None,
        "Most new tokens in one step; longer prompts are prefilled in chunks. "
        "Default: max_seq_len, at most 2048, at least max_batch_size.",
        minimum=1,
    )
    kv_cache_tokens: int | None = _option(
        None,
        "Tokens that the KV cache holds. Default: max_batch_size x max_seq_len, the most that "
        "can be needed; with fewer, requests wait or are preempted.",
        minimum=1,
    )
    block_size: int = _option(32, "Tokens of a KV-cache block.", minimum=1)
    memory_limit_gb: float | None = _option(
        None,
        "Refuse to build where a rank would need more memory than this, in GB (10^9 bytes). "
        "Default: no limit.",
        minimum=0,
    )
    overwrite: bool = _option(False, "Replace an existing engine at the output path.")


@dataclass(frozen=True)
class RunSettings:
    """How to generate. Sampling fields left out come from the model's generation config where it
    samples, else decoding is greedy. A request's own fields override these."""

    max_new_tokens: int = _option(128, "Most tokens to generate for a prompt.", minimum=1)
    temperature: float | None = _option(
        None, "Sampling temperature; 0 is greedy. Default: the model's, else 0.", minimum=0
    )
    top_k: int | None = _option(
        None, "Draw from the k likeliest tokens; 0 is off. Default: the model's, else 0.", minimum=0
    )
    top_p: float | None = _option(
        None,
        "Draw from the likeliest tokens that together reach this probability. "
        "Default: the model's, else 1 (off).",
        minimum=0,
        maximum=1,
    )
    min_p: float | None = _option(
        None,
        "Draw from tokens at least this likely relative to the likeliest. "
        "Default: the model's, else 0 (off).",
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float | None = _option(
        None,
        "Divide (where negative, multiply) the logits of tokens already in the sequence. "
        "Default: the model's, else 1 (off).",
        minimum=0.000001,
    )
    seed: int = _option(0, "Seed of the sampling; the same seed gives the same text.", minimum=0)
    stop: tuple[str, ...] = _option([], "Stop before this text; may be given several times.")
    ignore_eos: bool = _option(False, "Generate on past the model's end-of-sequence tokens.")
    chat: bool = _option(
        False, "Treat each prompt as a user's message and apply the model's chat template."
    )
    stream: bool = _option(False, "Print text as it is generated.")
    json: bool = _option(False, "Print one JSON line a request and nothing else.")


@dataclass(frozen=True)
class BenchSettings:
    """What to measure: latency of static batches, or, with num_requests, in-flight throughput."""

    input_len: int = _option(128, "Prompt tokens of each request.", minimum=1)
    output_len: int = _option(32, "Tokens to generate for each request.", minimum=1)
    batch_size: tuple[int, ...] = _option(
        [1], "Static batch size; may be given several times.", minimum=1
    )
    num_requests: int | None = _option(
        None, "Measure throughput: serve this many requests in flight.", minimum=1
    )
    concurrency: int | None = _option(
        None,
        "Most requests in flight at once when measuring throughput. "
        "Default: the engine's max_batch_size.",
        minimum=1,
    )
    warmup: int = _option(1, "Unmeasured repetitions first.", minimum=0)
    repeat: int = _option(3, "Measured repetitions of each static batch.", minimum=1)
    seed: int = _option(0, "Seed of the random prompts.", minimum=0)
    json: str | None = _option(None, "Write the report to this file as JSON.")
