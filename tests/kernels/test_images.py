"""Which of an engine's kernels a GPU gets."""

from __future__ import annotations

import pytest

from llmforge.kernels.images import PTX_ARCH, best_arch, image_name, read_images


@pytest.mark.parametrize(
    ("archs", "capability", "expected"),
    [
        ("sm_80 sm_90", (9, 0), "sm_90"),
        ("sm_80 sm_90", (8, 9), "sm_80"),  # of the same major version, and later
        ("sm_80 sm_86", (8, 9), "sm_86"),
        ("sm_86", (8, 0), PTX_ARCH),
        ("sm_90", (8, 9), PTX_ARCH),
        ("sm_80 sm_90", (10, 0), PTX_ARCH),
        ("sm_100 sm_120", (12, 1), "sm_120"),
        ("sm_90 sm_90a", (9, 0), "sm_90a"),
        ("sm_100a", (10, 0), "sm_100a"),
        ("sm_100a", (10, 3), PTX_ARCH),
        ("sm_100 sm_100a", (10, 3), "sm_100"),
    ],
)
def test_the_best_of_an_engines_architectures(archs, capability, expected):
    assert best_arch([*archs.split(), PTX_ARCH], capability) == expected


def test_images_are_those_of_the_architecture(tmp_path):
    index = {arch: {f"norm-{arch}": "norm"} for arch in ("sm_80", "sm_90", PTX_ARCH)}
    for arch in index:
        (tmp_path / image_name(f"norm-{arch}", arch)).write_bytes(arch.encode())
    for capability, arch in (((9, 0), "sm_90"), ((12, 0), PTX_ARCH)):
        images = {f"norm-{arch}": (arch.encode(), "norm")}
        assert read_images(index, tmp_path, capability) == (images, arch)
