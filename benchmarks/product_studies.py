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
    "8 warps, 3 x 2 KB": GemvTuning(stages=3, narrow=0),
    "8 warps, 4 x 2 KB": GemvTuning(narrow=0),
    "8 warps, 6 x 2 KB": GemvTuning(stages=6),
    "8 warps, 2 x 4 KB": GemvTuning(piece=4096, stages=2, narrow=0),
    "12 warps, 4 x 2 KB": GemvTuning(warps=12, narrow=0),
    "16 warps, 4 x 1 KB": GemvTuning(warps=16, piece=1024, narrow=0),
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
    "rows_gemm, separate attention": KernelChoice(few_rows="rows_gemm", attention="separate"),
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
