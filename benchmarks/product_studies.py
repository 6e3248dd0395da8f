"""What `cuda_products.py` compares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from llmforge.engine.cuda.state import KernelChoice
from llmforge.engine.step import Limits
from llmforge.kernels.gemv import GemvTuning
from llmforge.kernels.rows import RowsTuning

TUNINGS = {
    "gemv": GemvTuning(),
    "no early copies": GemvTuning(early=False),
    "next starts with x": GemvTuning(release="with x"),
    "next starts with copies": GemvTuning(release="with copies"),
    "weights kept in L2": GemvTuning(evict_first=False),
    "4 warps, 3 x 8 KB": GemvTuning(warps=4, piece=8192),
    "4 warps, 6 x 4 KB": GemvTuning(warps=4, stages=6),
    "6 warps, 2 x 8 KB": GemvTuning(warps=6, piece=8192, stages=2),
    "8 warps, 6 x 2 KB": GemvTuning(piece=2048, stages=6),
    "12 warps, 2 x 4 KB": GemvTuning(warps=12, stages=2),
    "8 warps, 2 x 4 KB": GemvTuning(stages=2),
    "2 blocks, 4 warps, 3 x 4 KB": GemvTuning(warps=4, blocks=2),
}
VARIANTS = {
    "stream_gemm": KernelChoice("stream_gemm"),
    "torch": KernelChoice("torch"),
    **{name: KernelChoice("gemv", tuning) for name, tuning in TUNINGS.items()},
}
ROWS_TUNINGS = {
    "rows_gemm": RowsTuning(),
    "2 slots of 2 KB": RowsTuning(stages=2),
    "4 slots of 2 KB": RowsTuning(stages=4),
    "6 slots of 1 KB": RowsTuning(piece=1024, stages=6),
}
FEW_ROWS = {
    "stream_gemm": KernelChoice(few_rows="stream_gemm"),
    "torch": KernelChoice(few_rows="torch"),
    **{
        name: KernelChoice(few_rows="rows_gemm", rows=tuning)
        for name, tuning in ROWS_TUNINGS.items()
    },
    "rows_gemm, fused attention": KernelChoice(few_rows="rows_gemm", attention="fused"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """What is compared: the variants, of which those of the kernel `entry` are checked, in steps of
    at most so many rows."""

    entry: str
    variants: Mapping[str, KernelChoice]
    rows: int = 1

    @property
    def batches(self) -> tuple[int, ...]:
        smaller = (size for size in (2, 4, 8) if size < self.rows)
        return (*smaller, self.rows)

    @property
    def limits(self) -> Limits:
        return Limits(self.rows, 384, 128, 32, 12 * self.rows)

    def checks(self, choice: KernelChoice) -> bool:
        """Whether the variant's products are those of the kernel."""
        return self.entry == (choice.one_row if self.rows == 1 else choice.few_rows)


def study_of(rows: int) -> Study:
    return Study("gemv", VARIANTS) if rows == 1 else Study("rows_gemm", FEW_ROWS, rows)
