"""The settings of every stage: one frozen dataclass each, the only place of a default.

The command line makes its options of these fields (`tensor_parallel` is `--tensor-parallel`) and
one YAML file may hold a section a stage (`settings_reading.py`). None stands for "decided by the
stage", as each help text says.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


def _option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str | None = None,
    targets: tuple[str, ...] = (),
    comma_list: bool = False,
    flag: str | None = None,
) -> Any:
    """A dataclass field with what the command line and the YAML check need to know of it.
    targets: the only ones that read it; none: it is for all. comma_list: of a repeated field, one
    text may hold several values. flag: the command line's option, where it is not the name."""
    metadata = {
        "help": help,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "metavar": metavar,
        "targets": targets,
        "comma_list": comma_list,
        "flag": flag,
    }
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
    expert_parallel: int = _option(
        1,
        "Groups of tensor-parallel ranks that a mixture's experts are divided among; the ranks "
        "of a group share each expert.",
        minimum=1,
    )
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
        targets=("cpu", "cuda"),
    )
    block_size: int | None = _option(
        None, "Tokens of a KV-cache block. Default: 32.", minimum=1, targets=("cpu", "cuda")
    )
    memory_limit_gb: float | None = _option(
        None,
        "Refuse to build where a rank would need more memory than this, in GB (10^9 bytes). "
        "Default: no limit.",
        minimum=0,
    )
    passes: tuple[str, ...] = _option(
        [],
        "A function Graph → Graph of your own that rewrites every rank's graph before the target "
        "does; may be given several times. The file is executed.",
        metavar="FILE.py:FUNCTION",
        flag="--pass",
    )
    overwrite: bool = _option(False, "Replace an existing engine at the output path.")
    arch: tuple[str, ...] = _option(
        [],
        "GPU architectures to compile for, like sm_89,sm_120; may be given several times. "
        "Default: this machine's GPU; without one, those that the target knows.",
        metavar="SM[,SM]",
        targets=("cuda", "tensorrt-rtx"),
        comma_list=True,
    )
    workspace_gb: float | None = _option(
        None,
        "Most memory that TensorRT may use for a layer's intermediate results, in GB. "
        "Default: TensorRT's own limit.",
        minimum=0.001,
        targets=("tensorrt", "tensorrt-rtx"),
    )
    optimization_level: int | None = _option(
        None,
        "How long TensorRT searches for fast kernels. Default: 0 with TensorRT 8, where others "
        "take very long, else 3.",
        minimum=0,
        maximum=5,
        targets=("tensorrt", "tensorrt-rtx"),
    )
    primitives: bool = _option(
        False,
        "Make the network of plain layers, also where TensorRT has native ones for attention, "
        "cache and rotary embedding.",
        targets=("tensorrt", "tensorrt-rtx"),
    )
    weights_apart: bool = _option(
        False,
        "Leave the weights out of TensorRT's engines and give them as inputs: layers that are "
        "alike share an engine, which is small and soon built; TensorRT cannot arrange the "
        "weights for its kernels.",
        targets=("tensorrt", "tensorrt-rtx"),
    )
    timing_cache: str | None = _option(
        None,
        "File in which TensorRT keeps what it measured of kernels from build to build; TensorRT 8 "
        "cannot. Default: one in ~/.cache/llmforge for each version.",
        metavar="FILE",
        targets=("tensorrt",),
    )


@dataclass(frozen=True)
class RunSettings:
    """How to generate. Sampling fields left out come from the model's generation config where it
    samples, else decoding is greedy. A request's own fields override these."""

    prompt: tuple[str, ...] = _option(
        [], "Text to continue; may be given several times.", metavar="TEXT"
    )
    prompts: str | None = _option(
        None,
        'Prompts as JSON lines, like {"prompt": "text"} or {"token_ids": [1, 2]}, each with '
        "sampling fields of its own if wanted; - is standard input.",
        metavar="FILE|-",
    )
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
    frequency_penalty: float | None = _option(
        None,
        "Deduct this from a token's logit for each time it was generated; 0 is off. Default: 0.",
        minimum=-2,
        maximum=2,
    )
    presence_penalty: float | None = _option(
        None,
        "Deduct this from the logits of tokens that were generated; 0 is off. Default: 0.",
        minimum=-2,
        maximum=2,
    )
    seed: int = _option(0, "Seed of the sampling; the same seed gives the same text.", minimum=0)
    stop: tuple[str, ...] = _option(
        [], "Stop before this text; may be given several times.", metavar="TEXT"
    )
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
    json: str | None = _option(
        None,
        "Write the report to this file as JSON; - is standard output, instead of tables.",
        metavar="FILE|-",
    )


@dataclass(frozen=True)
class ProjectSettings:
    """A settings file: checked, but not yet merged with the command line's options.

    `model` is a directory or a Hub id; with `from_config`, there is none and the weights are
    random, drawn from `seed`. `definition` is a file of the user's own that defines the model.
    `sections` holds what the file gives of each stage's settings.
    """

    model: str | None = None
    from_config: str | None = None
    seed: int | None = None
    definition: str | None = None
    workdir: str | None = None
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path | None:
        return None if self.workdir is None else Path(self.workdir) / "checkpoint"

    @property
    def engine(self) -> Path | None:
        return None if self.workdir is None else Path(self.workdir) / "engine"


SECTIONS: dict[str, type[Any]] = {
    "convert": ConvertSettings,
    "build": BuildSettings,
    "run": RunSettings,
    "bench": BenchSettings,
}
_KINDS: dict[type[Any], dict[str, Kind]] = {}  # made as they are asked for


class Kind(NamedTuple):
    """What values a field takes: `base` (int, float, str or bool), many of them in a tuple where
    `repeated`, None as well where `optional`."""

    base: type[int] | type[float] | type[str] | type[bool]
    repeated: bool
    optional: bool


def kinds(section: type[Any]) -> dict[str, Kind]:
    """The kind of each field of a settings dataclass, from its annotation."""
    if section not in _KINDS:
        hints = typing.get_type_hints(section)
        _KINDS[section] = {name: _kind(hint) for name, hint in hints.items()}
    return _KINDS[section]


def _kind(hint: Any) -> Kind:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    repeated = typing.get_origin(hint) is tuple
    return Kind(typing.get_args(hint)[0] if repeated else hint, repeated, optional)


def option_name(known: Field[Any]) -> str:
    """The command line's option of a field."""
    return known.metadata["flag"] or f"--{known.name.replace('_', '-')}"
