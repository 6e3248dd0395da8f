"""What TensorRT says becomes a sentence, and an error of its log fails the build."""

from __future__ import annotations

import pytest

from llmforge.engine.tensorrt.logger import EXPLANATIONS, Messages, explain
from llmforge.errors import BuildError

# As seen: what TensorRT says, and a word of what helps.
SEEN = [
    (
        "Cannot compile for target(s) sm75, because the model contains HW-specific datatypes: b16",
        "--dtype float16",
    ),
    ("the model contains HW-specific datatypes: fp8_e4m3", "cannot compute in fp8_e4m3"),
    (
        "decompose_composite_ops.cpp:59: CHECK(composite_op->is_decomposable()) failed. Attention "
        "operation was not supported by a dedicated kernel",
        "head size",
    ),
    ("Query, Key, Value tensors must have the same head dimension", "--primitives"),
    ("query number of heads must be divisible by key/value number of heads", "--primitives"),
    ("wrap_attention_op_in_kgen.cpp:1185: CHECK failed: Expected 3 live inputs", "--primitives"),
    ("CollectiveOperation not supported in toMyelinCommKind", "collectives"),
    (
        "Could not find any implementation for node X due to insufficient workspace",
        "--workspace-gb",
    ),
    ("Error Code 2: OutOfMemory (no further information)", "memory is too small"),
    ("Could not find any implementation for node {ForeignNode[a...b]}.", "--optimization-level"),
    ("volume of the tensor exceeds 2^31 - 1 elements", "--max-num-tokens"),
    ("CUDA driver version is insufficient for CUDA runtime version", "needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(("said", "meant"), SEEN, ids=[meant for _, meant in SEEN])
def test_opaque_messages_become_sentences(said: str, meant: str) -> None:
    sentence = explain(said)
    assert sentence is not None and meant in sentence
    messages = Messages()
    messages.add(True, f"IBuilder::build:\n Error Code 1:  {said}")
    with pytest.raises(BuildError) as caught:
        messages.check("segment0.engine cannot be built")
    text = str(caught.value)
    assert "\n" not in text and meant in text and "(TensorRT: IBuilder" in text


def test_every_explanation_is_seen() -> None:
    used = [
        next(
            i
            for i, (_, s) in enumerate(EXPLANATIONS)
            if explain(said) == s.format(dtype="fp8_e4m3")
        )
        for said, _ in SEEN
    ]
    assert set(used) == set(range(len(EXPLANATIONS)))


def test_what_a_machine_without_a_gpu_says_is_no_error() -> None:
    messages = Messages()
    messages.add(True, "[checkMacros.cpp::catchCudaError::203] Error Code 1: Cuda Runtime (35)")
    messages.add(True, "CUDA initialization failure with error: 35. Please check your installation")
    messages.add(False, "Some tactics do not have sufficient workspace memory to run")
    messages.check("x")
    messages.add(True, "something new")
    with pytest.raises(BuildError, match="TensorRT failed: something new"):
        messages.check("x")


def test_an_unused_input_is_an_error_whatever_its_severity() -> None:
    messages = Messages()
    messages.add(False, "Unused Input: mask")
    with pytest.raises(BuildError, match="dropped the input mask"):
        messages.check("x")
