"""Where wide_attention.cu is used, and that its products are not serialised."""

from __future__ import annotations

import dataclasses

import pytest
from compiling import compile_all
from cuda_models import LIMITS, MODELS, REAL, of_dtype

from llmforge.checkpoint.config import ModelConfig
from llmforge.engine.cuda.program import Program
from llmforge.engine.cuda.state import MEASURED, KernelChoice
from llmforge.engine.cuda.target import CudaTarget, programs
from llmforge.kernels import compile as compiler
from llmforge.kernels.launch import Launch
from llmforge.kernels.wide_attention import wide_attention_plan
from llmforge.model.decoder import trace
from llmforge.parallel import Topology


def lowered(
    config: ModelConfig, arch: str = "sm_90", choice: KernelChoice = MEASURED
) -> list[Program]:
    graph = CudaTarget().prepare(trace(config, Topology(), 0))
    return programs(graph, LIMITS, arch, choice=choice)


def entries(program: Program) -> list[str]:
    return [i.call.kernel.entry for i in program.instructions if isinstance(i.call, Launch)]


def test_every_program_but_those_of_decode_steps_uses_it() -> None:
    found = lowered(REAL[0])
    assert {p.shape.decode for p in found} == {True, False}
    for program in found:
        wide = entries(program).count("wide_attention")
        assert wide == (0 if program.shape.decode else REAL[0].num_layers)
        # What there is to do is listed once, beside what comes before attention.
        assert entries(program).count("attention_plan") == (wide > 0)
        if wide:
            plan = program.instructions[entries(program).index("attention_plan")]
            assert plan.beside and program.joins > program.beside


def test_each_window_has_its_list() -> None:
    config = dataclasses.replace(
        of_dtype(MODELS["llama"], "bfloat16"), num_layers=3, sliding_window=(None, 13, None)
    )
    (program,) = (p for p in lowered(config) if not p.shape.decode)
    assert entries(program).count("attention_plan") == 2
    assert entries(program).count("wide_attention") == 3


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120", "compute_80"])
def test_other_gpus_do_not(arch: str) -> None:
    assert not any("wide_attention" in entries(program) for program in lowered(REAL[0], arch))


def test_the_choice_of_the_other_kernel() -> None:
    found = lowered(REAL[0], choice=KernelChoice(prompts="attention"))
    assert not any("wide_attention" in entries(program) for program in found)


@pytest.mark.parametrize("name", ["llama", "alibi-parallel", "sinks-and-limited-experts"])
def test_float32_slopes_and_sinks_are_left_to_others(name: str) -> None:
    config = MODELS[name] if name == "llama" else of_dtype(MODELS[name], "bfloat16")
    assert not any("wide_attention" in entries(program) for program in lowered(config))


def test_which_caches_are_taken() -> None:
    def stages(head_dim: int, block_size: int = 32, group: int = 4) -> tuple[int, int, int] | None:
        plan = wide_attention_plan("bfloat16", 8 * group, 8, head_dim, block_size)
        return plan.stages if plan else None

    assert stages(128) == (3, 2, 2)
    assert stages(64) == (4, 4, 2)
    assert stages(256) == (3, 2, 1)
    assert stages(80) == stages(96) == stages(128)
    assert stages(72) is None and stages(272) is None, "whole 16 elements, at most 256"
    assert stages(128, 8) and stages(128, 16) and stages(128, 256)
    assert stages(128, 20) is None and stages(128, 4) is None, "copies fill whole tiles"
    assert stages(128, 192) is None
    assert stages(128, group=64) and stages(128, group=65) is None
    for head_dim in range(16, 257, 16):
        plan = wide_attention_plan("float16", 8, 8, head_dim, 16)
        assert plan and plan.shared_bytes <= 227 << 10


@pytest.mark.skipif(compiler.unavailable() is not None, reason="needs NVRTC")
def test_products_are_not_serialised() -> None:
    models = [REAL[0], *(of_dtype(MODELS[n], "float16") for n in ("head-dim-256", "head-dim-80"))]
    models += [of_dtype(MODELS[n], "bfloat16") for n in ("head-dim-128", "scaled-and-capped")]
    calls = [i.call for m in models for p in lowered(m) for i in p.instructions]
    specs = {call.kernel for call in calls if isinstance(call, Launch)}
    wide = sorted((s for s in specs if s.entry == "wide_attention"), key=lambda spec: spec.key)
    assert len(wide) == len(models)
    for compiled in compile_all(wide, "sm_90"):
        assert "C75" not in compiled.log and compiled.spill_bytes == 0, compiled.log
