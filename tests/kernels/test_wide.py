"""Where wide_gemm.cu is used, and that its products are not serialised."""

from __future__ import annotations

import dataclasses

import pytest
from compiling import compile_all
from cuda_models import LIMITS, MODELS, REAL, of_dtype

from llmforge.engine.cuda.program import Program
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.engine.step import Limits
from llmforge.kernels import compile as compiler
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

MANY = dataclasses.replace(LIMITS, max_batch_size=320, max_num_tokens=512, num_blocks=3000)
SOME_SPILL = 16  # bytes, of three warpgroups that add the parts of a tile of 128 features


def lowered(
    limits: Limits, arch: str = "sm_90", choice: KernelChoice = MEASURED
) -> tuple[list[Program], dict[int, Program]]:
    """The programs of any step and of decode steps, of one layer of a real model."""
    config = dataclasses.replace(REAL[0], num_layers=1, sliding_window=(None,))
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    found = programs(graph, limits, arch, choice=choice)
    general = [p for p in found if not p.shape.decode]
    return general, {p.shape.tokens: p for p in found if p.shape.decode}


def wide_products(program: Program) -> list[Launch]:
    launches = [i.call for i in program.instructions if isinstance(i.call, Launch)]
    return [call for call in launches if call.kernel.entry == "wide_gemm"]


def test_steps_of_more_than_8_tokens_and_short_prompts_use_it() -> None:
    general, decodes = lowered(MANY)
    counts = {tokens: len(wide_products(program)) for tokens, program in decodes.items()}
    assert counts == {tokens: 5 if 9 <= tokens <= 192 else int(tokens == 256) for tokens in counts}
    assert {8, 16, 24, 128, 192, 256, 320} <= set(counts)
    (gated,) = wide_products(decodes[256])
    assert dict(gated.kernel.defines)["GATED"]
    # The head has one row of a prompt, whatever the prompt's length is.
    assert [(p.shape.tokens, len(wide_products(p))) for p in general] == [(512, 0), (128, 4)]


def norms(program: Program) -> tuple[int, list[tuple[int, int]]]:
    """Kernels of norms; and of each product NORM and WEIGHS."""
    launches = [i.call for i in program.instructions if isinstance(i.call, Launch)]
    defines = [dict(call.kernel.defines) for call in wide_products(program)]
    kernels = sum(call.kernel.entry == "rms_norm" for call in launches)
    return kernels, [(d["NORM"] > 0, d["WEIGHS"]) for d in defines]


def test_norms_between_products_are_in_them() -> None:
    general, decodes = lowered(MANY)
    products = [(0, 0), (0, 1), (1, 0), (0, 1), (1, 0)]  # q|k|v, o, gate|up, down, the head
    assert norms(decodes[32]) == norms(decodes[192]) == (1, products)
    # The head reads some rows of the last sum, so that norm is a kernel.
    assert norms(general[1]) == (2, [(0, 0), (0, 1), (1, 0), (0, 0)])
    # Where a product before or behind is the library's, too.
    assert norms(decodes[256]) == (3, [(0, 0)])


def test_norms_of_float16_and_of_all_features_of_ranks_are_kernels() -> None:
    half = dataclasses.replace(REAL[0], dtype="float16", num_layers=1, sliding_window=(None,))
    for config, topology in ((half, Topology()), (REAL[0], Topology(2, 1))):
        graph = CudaTarget().prepare(trace(config, topology, 0))
        found = {p.shape.tokens: p for p in programs(graph, MANY, "sm_90") if p.shape.decode}
        assert not any(norm or weighs for norm, weighs in norms(found[32])[1])


def test_a_norm_of_two_uses_is_a_kernel() -> None:
    """The router of a mixture reads it too."""
    config = of_dtype(MODELS["experts"], "bfloat16")
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    found = {p.shape.tokens: p for p in programs(graph, MANY, "sm_90") if p.shape.decode}
    kernels, products = norms(found[32])
    assert kernels > config.num_layers and (0, 0) in products


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120", "compute_80"])
def test_other_gpus_do_not(arch: str) -> None:
    general, decodes = lowered(MANY, arch)
    assert not any(wide_products(program) for program in (*general, *decodes.values()))
    assert len(general) == 1


def test_the_choice_of_the_library() -> None:
    general, decodes = lowered(MANY, choice=KernelChoice(many_rows="torch"))
    assert not any(wide_products(program) for program in (*general, *decodes.values()))
    assert len(general) == 1


@pytest.mark.skipif(compiler.unavailable() is not None, reason="needs NVRTC")
def test_products_are_not_serialised() -> None:
    _, decodes = lowered(MANY)
    sizes = (16, 24, 128, 192, 256)
    specs = {call.kernel for tokens in sizes for call in wide_products(decodes[tokens])}
    for compiled in compile_all(sorted(specs, key=lambda spec: spec.key), "sm_90"):
        assert "C75" not in compiled.log and compiled.spill_bytes <= SOME_SPILL, compiled.log
