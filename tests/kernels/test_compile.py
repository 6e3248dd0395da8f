"""Every kernel compiles for every architecture, without a GPU."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest
from compiling import compile_all

from llmforge.kernels import compile as compiler
from llmforge.kernels.compile import CompileError, KernelSpec, compile_kernel, source_texts

pytestmark = pytest.mark.skipif(
    compiler.unavailable() is not None, reason="needs NVRTC: pip install 'llmforge[cuda]'"
)

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
# Kernels that may spill, and how many bytes: fragments of 16 rows by 128 elements, keys and values
# take all registers that two blocks a multiprocessor leave; what is kept over the calls of exp and
# log, which greedy rows do not reach.
SPILLS = {"attention": 64, "sample": 96}
FEW_SEQUENCES_SPILL = 64  # decode_attention's blocks of 8 warps, which leave half to the products'
# A word of wide_gemm's, stored and loaded once: three warpgroups leave a lane 128 registers, half
# of them for a wide tile's sums, and a product that weighs keeps the norm's weights beside these.
WIDE_SPILL = 8


def allowed_spill(spec: KernelSpec) -> int:
    if spec.entry == "decode_attention" and ("WARPS", 8) in spec.defines:
        return FEW_SEQUENCES_SPILL
    if spec.entry == "wide_gemm" and {("ROWS", 192), ("WEIGHS", 1)} <= set(spec.defines):
        return WIDE_SPILL
    return SPILLS.get(spec.entry, 0)


def kernels_of_models(arch: str) -> dict[str, KernelSpec]:
    from cuda_models import MODELS, OLMO, REAL, of_dtype

    from llmforge.engine.cuda.state import KernelChoice
    from llmforge.engine.cuda.target import CudaTarget, engine_kernels
    from llmforge.engine.step import Limits
    from llmforge.kernels.decode_attention import DecodeTuning
    from llmforge.model.decoder import trace
    from llmforge.parallel import Topology

    limits = Limits(8, 128, 128, 16, 64)
    found: dict[str, KernelSpec] = {}
    names = (
        "layer-norm",
        "scaled-and-capped",
        "alibi-parallel",
        "dynamic-rope",
        "all-biases",
        "experts",
        "experts-shared",
        "sinks-and-limited-experts",
        "latents",
        "latents-wide",
    )
    for config in [*REAL, *(MODELS[name] for name in names)]:
        graph = CudaTarget().prepare(trace(config, Topology(), 0))
        found.update(engine_kernels(graph, limits, arch))
    for config, layout in ((REAL[0], (4, 1)), (MODELS["all-biases"], (2, 2)), (OLMO, (2, 1))):
        # With prompts so long that ranks share the work of an all-reduce.
        longer = dataclasses.replace(limits, max_num_tokens=2048)
        for rank in range(layout[0] * layout[1]):
            graph = CudaTarget().prepare(trace(config, Topology(*layout), rank))
            found.update(engine_kernels(graph, longer, arch))
    many = dataclasses.replace(limits, max_batch_size=256, max_num_tokens=256, num_blocks=256)
    for config in (REAL[0], REAL[2]):
        graph = CudaTarget().prepare(trace(config, Topology(), 0))
        for key, spec in engine_kernels(graph, many, arch).items():
            if spec.entry == "wide_gemm" and dict(spec.defines)["ROWS"] in (192, 256):
                found[key] = spec
    wide = of_dtype(MODELS["head-dim-256"], "bfloat16")
    capped = dataclasses.replace(wide, attention_softcap=50.0, attention_sinks=True)
    for config in (*REAL, wide, capped):
        graph = CudaTarget().prepare(trace(config, Topology(), 0))
        choices = [KernelChoice(decode=DecodeTuning(warps=warps)) for warps in (1, 2, 4, 8)]
        for choice in (*choices, KernelChoice(attention="separate")):
            kernels = engine_kernels(graph, limits, arch, choice)
            found |= {key: spec for key, spec in kernels.items() if "attention" in spec.entry}
    assert {
        "decode_attention",
        "decode_plan",
        "all_reduce",
        "all_gather",
        "broadcast",
        "send",
        "receive",
        "rms_norm_by",
    } <= {spec.entry for spec in found.values()}
    return found


@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_compiles_without_unexpected_spills(arch):
    kernels = list(kernels_of_models(arch).values())
    compiled = compile_all(kernels, arch)
    spills = {
        (spec.entry, spec.defines): result.spill_bytes
        for spec, result in zip(kernels, compiled, strict=True)
        if result.spill_bytes > allowed_spill(spec)
    }
    assert not spills
    assert all(result.image.startswith(b"\x7fELF") for result in compiled)


RELU = KernelSpec(
    "elementwise.cu",
    "elementwise",
    (("ACTIVATION_RELU", 1), ("DTYPE_FLOAT32", 1), ("FEATURES", 64), ("OP_ACTIVATION", 1),
     ("THREADS", 64), ("WIDTH", 1)),
)  # fmt: skip


def test_ptx():
    assert b".target sm_80" in compile_kernel(RELU, "compute_80").image


def test_results_are_kept_by_source_flags_and_arch(tmp_path, monkeypatch):
    first = compile_kernel(RELU, "sm_90", tmp_path)
    monkeypatch.setattr(compiler, "_compile", None)  # calling it again would fail
    assert compile_kernel(RELU, "sm_90", tmp_path) == first
    with pytest.raises(TypeError):
        compile_kernel(RELU, "sm_80", tmp_path)
    wider = KernelSpec(RELU.source, RELU.entry, (*RELU.defines, ("UNUSED", 1)))
    with pytest.raises(TypeError):
        compile_kernel(wider, "sm_90", tmp_path)
    monkeypatch.setattr(compiler, "compiler_version", lambda: "99.0")
    with pytest.raises(TypeError):
        compile_kernel(RELU, "sm_90", tmp_path)


@pytest.mark.parametrize("broken", ["directory", "disk"])
def test_where_nothing_can_be_kept_kernels_compile_nevertheless(broken, tmp_path, monkeypatch):
    if broken == "directory":
        cache = tmp_path / "file" / "cache"
        cache.parent.touch()
    else:
        cache = tmp_path / "cache"

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
    assert compile_kernel(RELU, "sm_90", cache).image == compile_kernel(RELU, "sm_90").image
    assert {path.suffix for path in cache.glob("*")} <= {".lock"}


def test_a_kernel_is_another_where_its_code_is(monkeypatch):
    before = source_texts(RELU.source)

    def key(edit):
        texts = {name: edit(text) for name, text in before.items()}
        monkeypatch.setattr(compiler, "source_texts", lambda name: texts)
        compiler._code.cache_clear()
        return RELU.key

    assert key(lambda text: text + b"\n\n  // more is said\n") == key(lambda text: text) == RELU.key
    others = {
        key(lambda text: text.replace(b"THREADS", b"WARPS")),
        key(lambda text: text + b"struct More {};"),
        key(lambda text: text),
    }
    assert len(others) == 3
    monkeypatch.undo()
    compiler._code.cache_clear()
    assert RELU.key in others


def test_the_log_travels_in_the_error():
    broken = KernelSpec(RELU.source, RELU.entry, (("THREADS", 64),))
    with pytest.raises(CompileError, match="elementwise does not compile for sm_90") as caught:
        compile_kernel(broken, "sm_90")
    assert "DTYPE_BFLOAT16" in caught.value.log


def test_an_engine_has_the_kernels_of_the_architectures_asked_for(tmp_path):
    from cuda_models import LIMITS, MODELS, RandomWeights

    from llmforge.engine.cuda.target import CudaTarget
    from llmforge.errors import BuildError
    from llmforge.model.decoder import trace
    from llmforge.parallel import Topology
    from llmforge.settings import BuildSettings

    config = MODELS["llama"]
    target = CudaTarget(cache=tmp_path / "cache").configured(BuildSettings(arch=("sm_89",)))
    graph = target.prepare(trace(config, Topology(), 0))
    target.compile(graph, RandomWeights(config, 0), LIMITS, tmp_path)
    suffixes = {path.name.split(".", 1)[1] for path in (tmp_path / "kernels").iterdir()}
    assert suffixes == {"sm_89.cubin", "ptx"}
    for unknown in ("sm_5", "sm_75"):
        expected = f"cannot build for the architecture '{unknown}'; allowed: sm_80, sm_"
        with pytest.raises(BuildError, match=expected):
            CudaTarget().configured(BuildSettings(arch=("sm_80", unknown)))
