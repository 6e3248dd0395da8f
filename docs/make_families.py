"""Writes docs/families.md from the registry of families and the cases of the parity suite:
python docs/make_families.py"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/parity"))

from models import CASES  # noqa: E402

from llmforge.checkpoint.families import FAMILIES  # noqa: E402

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

The target `cuda` builds all of them (`tests/parity/test_cuda_builds.py`); docs/cuda.md says what of
it has been executed.

| family | architecture | what is particular | parity cases | cpu | cuda |
|---|---|---|---|---|---|
"""


def table() -> str:
    """The whole file."""
    rows = []
    for family in FAMILIES:
        cases = [case.name for case in CASES if case.model_type in family.model_types]
        assert cases, f"{family.name} has no case in the parity suite"
        cells = (
            family.name,
            f"`{family.architectures[0]}`",
            family.features,
            ", ".join(cases),
            "yes",
            "yes",
        )
        rows.append(f"| {' | '.join(cells)} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    OUTPUT.write_text(table())
