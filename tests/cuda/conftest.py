"""GPU tests run where there is a GPU, and are skipped by name elsewhere."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU and a CUDA build of torch")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
