"""Tiny random models and the steps to drive them with, for comparing the cuda target with cpu."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.comm import Comm, LocalComm
from llmforge.engine.step import Limits, SampleRow, SamplingParams, StepBatch
from llmforge.engine.weights import RankWeights
from llmforge.model.graph import Graph, Parameter
from llmforge.parallel import Topology
from llmforge.runtime.generate import follow, generate
from llmforge.runtime.requests import Request
from llmforge.runtime.sampling import sample
from llmforge.safetensors_io import NUMPY_DTYPES

LIMITS = Limits(max_batch_size=4, max_seq_len=160, max_num_tokens=128, block_size=16, num_blocks=40)


def tiny(**changes: Any) -> ModelConfig:
    """A small llama; `changes` are fields of ModelConfig, `rope` fields of RopeConfig."""
    layers = changes.get("num_layers", 2)
    head_dim = changes.get("head_dim", 32)
    rope = {"theta": 10000.0, "dim": head_dim, **changes.pop("rope", {})}
    heads = changes.get("num_heads", 4)
    if changes.pop("alibi", False):
        changes["alibi_slopes"] = tuple(2.0 ** -(h + 1) for h in range(heads))
    window = changes.pop("window", None)
    fields: dict[str, Any] = {
        "family": "llama",
        "dtype": "float32",
        "vocab_size": 300,
        "hidden_size": 64,
        "num_layers": layers,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": head_dim,
        "intermediate_size": 96,
        "max_position": 256,
        "norm_eps": 1e-5,
        "sliding_window": (window,) * layers,
    }
    return ModelConfig(**{**fields, **changes}, rope=RopeConfig(**rope))


MODELS = {
    "llama": tiny(),
    "llama-tied": tiny(tied_embeddings=True),
    "mistral-window": tiny(window=13),
    "qwen2-biases": tiny(qkv_bias=True, tied_embeddings=True),
    "qwen3-qk-norm": tiny(qk_norm=True, head_dim=48),
    "all-biases": tiny(qkv_bias=True, attention_output_bias=True, mlp_bias=True, qk_norm=True),
    "odd-sizes": tiny(
        hidden_size=36, head_dim=6, num_heads=3, num_kv_heads=1, intermediate_size=50
    ),
    "head-dim-80": tiny(head_dim=80, num_heads=7, num_kv_heads=1),
    "head-dim-128": tiny(head_dim=128, num_heads=8, num_kv_heads=2, window=40),
    "head-dim-256": tiny(head_dim=256, num_heads=2, num_kv_heads=1),
    "multi-head": tiny(num_kv_heads=4, head_dim=64, activation="gelu_tanh"),
    "partial-rope": tiny(rope={"dim": 16}, activation="gelu"),
    "dynamic-rope": tiny(
        rope={"scaling": "dynamic", "factor": 4.0, "original_max_position": 24}, activation="relu"
    ),
    "yarn": tiny(
        rope={
            "scaling": "yarn", "factor": 4.0, "original_max_position": 64, "attention_factor": 1.1,
        }
    ),
    "longrope": tiny(
        rope={
            "scaling": "longrope", "original_max_position": 24, "attention_factor": 1.2,
            "short_factor": (1.0,) * 16, "long_factor": tuple(1.0 + i / 8 for i in range(16)),
        }
    ),
    "layer-norm": tiny(
        norm="layer", norm_bias=True, gated_mlp=False, activation="relu2", mlp_bias=True,
        head_bias=True,
    ),
    "scaled-and-capped": tiny(
        attention_softcap=5.0, logit_softcap=3.0, embedding_scale=2.0, residual_scale=0.7,
        logit_scale=0.5, post_norm=True, window=20,
    ),
    "alibi-parallel": tiny(alibi=True, parallel_block=True, shared_norm=True, qk_norm=True),
    # Shapes that the streaming products take in two-byte types.
    "wide": tiny(
        hidden_size=512, intermediate_size=1024, num_heads=8, num_kv_heads=2, head_dim=64,
        vocab_size=1000,
    ),
    "wide-biases": tiny(
        hidden_size=512, intermediate_size=768, num_heads=8, num_kv_heads=4, head_dim=64,
        vocab_size=1024, qkv_bias=True, mlp_bias=True, attention_output_bias=True, qk_norm=True,
    ),
}  # fmt: skip


MODELS |= {
    "experts": tiny(moe=MoeConfig(num_experts=8, top_k=2, expert_size=48, normalize=True)),
    "experts-odd": tiny(
        hidden_size=36, head_dim=6, num_heads=3, num_kv_heads=1,
        moe=MoeConfig(num_experts=5, top_k=3, expert_size=22, dense_layers=(0,)),
    ),
    "experts-shared": tiny(
        moe=MoeConfig(
            num_experts=40, top_k=4, expert_size=32, shared_size=64, shared_gate=True,
        ),
        qkv_clamp=2.0,
    ),
    "sinks-and-limited-experts": tiny(
        attention_sinks=True, window=20, qkv_bias=True, attention_output_bias=True,
        moe=MoeConfig(
            num_experts=6, top_k=2, expert_size=64, normalize=True, router_bias=True,
            expert_bias=True, alpha=1.702, limit=1.0,
        ),
    ),
    "latents": tiny(
        num_kv_heads=1, head_dim=24, rope={"dim": 8},
        latent=LatentConfig(q_rank=40, kv_rank=32, nope_dim=16, rope_dim=8, value_dim=20),
        moe=MoeConfig(
            num_experts=16, top_k=3, expert_size=32, dense_layers=(0,), score="sigmoid",
            normalize=True, scale=2.5, groups=4, kept_groups=2, group_top=2, correction=True,
            shared_size=32,
        ),
    ),
    "latents-wide": tiny(
        num_kv_heads=1, num_heads=2, head_dim=192, rope={"dim": 64}, num_layers=1,
        latent=LatentConfig(q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128),
    ),
}  # fmt: skip
OLMO = tiny(qk_norm=True, qk_norm_span="all", pre_norm=False, post_norm=True)
"""Norms of q and k over all heads, which ranks compute together."""
MODELS["norms-over-heads"] = OLMO


def of_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    return dataclasses.replace(config, dtype=dtype)


SAMPLINGS = {
    "plain": SamplingParams(temperature=1.0, seed=7),
    "hot": SamplingParams(temperature=3.0, seed=2**40 + 3),
    "top-k": SamplingParams(temperature=0.8, top_k=20, seed=1),
    "top-p": SamplingParams(temperature=1.2, top_p=0.7, seed=2),
    "min-p": SamplingParams(temperature=1.5, min_p=0.2, seed=3),
    "penalty": SamplingParams(repetition_penalty=1.4, temperature=0.0),
    "deductions": SamplingParams(frequency_penalty=0.3, presence_penalty=0.2, temperature=0.0),
    "all": SamplingParams(1.3, 0.4, -0.3, 0.9, 40, 0.9, 0.02, 11),
}


class RandomWeights:
    """`Weights` drawn with the spread that params.py gives, from a seed."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def draw(spec: ParamSpec) -> Any:
            dtype = NUMPY_DTYPES[spec.stored_as(config)]
            return (spec.init_mean + spec.init_std * rng.standard_normal(spec.shape)).astype(dtype)

        self.values = {spec.name: draw(spec) for spec in parameters(config).values()}

    def read(self, parameter: Parameter) -> Any:
        return np.concatenate([self.values[name] for name in parameter.parts])


class WholeWeights:
    """Random weights in the place of a checkpoint, for `RankWeights` to take a rank's shares of."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config = config
        self._values = RandomWeights(config, seed).values

    def read(
        self,
        name: str,
        dim: int = 0,
        start: int | None = None,
        stop: int | None = None,
        rows: tuple[int, int] | None = None,
    ) -> Any:
        values = self._values[name] if rows is None else self._values[name][slice(*rows)]
        index = [slice(None)] * values.ndim
        index[dim] = slice(start, stop)
        return np.ascontiguousarray(values[tuple(index)])


def rank_weights(config: ModelConfig, seed: int, topology: Topology, rank: int) -> RankWeights:
    return RankWeights(WholeWeights(config, seed), topology, rank)  # type: ignore[arg-type]


def compile_into(target: Any, graph: Graph, weights: Any, limits: Limits, out: Path) -> Path:
    out.mkdir(parents=True)
    target.compile(graph, weights, limits, out)
    return out


def poison(executable: Any) -> None:
    """Fill the buffers that steps share with NaN, in every dtype: what a step reads before it has
    written it is seen. The step runs on a stream of its own, so the fill must be over first."""
    import torch

    executable.memory.arena.fill_(255)
    if executable.memory.arena.is_cuda:
        torch.cuda.synchronize()


def check_sampling(executable: Any, vocab_size: int, params: SamplingParams, count: int) -> None:
    """The tokens that `count` steps draw are those of the runtime from the same logits."""
    driver = Driver(LIMITS, vocab_size, seed=5, prompts=(30, 9, 60))
    chunks = [30, 9, 60]
    for _ in range(count):
        batch = driver.batch(chunks, params)
        tokens = executable.step(batch).tokens
        logits = executable.last_logits(len(tokens))
        assert tokens.tolist() == sample(logits, batch.sampling).tolist()
        driver.append(tokens.tolist(), [0, 1, 2])
        chunks = [1, 1, 1]


def with_equal_logits(config: ModelConfig) -> RandomWeights:
    """All weights of the head equal: every logit is the same, so only ids break ties."""
    weights = RandomWeights(config, 0)
    weights.values["head.weight"][:] = weights.values["head.weight"][0]
    return weights


def check_ties(executable: Any, vocab_size: int) -> None:
    """Of equal logits (`with_equal_logits`) the same are drawn as by the runtime."""
    for params in (
        SamplingParams(),
        SamplingParams(temperature=1.0, top_p=0.25, seed=5),
        SamplingParams(temperature=1.0, top_k=3, top_p=0.5, seed=6),
    ):
        driver = Driver(LIMITS, vocab_size, seed=5, prompts=(3, 4, 5))
        batch = driver.batch([3, 4, 5], params)
        tokens = executable.step(batch).tokens
        assert tokens.tolist() == sample(executable.last_logits(3), batch.sampling).tolist()


class _Waiting:
    """An executable that does not run ahead."""

    def __init__(self, executable: Any) -> None:
        self.limits, self.step, self.close = executable.limits, executable.step, executable.close


def check_running_ahead(
    executable: Any,
    vocab_size: int,
    count: int,
    *,
    ends_early: bool = True,
    comm: Comm | None = None,
) -> list[tuple[int, ...]]:
    """The tokens of steps that begin before those of the step before are known are the same. Gives
    those of each request, on rank 0; all ranks of `comm` call this.
    ends_early: some of the requests end where a token happens to come, the others at their length.
    The step after such an end has a sequence more when it has begun ahead, so another kernel may
    compute it: tokens are then the same in float32 alone, as logits of two bytes are rounded
    otherwise."""
    rng = np.random.default_rng(6)

    def tokens(most: int) -> list[int]:
        return rng.integers(0, vocab_size, int(rng.integers(1, most))).tolist()

    requests = [
        Request(
            index,
            tuple(tokens(50)),
            int(rng.integers(1, 40)),
            SamplingParams(
                repetition_penalty=1.3 if index % 2 else 1.0,
                # Likes what it has just drawn.
                frequency_penalty=-1.5 if index % 3 < 2 else 0.0,
                temperature=float(index % 3),
                seed=index,
            ),
            eos_token_ids=frozenset(tokens(24)) if ends_early else frozenset(),
        )
        for index in range(count)
    ]
    comm = comm or LocalComm()
    if comm.rank != 0:
        follow(executable, comm)
        follow(_Waiting(executable), comm)
        return []
    ahead, waiting = (
        generate(each, comm, requests, vocab_size=vocab_size)
        for each in (executable, _Waiting(executable))
    )
    assert [c.token_ids for c in ahead] == [c.token_ids for c in waiting]
    assert {c.finish_reason for c in ahead} == ({"eos", "length"} if ends_early else {"length"})
    return [c.token_ids for c in ahead]


class Driver:
    """Makes the steps of a few sequences: prompts cut into chunks, then one token at a time."""

    def __init__(self, limits: Limits, vocab: int, seed: int, prompts: tuple[int, ...]) -> None:
        self.rng = np.random.default_rng(seed)
        self.limits = limits
        self.tokens = [self.rng.integers(vocab, size=n).astype(np.int32) for n in prompts]
        self.prompts = prompts
        self.computed = [0] * len(prompts)
        blocks = self.rng.permutation(limits.num_blocks).astype(np.int32)
        width = limits.max_blocks_per_seq
        self.tables = [blocks[i * 8 : i * 8 + min(width, 8)] for i in range(len(prompts))]

    def batch(self, chunks: list[int], params: SamplingParams | None = None) -> StepBatch:
        """The next `chunks[i]` tokens of sequence i (0: it is not in the step)."""
        chosen = [i for i, count in enumerate(chunks) if count]
        ids, positions, starts, kv_lens = [], [], [0], []
        for i in chosen:
            begin = self.computed[i]
            end = begin + chunks[i]
            ids.append(self.tokens[i][begin:end])
            positions.append(np.arange(begin, end, dtype=np.int32))
            starts.append(starts[-1] + chunks[i])
            kv_lens.append(end)
            self.computed[i] = end
        wanted = [k for k, i in enumerate(chosen) if self.computed[i] == len(self.tokens[i])]
        width = max(-(-n // self.limits.block_size) for n in kv_lens)
        rows = tuple(
            SampleRow(params, len(self.tokens[i]), self.tokens[i], self.prompts[i] // 2)
            for i in (chosen[k] for k in wanted)
        ) if params else ()  # fmt: skip
        return StepBatch(
            token_ids=np.concatenate(ids),
            positions=np.concatenate(positions),
            query_starts=np.array(starts, np.int32),
            kv_lens=np.array(kv_lens, np.int32),
            block_table=np.stack([self.tables[i][:width] for i in chosen]),
            prompt_lens=np.array([self.prompts[i] for i in chosen], np.int32),
            logit_rows=np.array([starts[k + 1] - 1 for k in wanted], np.int32),
            sampling=rows,
        )

    def append(self, tokens: list[int], sequences: list[int]) -> None:
        for sequence, token in zip(sequences, tokens, strict=True):
            grown = np.append(self.tokens[sequence], np.int32(token))
            self.tokens[sequence] = grown


def steps(driver: Driver, decode_steps: int) -> Iterator[StepBatch]:
    """Chunked prefill of three prompts, with a decode step of the first among them, then decode."""
    first, second, third = driver.prompts
    yield driver.batch([first, second // 2, 0])
    driver.append([int(driver.rng.integers(300))], [0])
    yield driver.batch([1, second - second // 2, third])
    driver.append([int(driver.rng.integers(300)) for _ in range(3)], [0, 1, 2])
    for _ in range(decode_steps):
        yield driver.batch([1, 1, 1])
        driver.append([int(driver.rng.integers(300)) for _ in range(3)], [0, 1, 2])


def tolerance(config: ModelConfig, expected: Any) -> float:
    """What rounding explains, by the runtime's own derivation."""
    from llmforge.runtime.verify import logit_tolerance

    return logit_tolerance(config, math.sqrt(float(np.mean(np.square(expected)))))


def _real(hidden: int, heads: int, kv_heads: int, head_dim: int, mlp: int, **changes: Any) -> Any:
    return tiny(
        dtype="bfloat16", num_layers=1, hidden_size=hidden, num_heads=heads,
        num_kv_heads=kv_heads, head_dim=head_dim, intermediate_size=mlp, vocab_size=32000,
        **changes,
    )  # fmt: skip


REAL = (
    _real(4096, 32, 8, 128, 14336),
    _real(2048, 32, 8, 64, 8192),
    _real(3584, 28, 4, 128, 18944, qkv_bias=True),
    _real(2560, 32, 8, 80, 6912, window=4096),
    _real(3072, 32, 32, 96, 8192, qk_norm=True),
)
"""One layer at the shapes of real models."""
