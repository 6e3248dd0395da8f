"""docs/families.md is what the registry and this suite say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_table_of_families_is_up_to_date() -> None:
    pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.bindings")
    script = runpy.run_path(str(DOCS / "make_families.py"))
    written = (DOCS / "families.md").read_text()
    assert written == script["table"](), "run: python docs/make_families.py"
