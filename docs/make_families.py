"""Writes docs/families.md from the registry of families and the cases of the parity suite:
python docs/make_families.py"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/parity"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from models import CASES, Case  # noqa: E402
from references import REFERENCES, Reference  # noqa: E402

from llmforge.checkpoint.config import ModelConfig  # noqa: E402
from llmforge.checkpoint.families import FAMILIES, read_config  # noqa: E402
from llmforge.engine.cuda.target import PTX_ARCH, CudaTarget, programs  # noqa: E402
from llmforge.engine.step import Limits  # noqa: E402
from llmforge.engine.tensorrt.lowering.rank import RankLowering  # noqa: E402
from llmforge.engine.tensorrt.package import Package  # noqa: E402
from llmforge.engine.tensorrt.target import TensorRTTarget  # noqa: E402
from llmforge.errors import LlmforgeError  # noqa: E402
from llmforge.model.decoder import trace  # noqa: E402
from llmforge.model.graph import Parameter  # noqa: E402
from llmforge.parallel import Topology  # noqa: E402
from llmforge.safetensors_io import NUMPY_DTYPES  # noqa: E402

OUTPUT = ROOT / "docs/families.md"
HEAD = """\
# Model families

Written by `python docs/make_families.py`; do not edit.

`llmforge convert` reads these architectures from a Hugging Face directory or Hub id. A family is a
row in `src/llmforge/checkpoint/families/`; what it does differently is a field of `ModelConfig`.
Variants of a family that llmforge does not support are refused by name.

Every case of the parity suite is a tiny random model of transformers in odd sizes. Greedy tokens in
float32 are those of transformers, with prompts cut into chunks; logits in float32, bfloat16 and
float16 are within what rounding explains; and two tensor-parallel ranks, and two pipeline stages,
give the tokens of one. Weights of norms that a family stores less one (Gemma, Nemotron) are stored
whole, and families that rotate neighbouring elements have their q and k rows reordered, so that
targets see one kind of norm and one kind of rope.

Mixtures of experts are also compared with their experts on two groups of ranks (`--expert-
parallel 2`), of one and of two ranks each. In 16 bits their cases choose every expert: which of
two experts that are nearly as good is chosen hangs on the last bit, and behind another choice no
tolerance holds. Weights in FP8 with a scale for each block of 128 x 128 (`quant_method` "fp8")
are converted for every family, MXFP4 where the table says so; other quantized weights are refused
by name.

The columns of targets say whether each lowers the cases' models on one rank, found by lowering them
(cuda to kernels; tensorrt to networks of TensorRT-RTX, of native layers and of primitives). Cases
in *italics* are of families whose code is not in transformers but beside their weights, where it
is never executed: they are compared with plain torch, written from the public definition
(`tests/parity/references.py`), also on two tensor-parallel ranks and two pipeline stages.

| family | architecture | what is particular | parity cases | cpu | cuda | tensorrt |
|---|---|---|---|---|---|---|
"""
LIMITS = Limits(2, 32, 16, 32, 2)


class _Zeros:
    """Weights for a target that only lowers."""

    def read(self, parameter: Parameter) -> Any:
        return np.zeros(parameter.sizes, NUMPY_DTYPES[parameter.dtype])

    map = read

    def release(self) -> None:
        pass

    def report(self, fraction: float) -> None:
        pass


def _config_of(case: Case | Reference) -> ModelConfig:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "config.json"
        if isinstance(case, Reference):
            path.write_text(json.dumps({"dtype": "float16", **case.config}))
        else:
            model = case.build(torch.float16)
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(path.parent)
        return read_config(path)[1]


def _cuda(config: ModelConfig) -> None:
    programs(CudaTarget().prepare(trace(config, Topology(), 0)), LIMITS, PTX_ARCH)


def _tensorrt(config: ModelConfig) -> None:
    package = Package.load("tensorrt-rtx")
    graph = TensorRTTarget("tensorrt-rtx", package=package).prepare(trace(config, Topology(), 0))
    for primitives in (False, True):
        for _ in RankLowering(graph, LIMITS, _Zeros(), package, primitives=primitives).engines():
            pass


def _cell(cases: list[tuple[str, ModelConfig]], lower: Callable[[ModelConfig], None]) -> str:
    """yes, or the reasons for which the target refuses cases."""
    reasons: dict[str, list[str]] = {}
    for name, config in cases:
        try:
            lower(config)
        except LlmforgeError as error:
            reasons.setdefault(str(error), []).append(name)
    told = [
        f"no: {reason}" if len(names) == len(cases) else f"not {', '.join(names)}: {reason}"
        for reason, names in reasons.items()
    ]
    return "; ".join(told) or "yes"


@functools.cache
def table() -> str:
    """The whole file."""
    rows = []
    every: list[Case | Reference] = [*CASES, *REFERENCES]
    for family in FAMILIES:
        cases = [case for case in every if case.model_type in family.model_types]
        assert cases, f"{family.name} has no case in the parity suite"
        configs = [(case.name, _config_of(case)) for case in cases]
        names = (f"*{c.name}*" if isinstance(c, Reference) else c.name for c in cases)
        cells = (
            family.name,
            f"`{family.architectures[0]}`",
            family.features,
            ", ".join(names),
            "yes",
            _cell(configs, _cuda),
            _cell(configs, _tensorrt),
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    OUTPUT.write_text(table())
