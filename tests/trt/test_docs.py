"""docs/tensorrt.md's tables are what the lowering table, the tests and the results say."""

from __future__ import annotations

import runpy
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def test_the_tables_are_up_to_date() -> None:
    script = runpy.run_path(str(DOCS / "make_tensorrt.py"))
    written = (DOCS / "tensorrt.md").read_text()
    assert written == script["page"](written), "run: python docs/make_tensorrt.py"
