"""Quantized source weights, which are converted to plain ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from llmforge.safetensors_io import Array, TensorInfo

if TYPE_CHECKING:
    from llmforge.checkpoint.config import ModelConfig
    from llmforge.checkpoint.mapping import Group

FP8_BLOCK = 128
_FP8 = "float8_e4m3"
_SCALE_SUFFIX = "_scale_inv"

MXFP4_DTYPES = ("uint8",)
_MXFP4_GROUP = 32
# Of E2M1's eight codes; the fourth bit is the sign (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FP4 = np.concatenate((_E2M1, -_E2M1))
# The two values of each byte, the low half first, as one number: a single look-up moves both.
_FP4_PAIRS = np.stack((_FP4[np.arange(256) & 15], _FP4[np.arange(256) >> 4]), -1).view(np.uint64)
# The factors that E8M0 codes stand for; the last stands for none (the same, section 5.4.1).
_E8M0 = np.array([*(2.0 ** (code - 127) for code in range(255)), np.nan], np.float32)


def with_scales(group: Group, tensors: Mapping[str, TensorInfo]) -> Group:
    """The group, where some of its tensors are FP8 with a scale for each block of 128 x 128
    elements: reading the scales (``NAME_scale_inv``) too, and converting the products."""
    scales = {
        name: scale
        for name in group.theirs
        if name in tensors and tensors[name].dtype == _FP8
        if (scale := name + _SCALE_SUFFIX) in tensors
    }
    if not scales or group.rows:
        return group
    names, convert = group.theirs, group.convert

    def dequantize(arrays: list[Array], config: ModelConfig) -> list[Array]:
        rest = iter(arrays[len(names) :])
        plain = [
            fp8_blocks(array, next(rest)) if name in scales else array
            for name, array in zip(names, arrays, strict=False)
        ]
        return convert(plain, config) if convert else plain

    return dataclasses.replace(
        group,
        theirs=(*names, *scales.values()),
        convert=dequantize,
        nbytes=group.nbytes + sum(tensors[name].nbytes for name in scales.values()),
        dtypes=(*group.dtypes, _FP8),
    )


def fp8_blocks(weight: Array, scales: Array) -> Array:
    """float32 of a matrix of FP8 and its blocks' factors; the last blocks may be cut off."""
    rows, columns = weight.shape
    result: Array = weight.astype(np.float32)
    factors = np.asarray(scales, np.float32).repeat(FP8_BLOCK, axis=1)[:, :columns]
    for block in range(-(-rows // FP8_BLOCK)):
        result[block * FP8_BLOCK : (block + 1) * FP8_BLOCK] *= factors[block]
    return result


def mxfp4(blocks: Array, scales: Array) -> Array:
    """float32 [..., 32 groups] of MXFP4: blocks [..., groups, 16] uint8, of which each byte is two
    values, the low half first, and scales [..., groups] uint8, the exponents of a power of two
    plus 127."""
    assert blocks.shape == (*scales.shape, _MXFP4_GROUP // 2), (blocks.shape, scales.shape)
    pairs = np.empty(blocks.shape, np.uint64)
    np.take(_FP4_PAIRS, blocks, out=pairs, mode="clip")  # in range; "clip" saves a copy
    values: Array = pairs.view(np.float32)
    values *= _E8M0[scales][..., None]
    return values.reshape(*scales.shape[:-1], -1)
