"""Makes the helpers of tests/, of tests/parity and of this directory importable."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for directory in (HERE, HERE.parent / "parity", HERE.parent):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

pytest.importorskip("tensorrt_rtx", reason="needs pip install 'llmforge[tensorrt-rtx]'")
