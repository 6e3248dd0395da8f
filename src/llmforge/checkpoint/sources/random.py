"""Random weights for a config.json: benchmarks at real sizes without a download.

Each parameter is drawn from a generator of its own, seeded by (seed, name), so that it does not
depend on what else is drawn. A value is a normal distribution's quantile at one of 65536 evenly
spread probabilities: as good as a normal draw for weights of 16 bits, and many times faster.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmforge.checkpoint.config import DTYPE_BYTES
from llmforge.checkpoint.families import read_config
from llmforge.checkpoint.families.own import OwnFamily
from llmforge.checkpoint.mapping import Group, Plan
from llmforge.checkpoint.params import ParamSpec, parameters
from llmforge.safetensors_io import NUMPY_DTYPES, Array, TensorInfo

_LEVELS = 1 << 16
_CHUNK = 1 << 16


class RandomSource:
    """Parameters with the mean and standard deviation that params.py gives, in `dtype` or else
    the dtype that the config names."""

    def __init__(
        self,
        config_file: Path,
        seed: int = 0,
        dtype: str | None = None,
        own: OwnFamily | None = None,
    ) -> None:
        _, config = read_config(config_file, own)
        self.kind = f"random weights, family {config.family}"
        self.config = dataclasses.replace(config, dtype=dtype or config.dtype)
        self.tokenizer_directory: Path | None = config_file.parent
        self.description: Mapping[str, Any] = {
            "source": "random weights",
            "seed": seed,
            "config_sha256": hashlib.sha256(config_file.read_bytes()).hexdigest(),
        }
        self._seed = seed
        self._specs = parameters(self.config)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(
                dtype := spec.stored_as(self.config),
                spec.shape,
                0,
                math.prod(spec.shape) * DTYPE_BYTES[dtype],
            )
            for name, spec in self._specs.items()
        }
        groups = (Group((name,), (name,), None, t.nbytes) for name, t in self.tensors.items())
        self.plan = Plan(tuple(groups), {})

    def read(self, name: str) -> Array:
        info = self.tensors[name]
        result = np.empty(info.nbytes, np.uint8)
        self.fill(name, 0, result)
        return result.view(NUMPY_DTYPES[info.dtype]).reshape(info.shape)

    def fill(self, name: str, first: int, out: NDArray[np.uint8]) -> None:
        if first == 0:
            self._stream = _Stream(self._specs[name], self._seed, self.tensors[name].dtype)
        self._stream.draw(first, out)

    def close(self) -> None:
        pass


class _Stream:
    """The values of one parameter, drawn from first to last."""

    def __init__(self, spec: ParamSpec, seed: int, dtype: str) -> None:
        table = (spec.init_mean + spec.init_std * _normal_quantiles()).astype(NUMPY_DTYPES[dtype])
        # Moving raw bits is much faster than moving bfloat16 values.
        self._bits = table.view(f"u{table.itemsize}")
        key = hashlib.sha256(f"{seed}:{spec.name}".encode()).digest()
        self._generator = np.random.SFC64(int.from_bytes(key, "little"))
        self._drawn = 0

    def draw(self, first: int, out: NDArray[np.uint8]) -> None:
        assert first == self._drawn, "values are drawn in order"
        self._drawn += out.size
        values = out.view(self._bits.dtype)
        for start in range(0, values.size, _CHUNK):
            part = values[start : start + _CHUNK]
            raw = self._generator.random_raw(-(-part.size // 4))
            # Little-endian on every machine, so that a seed means the same values everywhere.
            levels = raw.astype("<u8", copy=False).view("<u2")[: part.size]
            np.take(self._bits, levels, out=part, mode="clip")  # in range; "clip" saves a copy


@functools.cache
def _normal_quantiles() -> NDArray[np.float64]:
    normal = NormalDist()
    return np.array([normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS)])
