"""The scheduler and the real executable on an emulation of TensorRT: token for token what the cpu
target gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emulated_target import Rig
from parity import PROMPTS, compare, tokens_of
from tiny_models import ONE, MemoryCheckpoint, Reference, batch_of, config_of

from llmforge.comm import LocalComm
from llmforge.engine.cpu.target import CpuTarget
from llmforge.engine.step import Limits, SamplingParams
from llmforge.engine.tensorrt import calls
from llmforge.engine.tensorrt.calls import Call
from llmforge.engine.tensorrt.runner import Runner
from llmforge.errors import StoreError
from llmforge.kernels import compile as compiler
from llmforge.model.decoder import trace
from llmforge.parallel import Topology
from llmforge.runtime.generate import generate
from llmforge.runtime.requests import Request

# A slot a sequence; prompts longer than max_num_tokens are cut into chunks.
LIMITS = Limits(max_batch_size=3, max_seq_len=40, max_num_tokens=8, block_size=48, num_blocks=3)
CPU_LIMITS = Limits(max_batch_size=3, max_seq_len=40, max_num_tokens=8, block_size=4, num_blocks=30)
SAMPLED = SamplingParams(
    temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.1, frequency_penalty=0.2,
    presence_penalty=0.1, seed=5,
)  # fmt: skip
LENGTHS = (1, 3, 14, 9, 25, 2, 8)


def requests_of(vocab_size: int) -> list[Request]:
    rng = np.random.default_rng(11)
    prompts = [tuple(rng.integers(vocab_size, size=n).tolist()) for n in LENGTHS]
    return [
        Request(i, prompt, 7 + i, SAMPLED if i % 2 else SamplingParams())
        for i, prompt in enumerate(prompts)
    ]


def by_cpu(
    directory: Path, checkpoint: MemoryCheckpoint, requests: list[Request]
) -> list[tuple[int, ...]]:
    target, out = CpuTarget(), directory / "cpu"
    out.mkdir()
    graph = target.prepare(trace(checkpoint.config, ONE, 0))
    target.compile(graph, checkpoint.of_rank(ONE, 0), CPU_LIMITS, out)
    executable = target.load(out, ONE, CPU_LIMITS, LocalComm())
    vocab_size = checkpoint.config.vocab_size
    completions = generate(executable, LocalComm(), requests, vocab_size=vocab_size)
    return [completion.token_ids for completion in completions]


LAYOUTS = {"one": ONE, "tp2": Topology(2, 1), "pp2": Topology(1, 2), "tp2-pp2": Topology(2, 2)}


BOTH = pytest.mark.parametrize("primitives", [False, True], ids=["native", "primitives"])


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_the_cpu_target(
    layout: str, primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked prefill, continuous batching, greedy and sampled rows, in every layout: with native
    layers collectives are in the engines, with primitives between them."""
    serves_as_cpu("llama", LAYOUTS[layout], primitives, tmp_path, Rig(monkeypatch))


@BOTH
@pytest.mark.parametrize(
    "name", ["mistral-window", "phi3-longrope", "llama-dynamic", "gemma2", "bloom", "gpt2"]
)
def test_other_positions_windows_and_caps(
    name: str, primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serves_as_cpu(name, ONE, primitives, tmp_path, Rig(monkeypatch))


def serves_as_cpu(
    name: str, topology: Topology, primitives: bool, directory: Path, rig: Rig
) -> None:
    checkpoint = MemoryCheckpoint(config_of(name))
    vocab_size = checkpoint.config.vocab_size
    requests = requests_of(vocab_size)
    rig.build(directory, checkpoint, LIMITS, topology, primitives=primitives)
    expected = by_cpu(directory, checkpoint, requests)
    assert rig.serve(directory, topology, LIMITS, requests, vocab_size) == expected


@BOTH
def test_every_size_of_decode_calls_and_slots_that_are_used_again(
    primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 13 requests up to 5 run at a time, which ends at many different times: calls of 1, 2, 4
    and 5 rows, some with rows of slots that are free. Each size is one captured graph."""
    limits = dataclasses.replace(LIMITS, max_batch_size=5, num_blocks=5)
    checkpoint = MemoryCheckpoint(config_of("qwen2"))
    vocab_size = checkpoint.config.vocab_size
    rng = np.random.default_rng(4)
    requests = [
        Request(i, tuple(rng.integers(vocab_size, size=1 + i * 5 % 17).tolist()), 1 + i * 7 % 11)
        for i in range(13)
    ]
    rig = Rig(monkeypatch)
    sizes: list[int] = []
    right = Runner.run

    def run(self: Runner, call: Call, *rest: Any) -> None:
        if call.decode:
            sizes.append(call.shape[0])
        right(self, call, *rest)

    rig.build(tmp_path, checkpoint, limits, ONE, primitives=primitives)
    expected = by_cpu(tmp_path, checkpoint, requests)
    monkeypatch.setattr(Runner, "run", run)
    assert rig.serve(tmp_path, ONE, limits, requests, vocab_size) == expected
    assert set(sizes) == {1, 2, 4, 5}
    (device,) = rig.devices
    assert device.captures == 4
    assert ("cache_write" in device.launches) == primitives


def test_fewer_slots_than_sequences_make_them_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = dataclasses.replace(LIMITS, num_blocks=2)
    checkpoint = MemoryCheckpoint(config_of("llama"))
    vocab_size = checkpoint.config.vocab_size
    requests = requests_of(vocab_size)
    rig = Rig(monkeypatch)
    rig.build(tmp_path, checkpoint, limits, ONE)
    expected = by_cpu(tmp_path, checkpoint, requests)
    assert rig.serve(tmp_path, ONE, limits, requests, vocab_size) == expected


@BOTH
def test_a_sequence_that_fills_its_slot_beside_others(
    primitives: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots of exactly max_seq_len tokens: a full slot's row goes on taking part in calls."""
    limits = Limits(3, 16, 8, block_size=16, num_blocks=3)
    checkpoint = MemoryCheckpoint(config_of("llama"))
    vocab_size = checkpoint.config.vocab_size
    rng = np.random.default_rng(2)
    lengths = ((3, 2), (9, 7), (15, 1), (2, 14), (1, 15))
    requests = [
        Request(i, tuple(rng.integers(vocab_size, size=n).tolist()), new)
        for i, (n, new) in enumerate(lengths)
    ]
    rig = Rig(monkeypatch)
    rig.build(tmp_path, checkpoint, limits, ONE, primitives=primitives)
    expected = by_cpu(tmp_path, checkpoint, requests)
    assert rig.serve(tmp_path, ONE, limits, requests, vocab_size) == expected


def test_logits_where_a_batch_does_not_say_how_to_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float16, against the cpu target within what rounding explains."""
    checkpoint = MemoryCheckpoint(config_of("llama", "float16"))
    rig = Rig(monkeypatch)
    rig.build(tmp_path, checkpoint, LIMITS, ONE)
    executable = rig.load(tmp_path, ONE, LIMITS, LocalComm())
    tokens = tokens_of(checkpoint.config)
    steps = (((0, 0, 5), (1, 0, 3)), ((1, 3, 6),), ((0, 5, 6), (1, 6, 7)))
    reference = Reference(checkpoint, LIMITS)
    for chunks in steps:
        batch = batch_of(tokens, chunks, PROMPTS)
        got = executable.step(batch).logits
        assert got is not None
        expected = reference.logits(batch)
        assert compare(checkpoint.config, [torch.from_numpy(got)], [expected]).within
    executable.close()
    assert rig.memory.allocated == 0


def test_an_engine_with_other_kernels_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(monkeypatch)
    rig.build(tmp_path, MemoryCheckpoint(config_of("llama")), LIMITS, ONE)
    monkeypatch.setattr(compiler, "_code", lambda name: "edited")
    with pytest.raises(StoreError, match="does not have the sample that llmforge"):
        rig.load(tmp_path, ONE, LIMITS, LocalComm())


# -- a wrong executable is seen --------------------------------------------------------------------


def wrong_slot(patch: pytest.MonkeyPatch) -> None:
    right = Runner._set_slot
    patch.setattr(Runner, "_set_slot", lambda self, slot: right(self, max(0, slot - 1)))


def stale_lengths(patch: pytest.MonkeyPatch) -> None:
    right = calls._decode_call

    def decode_call(batch: Any, rows: Any, known: Any, shapes: Any) -> Call:
        call = right(batch, rows, known, shapes)
        return dataclasses.replace(call, past_lens=np.maximum(call.past_lens - 1, 0))

    patch.setattr(calls, "_decode_call", decode_call)


def no_reset(patch: pytest.MonkeyPatch) -> None:
    """Rows that take no part write at the start of their slot, where tokens of theirs are."""
    right = calls._decode_call

    def decode_call(batch: Any, rows: Any, known: Any, shapes: Any) -> Call:
        call = right(batch, rows, known, shapes)
        free = np.setdiff1d(np.arange(len(call.past_lens)), batch.block_table[rows, 0])
        call.past_lens[free] = 0
        return call

    patch.setattr(calls, "_decode_call", decode_call)


def rows_exchanged(patch: pytest.MonkeyPatch) -> None:
    right = calls._decode_call

    def decode_call(*given: Any) -> Call:
        call = right(*given)
        return dataclasses.replace(call, results=call.results[::-1].copy())

    patch.setattr(calls, "_decode_call", decode_call)


@pytest.mark.parametrize("mutate", [wrong_slot, stale_lengths, no_reset, rows_exchanged])
def test_a_wrong_executable_is_seen(
    mutate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        serves_as_cpu("llama", ONE, True, tmp_path, Rig(monkeypatch))
