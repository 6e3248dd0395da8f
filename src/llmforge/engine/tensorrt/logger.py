"""What TensorRT says, and what it means: errors of its log fail the build.

TensorRT's calls seldom raise: what fails returns None or is dropped, and the reason stands in the
log. So a build collects the log, and `Messages.check` raises on any message of severity ERROR or
worse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from llmforge.errors import BuildError

# What a builder that needs no GPU says, after any other message, on a machine without one.
_NO_GPU_NOISE = re.compile(r"catchCudaError|cudaError[: ]*35|CUDA initialization failure.*35")

# A message that TensorRT gives as a warning, although the network is not what was meant.
_UNUSED = re.compile(r"Unused [Ii]nput:? *(\S+)")

# (what TensorRT says, what that means for the model and what helps)
EXPLANATIONS: tuple[tuple[str, str], ...] = (
    (
        r"HW-specific datatypes: b(f)?16",
        "one of the architectures has no bfloat16 (sm_75): leave it out of --arch, or convert the "
        "model with --dtype float16",
    ),
    (
        r"HW-specific datatypes: (?P<dtype>\w+)",
        "one of the architectures cannot compute in {dtype}: leave it out of --arch",
    ),
    (
        r"is_decomposable\(\)|not supported by a dedicated kernel|no fused kernel is available",
        "TensorRT has no attention kernel for this head size and data type on one of the "
        "architectures; build with --primitives",
    ),
    (
        r"must have the same head dimension|divisible by key/value number of heads",
        "TensorRT's attention layer cannot express these heads; build with --primitives",
    ),
    (
        r"wrap_attention_op_in_kgen|RingAttention",
        "TensorRT's attention layer failed to compile for this model; build with --primitives",
    ),
    (
        r"toMyelinCommKind|CollectiveOperation not supported",
        "TensorRT fused a collective with its neighbours and cannot compile that; build with "
        "--primitives, which leaves collectives to llmforge",
    ),
    (
        r"insufficient workspace|workspace.*too small|increas\w+ (the )?workspace",
        "the workspace is too small for one of the layers; give a larger --workspace-gb",
    ),
    (
        r"OutOfMemory|out of memory|cudaError 2\b|Requested amount of GPU memory",
        "the GPU's memory is too small to build this engine; end what else uses it, use more "
        "ranks, or build with smaller --max-num-tokens, --max-batch-size or --max-seq-len",
    ),
    (
        r"Could not find any implementation for node",
        "TensorRT found no kernel for one of the layers; try another --optimization-level or a "
        "larger --workspace-gb",
    ),
    (
        r"volume.*(exceeds|overflow)|2\^31|INT32_MAX|larger than 2147483647",
        "a tensor of the largest step has more elements than TensorRT can index; build with "
        "smaller --max-num-tokens or --max-seq-len",
    ),
    (
        r"CUDA driver version is insufficient|CUDA error.* 35",
        "this package's builder needs an NVIDIA GPU with its driver",
    ),
)


def explain(message: str) -> str | None:
    """What a message of TensorRT means and what helps, where that is known."""
    for pattern, sentence in EXPLANATIONS:
        if found := re.search(pattern, message, re.IGNORECASE):
            return sentence.format(**found.groupdict())
    return None


@dataclass
class Messages:
    """The messages of one build or one engine that tell of something wrong."""

    errors: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def add(self, is_error: bool, message: str) -> None:
        if found := _UNUSED.search(message):
            self.unused.append(found[1])
        elif is_error and not _NO_GPU_NOISE.search(message):
            self.errors.append(" ".join(message.split()))

    def check(self, what: str) -> None:
        """Raises BuildError where an error was logged: `what` failed."""
        if self.errors:
            raise BuildError(self.reason(what))
        if self.unused:
            raise BuildError(
                f"{what}: TensorRT dropped the input {self.unused[0]}, so the engine would compute "
                "something else; build with --primitives"
            )

    def reason(self, what: str) -> str:
        """Why `what` failed, of what was logged."""
        for message in self.errors:
            if sentence := explain(message):
                return f"{what}: {sentence} (TensorRT: {message})"
        said = self.errors[0] if self.errors else "it gave no reason"
        return f"{what}: TensorRT failed: {said}"


def make_logger(trt: Any, messages: Messages) -> Any:
    """An ILogger of the package that fills `messages`."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            messages.add(severity <= trt.ILogger.ERROR, message)

    return Logger()
