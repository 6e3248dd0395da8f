"""Shards of all ranks put together give the whole, for every parameter of every layout."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmforge.checkpoint.config import LatentConfig, ModelConfig, MoeConfig, RopeConfig
from llmforge.checkpoint.params import parameters
from llmforge.parallel import REPLICATED, Segment, Shard, Topology, cut


def take(array: np.ndarray, shard: Shard, rank: int, ranks: int, groups: int = 1) -> np.ndarray:
    """What `rank` holds, cut the slow and plain way."""
    for dim, pieces in shard.cuts(rank, ranks, groups):
        runs = []
        for piece in pieces:
            run = np.take(array, range(piece.start, piece.stop), axis=dim)
            width = [(0, piece.padding if axis == dim else 0) for axis in range(array.ndim)]
            runs.append(np.pad(run, width))
        array = np.concatenate(runs, axis=dim)
    return array


@st.composite
def layouts(draw: st.DrawFn) -> tuple[ModelConfig, int, int]:
    """A model, a number of ranks that divides it, and a number of groups of them."""
    ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 13) if n % ranks == 0 or ranks % n == 0]))
    per_rank_group = max(1, ranks // kv_heads) if kv_heads < ranks else 1
    heads = kv_heads * per_rank_group * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([2, 4, 10]))
    norm, span = draw(st.sampled_from([("rms", "head"), ("rms", "all"), ("layer", "heads")]))
    config = ModelConfig(
        family="test",
        dtype="float32",
        vocab_size=draw(st.integers(ranks, 40)),
        hidden_size=draw(st.integers(1, 6)),
        num_layers=1,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=ranks * draw(st.integers(1, 5)),
        max_position=8,
        norm_eps=1e-5,
        rope=RopeConfig(1e4, head_dim),
        qkv_bias=draw(st.booleans()),
        attention_output_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        sliding_window=(None,),
        norm=norm,
        norm_bias=draw(st.booleans()),
        qk_norm_span=span,
        qk_norm_bias=draw(st.booleans()),
        learned_positions=draw(st.sampled_from([0, 8])),
        post_norm=draw(st.booleans()),
        gated_mlp=draw(st.booleans()),
        head_bias=draw(st.booleans()),
    )
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4) if ranks % n == 0]))
    if draw(st.booleans()):
        moe = MoeConfig(
            num_experts=groups * draw(st.integers(1, 3)),
            top_k=1,
            expert_size=ranks // groups * draw(st.integers(1, 3)),
            router_bias=draw(st.booleans()),
            correction=draw(st.booleans()),
            expert_bias=draw(st.booleans()),
            shared_size=ranks * draw(st.integers(1, 2)),
            shared_gate=draw(st.booleans()),
        )
        config = replace(config, gated_mlp=True, moe=moe, attention_sinks=draw(st.booleans()))
    if draw(st.booleans()):
        latent = LatentConfig(draw(st.sampled_from([None, 5])), 4, 3, head_dim, 6)
        plain = dict.fromkeys(
            ("qkv_bias", "attention_output_bias", "qk_norm", "attention_sinks"), False
        )
        config = replace(config, latent=latent, num_kv_heads=1, **plain)
    return config, ranks, groups


@given(layouts())
def test_the_shards_of_every_parameter_join_to_the_whole(
    layout: tuple[ModelConfig, int, int],
) -> None:
    config, ranks, groups = layout
    for spec in parameters(config).values():
        assert spec.shard.divides(ranks, groups)
        whole = np.arange(np.prod(spec.shape)).reshape(spec.shape)
        parts = [take(whole, spec.shard, rank, ranks, groups) for rank in range(ranks)]
        for rank, part in enumerate(parts):
            assert part.shape == spec.shard.local_shape(spec.shape, rank, ranks, groups)
            assert part.shape == parts[0].shape, "every rank has the same shape"
        np.testing.assert_array_equal(spec.shard.join(parts, groups), whole)


@given(groups=st.sampled_from([1, 2, 4]), each=st.sampled_from([1, 2, 3]), size=st.integers(1, 3))
def test_every_part_of_an_expert_is_on_one_rank(groups: int, each: int, size: int) -> None:
    """Experts are summed over ranks, so that a part held twice would count twice."""
    ranks, experts = groups * each, groups * 2
    shard = Shard(1, (Segment(each * size), Segment(each * size)), experts)
    whole = np.arange(experts * 2 * each * size).reshape(experts, -1)
    parts = [take(whole, shard, rank, ranks, groups) for rank in range(ranks)]
    held = np.concatenate([part.ravel() for part in parts])
    np.testing.assert_array_equal(np.sort(held), whole.ravel())
    first = [part[0, 0] // whole.shape[1] for part in parts]  # the first expert that a rank holds
    assert first == [rank // each * 2 for rank in range(ranks)], "groups are of neighbours"


def test_experts_that_do_not_divide_are_told() -> None:
    shard = Shard(2, (Segment(6),), 4)
    assert shard.divides(4, 2) and shard.divides(3, 1) and shard.divides(6, 2)
    assert not shard.divides(3, 3), "4 experts among 3 groups"
    assert not shard.divides(8, 2), "6 rows among 4 ranks"


@given(
    ranks=st.sampled_from([1, 2, 4]),
    heads=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 9),
)
def test_a_merged_parameter_joins_to_the_whole(
    ranks: int, heads: int, kv_heads: int, rows: int
) -> None:
    shard = Shard(
        0,
        (
            Segment(heads * ranks * 3, unit=3),
            Segment(kv_heads * 3, unit=3),
            Segment(rows, pad=True),
        ),
    )
    size = sum(segment.size for segment in shard.segments)
    whole = np.arange(size * 2).reshape(size, 2)
    parts = [take(whole, shard, rank, ranks) for rank in range(ranks)]
    np.testing.assert_array_equal(shard.join(parts), whole)


def test_fewer_kv_heads_than_ranks_are_replicated_to_neighbours() -> None:
    shard = cut(0, 2 * 8, unit=8)
    starts = [shard.pieces(rank, 4)[0].start for rank in range(4)]
    assert starts == [0, 0, 8, 8]


def test_units_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 units of 8 do not divide among 2 ranks"):
        cut(0, 3 * 8, unit=8).pieces(0, 2)


def test_a_vocabulary_is_padded_at_the_end_only() -> None:
    pieces = [cut(0, 5, pad=True).pieces(rank, 4)[0] for rank in range(4)]
    assert [(p.start, p.stop, p.padding) for p in pieces] == [
        (0, 2, 0),
        (2, 4, 0),
        (4, 5, 1),
        (5, 5, 2),
    ]
    assert REPLICATED.local_shape((5, 2), 3, 4) == (5, 2)


@given(layers=st.integers(1, 40), stages=st.integers(1, 8), tensor=st.integers(1, 4))
def test_stages_hold_every_layer_once_and_in_order(layers: int, stages: int, tensor: int) -> None:
    topology = Topology(tensor, stages)
    for tensor_rank in range(tensor):
        held = [
            layer
            for stage in range(stages)
            for layer in topology.layers(topology.rank(stage, tensor_rank), layers)
        ]
        assert held == list(range(layers))
    sizes = [len(topology.layers(topology.rank(s, 0), layers)) for s in range(stages)]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
