"""The limits of an engine: what a model's positions allow."""

from __future__ import annotations

import dataclasses

import pytest

from llmforge.artifact import no_warning
from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.build import resolve_limits
from llmforge.errors import SettingsError
from llmforge.settings import BuildSettings

CONFIG = ModelConfig(
    family="test",
    dtype="float32",
    vocab_size=99,
    hidden_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=4,
    head_dim=12,
    intermediate_size=64,
    max_position=128,
    norm_eps=1e-5,
    rope=None,
    sliding_window=(None,),
    learned_positions=128,
)


def test_a_sequence_is_not_longer_than_the_table_of_positions() -> None:
    assert resolve_limits(CONFIG, BuildSettings(), no_warning).max_seq_len == 128
    beyond = BuildSettings(max_seq_len=129)
    with pytest.raises(SettingsError, match="beyond the 128 positions"):
        resolve_limits(CONFIG, beyond, no_warning)
    alibi = dataclasses.replace(CONFIG, learned_positions=0, alibi_slopes=(0.5,) * 4)
    warnings: list[str] = []
    assert resolve_limits(alibi, beyond, warnings.append).max_seq_len == 129
    assert "may degrade" in warnings[0]


def test_a_linear_cache_has_a_slot_for_each_sequence() -> None:
    settings = BuildSettings(max_batch_size=3, max_seq_len=50)
    limits = resolve_limits(CONFIG, settings, no_warning, linear_cache=True)
    assert (limits.block_size, limits.num_blocks, limits.max_blocks_per_seq) == (64, 3, 1)
    assert limits.max_seq_len == 50
    blocked = resolve_limits(CONFIG, settings, no_warning)
    assert (blocked.block_size, blocked.num_blocks) == (32, 6)
