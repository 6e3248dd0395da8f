"""Is an engine's arithmetic right? Its logits beside those of transformers on the same weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmforge.checkpoint.config import ModelConfig
from llmforge.comm import Comm
from llmforge.engine.step import Float32, StepBatch
from llmforge.engine.target import Executable
from llmforge.errors import SourceError, TargetError, VerificationError

UNIT_ROUNDOFF = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 2.0**-24}
_ACCUMULATOR_ROUNDOFF = 2.0**-24  # products are summed in float32
# Values rounded to the model's dtype in a layer: two norms and their two sums, q, k, v, rope of q
# and k, the attended values, o, gate, up, the activation, their product, down.
_ROUNDINGS_PER_LAYER = 17
# The largest of some 10^5 normally distributed errors lies within this many standard deviations.
_LARGEST_DEVIATION = 6.0


@dataclass(frozen=True)
class Comparison:
    """Logits of `rows` positions compared.

    max_difference, tolerance: absolute, in logits. greedy_rows: rows whose likeliest token is the
    same; near_ties: rows where it is not, but the reference's two likeliest are closer than twice
    the tolerance, so that either is right.
    """

    rows: int
    max_difference: float
    tolerance: float
    greedy_rows: int
    near_ties: int

    @property
    def passed(self) -> bool:
        within = self.max_difference <= self.tolerance
        return within and self.greedy_rows + self.near_ties == self.rows

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "passed": self.passed}


def logit_tolerance(config: ModelConfig, scale: float) -> float:
    """The largest difference that rounding explains between two right computations of logits
    whose root mean square is `scale`."""
    return _LARGEST_DEVIATION * logit_deviation(config) * scale


def logit_deviation(config: ModelConfig) -> float:
    """The root mean square of what rounding explains of the differences between two right
    computations of logits, relative to that of the logits.

    Rounding errors are taken as independent, so they add as squares (N. Higham, Accuracy and
    Stability of Numerical Algorithms, section 2.8). Relative to a value of order one, each
    rounding to the dtype contributes its unit roundoff squared, and a product summed over K terms
    in float32 K/2 times the square of float32's. Both sides err, hence the factor of two.
    """
    terms_per_layer = (
        3 * config.hidden_size  # q, k, v
        + 2 * config.num_heads * config.head_dim  # scores and o
        + 2 * config.hidden_size  # gate, up
        + config.intermediate_size  # down
    )
    if moe := config.moe:
        # The router, and of the chosen experts and the shared one gate, up and down.
        one = 2 * config.hidden_size + moe.expert_size
        terms_per_layer += config.hidden_size + moe.top_k * one + moe.shared_size
    if latent := config.latent:
        # Queries and values pass through the latents.
        terms_per_layer += (latent.q_rank or 0) + latent.nope_dim + 2 * latent.kv_rank
    dtype_errors = (_ROUNDINGS_PER_LAYER * config.num_layers + 3) * UNIT_ROUNDOFF[config.dtype] ** 2
    sums = (terms_per_layer * config.num_layers + config.hidden_size) / 2
    variance = 2 * (dtype_errors + sums * _ACCUMULATOR_ROUNDOFF**2)
    return math.sqrt(variance)


def compare_with_transformers(
    executable: Executable,
    comm: Comm,
    config: ModelConfig,
    hf_directory: Path,
    *,
    prompt_len: int = 24,
    decode_steps: int = 8,
    num_prompts: int = 3,
    seed: int = 0,
) -> Comparison:
    """Prefill random prompts in one batch, then decode tokens that are drawn beforehand, and
    compare the logits of every position asked for with those of transformers in the same dtype.

    Called on rank 0 while the other ranks `follow`. Raises TargetError where transformers is not
    installed, SourceError where the directory cannot be loaded, VerificationError where its
    model is another one.
    """
    limits = executable.limits
    num_prompts = min(num_prompts, limits.max_batch_size)
    decode_steps = min(decode_steps, limits.max_seq_len - 2)
    prompt_len = min(
        prompt_len, limits.max_num_tokens // num_prompts, limits.max_seq_len - decode_steps
    )
    rng = np.random.default_rng(seed)
    tokens = rng.integers(config.vocab_size, size=(num_prompts, prompt_len + decode_steps))
    expected = _reference_logits(hf_directory, config, tokens)[:, prompt_len - 1 : -1]
    got = np.stack(
        [
            step_logits(executable, comm, tokens, start, stop, prompt_len)
            for start, stop in [(0, prompt_len)]
            + [(at, at + 1) for at in range(prompt_len, prompt_len + decode_steps - 1)]
        ],
        axis=1,
    )
    return compare_logits(got, expected, config)


def compare_logits(got: Float32, expected: Float32, config: ModelConfig) -> Comparison:
    """Two arrays of logits [..., vocab_size]. NaN is never within the tolerance."""
    got, expected = (x.reshape(-1, config.vocab_size) for x in (got, expected))
    tolerance = logit_tolerance(config, float(np.sqrt(np.mean(np.square(expected)))))
    difference = float(np.abs(got - expected).max())
    same = got.argmax(-1) == expected.argmax(-1)
    second, first = np.partition(expected, -2, axis=-1)[:, -2:].T
    return Comparison(
        rows=len(got),
        max_difference=difference if math.isfinite(difference) else math.inf,
        tolerance=tolerance,
        greedy_rows=int(same.sum()),
        near_ties=int((~same & (first - second <= 2 * tolerance)).sum()),
    )


def step_logits(
    executable: Executable,
    comm: Comm,
    tokens: np.ndarray[Any, Any],
    start: int,
    stop: int,
    prompt_len: int,
) -> Float32:
    """The logits after position ``stop - 1`` of each prompt, computing ``start:stop``."""
    count = len(tokens)
    size = executable.limits.block_size
    blocks = -(-tokens.shape[1] // size)
    new = stop - start
    batch = StepBatch(
        token_ids=np.ascontiguousarray(tokens[:, start:stop].reshape(-1), np.int32),
        positions=np.tile(np.arange(start, stop, dtype=np.int32), count),
        query_starts=np.arange(0, count * new + 1, new, dtype=np.int32),
        kv_lens=np.full(count, stop, np.int32),
        block_table=np.arange(count * blocks, dtype=np.int32).reshape(count, blocks),
        prompt_lens=np.full(count, prompt_len, np.int32),
        logit_rows=np.arange(new - 1, count * new, new, dtype=np.int32),
    )
    if comm.size > 1:
        comm.broadcast(batch)
    logits = executable.step(batch).logits
    assert logits is not None, "a step that asks for no sampling gives logits"
    return logits


def _reference_logits(
    directory: Path, config: ModelConfig, tokens: np.ndarray[Any, Any]
) -> Float32:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise TargetError(
            "comparing logits needs transformers, which is not installed; "
            "install it with: pip install transformers"
        ) from error
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=getattr(torch, config.dtype), trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(f"transformers cannot load {directory}: {reason}") from error
    vocab_size = model.config.get_text_config().vocab_size
    if vocab_size != config.vocab_size:
        raise VerificationError(
            f"{directory} is another model: its vocabulary has {vocab_size} tokens, "
            f"this one's {config.vocab_size}"
        )
    with torch.inference_mode():
        logits = model(torch.from_numpy(tokens), use_cache=False).logits
    return logits.float().numpy()  # type: ignore[no-any-return]
