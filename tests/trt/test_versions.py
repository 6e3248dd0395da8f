"""Each published generation of TensorRT: what the package, the lowering, the builder and the
executable use of its bindings exists in them, and gives the same tokens (on an emulation)."""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated_target import Rig
from published import VERSIONS, Module, NotPublished, WrongCall
from test_emulated_serving import LIMITS, by_cpu, requests_of
from test_emulated_tensorrt import Rig as EmulatedEngineRig
from tiny_models import ONE, OWN, MemoryCheckpoint, config_of

from llmforge.engine.tensorrt.network import Network
from llmforge.errors import BuildError
from llmforge.parallel import Topology


@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_gives_the_tokens_of_the_cpu_target(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = MemoryCheckpoint(config_of("qwen3"))
    requests = requests_of(checkpoint.config.vocab_size)[:4]
    expected = by_cpu(tmp_path, checkpoint, requests)
    vocab_size = checkpoint.config.vocab_size
    rig = Rig(monkeypatch, version)
    for primitives in (False, True):
        out = tmp_path / str(primitives)
        rig.build(out, checkpoint, LIMITS, ONE, primitives=primitives)
        assert rig.serve(out, ONE, LIMITS, requests, vocab_size) == expected


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", [*(n for n in OWN if "mixture" in n), "mixtral", "deepseek-v3"])
def test_mixtures_as_8_6_has_them(
    name: str, ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without TopK, which its compiler crashes on, and with experts side by side."""
    checkpoint, topology = MemoryCheckpoint(config_of(name)), Topology(ranks, 1)
    requests = requests_of(checkpoint.config.vocab_size)[:3]
    rig = Rig(monkeypatch, "8.6")
    monkeypatch.setattr(Network, "top_k", None)
    rig.build(tmp_path, checkpoint, LIMITS, topology)
    tokens = rig.serve(tmp_path, topology, LIMITS, requests, checkpoint.config.vocab_size)
    assert tokens == by_cpu(tmp_path, checkpoint, requests)


@pytest.mark.parametrize("version", ["8.6", "10.13", "10.16", "11.1"])
def test_two_ranks_in_every_kind_of_generation(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments before 10.16, collectives in the engine from then on."""
    checkpoint, two = MemoryCheckpoint(config_of("llama")), Topology(2, 1)
    requests = requests_of(checkpoint.config.vocab_size)[:4]
    rig = Rig(monkeypatch, version)
    rig.build(tmp_path, checkpoint, LIMITS, two)
    tokens = rig.serve(tmp_path, two, LIMITS, requests, checkpoint.config.vocab_size)
    assert tokens == by_cpu(tmp_path, checkpoint, requests)
    engines = len(list((tmp_path / "rank0").glob("*.engine")))
    assert (engines == 1) == (version in ("10.16", "11.1"))


def test_bfloat16_needs_a_version_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = MemoryCheckpoint(config_of("llama", "bfloat16"))
    with pytest.raises(BuildError, match=r"8\.6.* cannot compute in bfloat16.*float16"):
        Rig(monkeypatch, "8.6").build(tmp_path / "old", checkpoint, LIMITS, ONE)
    Rig(monkeypatch, "10.0").build(tmp_path / "new", checkpoint, LIMITS, ONE)


def test_the_record_refuses_what_a_version_does_not_have() -> None:
    old, new = Module("8.6"), Module("11.1")
    assert hasattr(new.INetworkDefinition, "add_attention_v2")
    assert not hasattr(old.INetworkDefinition, "add_attention_v2")
    assert not hasattr(old.DataType, "BF16") and hasattr(new.DataType, "BF16")
    assert not hasattr(old, "IStreamWriter") and not hasattr(new.BuilderFlag, "FP16")
    with pytest.raises(NotPublished):
        _ = new.ComputeCapability
    import tensorrt_rtx
    from hand_made import Hand
    from published import Shown

    network = Shown(old.api, Hand().net)
    x = network.add_input("x", tensorrt_rtx.float32, (2, 3))
    with pytest.raises(WrongCall, match="add_cast takes"):
        network.add_cast(x)
    with pytest.raises(WrongCall, match="add_topk takes"):
        network.add_topk(x, tensorrt_rtx.TopKOperation.MAX, 1, 2, tensorrt_rtx.int64)
    with pytest.raises(NotPublished, match="metadata_"):
        network.add_identity(x).metadata_ = "x"


def test_emulated_engines_have_what_the_version_publishes() -> None:
    rig = EmulatedEngineRig("11.1")
    assert rig.engine.device_memory_size_v2 and rig.context().execute_async_v3
    for name in ("device_memory_size", "create_execution_context_without_device_memory"):
        assert not hasattr(rig.engine, name), f"11.1 publishes no {name}"
    with pytest.raises(WrongCall):
        rig.engine.create_execution_context(1, 2)
    with pytest.raises(NotPublished):
        rig.context().set_shapes = 1
