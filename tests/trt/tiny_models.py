"""The architectures of tests/parity/models.py with random weights in memory, and their reference:
every op's meaning (model/reference.py), node by node, over a cache of one block a sequence."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from case import COMMON, VOCABULARY
from models import BY_NAME, CASES

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from llmforge.checkpoint.families import read_config
from llmforge.checkpoint.params import parameters
from llmforge.engine.step import Limits, StepBatch
from llmforge.engine.weights import RankWeights
from llmforge.model.decoder import trace
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE
from llmforge.parallel import Topology
from llmforge.safetensors_io import NUMPY_DTYPES

Array = np.ndarray[Any, Any]
ONE = Topology(1, 1)

# What no family of the pipeline's cases has yet: mixtures of experts, latent attention, sinks.
_PLAIN = ModelConfig(
    family="none",
    dtype="float32",
    vocab_size=VOCABULARY,
    hidden_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    intermediate_size=64,
    max_position=64,
    norm_eps=1e-5,
    rope=RopeConfig(1e4, 12),
    sliding_window=(None,) * 2,
)
_LATENT: dict[str, Any] = {"num_kv_heads": 1, "rope": RopeConfig(1e4, 4)}
OWN = {
    "mixture": replace(_PLAIN, moe=MoeConfig(num_experts=6, top_k=2, expert_size=12)),
    "mixture-of-groups": replace(
        _PLAIN,
        moe=MoeConfig(
            num_experts=8, top_k=3, expert_size=12, dense_layers=(0,), score="sigmoid",
            normalize=True, scale=2.5, groups=4, kept_groups=2, group_top=2, correction=True,
            shared_size=16, shared_gate=True,
        ),
    ),
    "mixture-clamped-sinks": replace(
        _PLAIN,
        sliding_window=(6, None),
        qkv_clamp=0.5,
        attention_sinks=True,
        attention_output_bias=True,
        moe=MoeConfig(
            num_experts=4, top_k=2, expert_size=12, normalize=True, router_bias=True,
            expert_bias=True, alpha=1.702, limit=0.7,
        ),
    ),
    "latent": replace(
        _PLAIN, **_LATENT,
        latent=LatentConfig(q_rank=None, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6),
    ),
    "latent-mixture": replace(
        _PLAIN, **_LATENT,
        latent=LatentConfig(q_rank=20, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=6),
        moe=MoeConfig(num_experts=6, top_k=2, expert_size=12, dense_layers=(0,), shared_size=16),
    ),
}  # fmt: skip
NAMES = [*(case.name for case in CASES), *OWN]


@functools.cache
def config_of(name: str, dtype: str = "float32") -> ModelConfig:
    """The configuration of a case, as `convert` reads it, or one of `OWN`."""
    if name in OWN:
        return replace(OWN[name], dtype=dtype)
    case = BY_NAME[name]
    config = case._config_class(**{**COMMON, **case.settings})
    model: Any = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    config.architectures = [model.__name__]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        path.write_text(json.dumps({**config.to_dict(), "dtype": dtype}))
        return replace(read_config(path)[1], dtype=dtype)


class MemoryCheckpoint:
    """What RankWeights reads of a checkpoint. The weights are large enough for every part of the
    network, biases included, to show in the logits."""

    def __init__(self, config: ModelConfig, seed: int = 7) -> None:
        self.config = config
        rng = np.random.default_rng(seed)
        self._values = {
            spec.name: (spec.init_mean + 0.15 * rng.standard_normal(spec.shape)).astype(
                NUMPY_DTYPES[spec.stored_as(config)]
            )
            for spec in parameters(config).values()
        }

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int = 0,
        stop: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Array:
        """Elements ``start:stop`` of a dimension, of `rows` of the first alone."""
        value = self._values[name]
        if rows is not None:
            value = value[rows[0] : rows[1]]
        chosen = range(*slice(start, stop).indices(value.shape[dim]))
        return np.ascontiguousarray(np.take(value, chosen, dim))

    def map(self, name: str) -> Array:
        return self._values[name]

    def release(self) -> None:
        """Nothing is mapped."""

    def of_rank(self, topology: Topology, rank: int) -> RankWeights:
        return RankWeights(self, topology, rank)  # type: ignore[arg-type]


class Reference:
    """The model on one rank, step by step."""

    def __init__(self, checkpoint: MemoryCheckpoint, limits: Limits) -> None:
        self._graph = trace(checkpoint.config, ONE, 0)
        weights = checkpoint.of_rank(ONE, 0)
        self._values = {p.name: _torch(weights.read(p)) for p in self._graph.parameters}
        sizes = {"blocks": limits.num_blocks, "block_size": limits.block_size}
        for state in self._graph.states:
            shape = [sizes.get(d, d) if isinstance(d, str) else d for d in state.shape]
            self._values[state.name] = torch.zeros(shape, dtype=DTYPES[state.dtype])

    def logits(self, batch: StepBatch) -> torch.Tensor:
        """[R, vocab] float32."""
        values = {**self._values, "": None}
        for tensor in self._graph.inputs:
            values[tensor.name] = torch.from_numpy(getattr(batch, tensor.name))
        with torch.inference_mode():
            for node in self._graph.nodes:
                inputs = [values[name] for name in node.inputs]
                results = REFERENCE[node.op](inputs, node.attrs, LOCAL)
                values.update(zip(node.outputs, results, strict=True))
        return values[self._graph.outputs[0]].float()


def _torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def batch_of(
    tokens: Sequence[np.ndarray], chunks: Sequence[tuple[int, int, int]], prompts: Sequence[int]
) -> StepBatch:
    """The step that computes, for each (sequence, start, stop), those tokens of the sequence, which
    is in the slot of its number; the logits of each one's last token are wanted."""
    lengths = [stop - start for _, start, stop in chunks]
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    return StepBatch(
        token_ids=np.concatenate([tokens[s][start:stop] for s, start, stop in chunks]),
        positions=np.concatenate([np.arange(a, b, dtype=np.int32) for _, a, b in chunks]),
        query_starts=starts,
        kv_lens=np.array([stop for _, _, stop in chunks], np.int32),
        block_table=np.array([[s] for s, _, _ in chunks], np.int32),
        prompt_lens=np.array([prompts[s] for s, _, _ in chunks], np.int32),
        logit_rows=starts[1:] - np.int32(1),
    )
