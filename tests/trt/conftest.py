"""Makes the helpers of tests/, of tests/parity and of this directory importable."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for directory in (HERE, HERE.parent / "parity", HERE.parent):
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))

pytest.importorskip("tensorrt_rtx", reason="needs pip install 'llmforge[tensorrt-rtx]'")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models here are too small to share among threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_at_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What executables keep from run to run goes into a directory of the test's."""
    from llmforge.engine.tensorrt import cache_file

    monkeypatch.setattr(cache_file, "DEFAULT_CACHE", tmp_path_factory.mktemp("cache") / "x")
