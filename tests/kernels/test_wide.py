"""Where wide_gemm.cu is used, and that its products are not serialised."""

from __future__ import annotations

import dataclasses

import pytest
from compiling import compile_all
from cuda_models import LIMITS, REAL

from llmforge.engine.cuda.program import Program
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.engine.step import Limits
from llmforge.kernels import compile as compiler
from llmforge.kernels.launch import Launch
from llmforge.model.decoder import trace
from llmforge.parallel import Topology

MANY = dataclasses.replace(LIMITS, max_batch_size=192, max_num_tokens=512, num_blocks=2000)


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


def test_steps_of_17_to_128_tokens_and_short_prompts_use_it() -> None:
    general, decodes = lowered(MANY)
    counts = {tokens: len(wide_products(program)) for tokens, program in decodes.items()}
    assert counts == {tokens: 5 * (17 <= tokens <= 128) for tokens in counts}
    assert {16, 24, 128, 192} <= set(counts)
    # The head has one row of a prompt, whatever the prompt's length is.
    assert [(p.shape.tokens, len(wide_products(p))) for p in general] == [(512, 0), (128, 4)]


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
    specs = {call.kernel for tokens in (24, 128) for call in wide_products(decodes[tokens])}
    for compiled in compile_all(sorted(specs, key=lambda spec: spec.key), "sm_90"):
        assert "C75" not in compiled.log and compiled.spill_bytes == 0, compiled.log
