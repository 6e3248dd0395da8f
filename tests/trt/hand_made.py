"""Small TensorRT networks by hand, to try the interpreter on."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorrt_rtx as trt
import torch
from interpreter import Interpreter
from network_reader import Program, read


class _Log(trt.ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR and "cudaError" not in message:
            self.errors.append(message)


DTYPES = {
    torch.float32: trt.float32,
    torch.float16: trt.float16,
    torch.bfloat16: trt.bfloat16,
    torch.int32: trt.int32,
    torch.int64: trt.int64,
    torch.bool: trt.bool,
}


class Hand:
    """A network being made. `net` is TensorRT's; the layers' constants live as long as this."""

    def __init__(self) -> None:
        self.log = _Log()
        self.builder = trt.Builder(self.log)
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.net = self.builder.create_network(1 << int(flag))
        self._kept: list[torch.Tensor] = []

    def input(self, name: str, like: torch.Tensor, *dynamic: int) -> Any:
        shape = [-1 if d in dynamic else n for d, n in enumerate(like.shape)]
        return self.net.add_input(name, DTYPES[like.dtype], shape)

    def constant(self, value: torch.Tensor) -> Any:
        value = value.contiguous()
        self._kept.append(value)
        weights = trt.Weights(DTYPES[value.dtype], value.data_ptr(), value.numel())
        return self.net.add_constant(tuple(value.shape), weights).get_output(0)

    def output(self, layer: Any, name: str = "out", index: int = 0) -> None:
        assert layer is not None, self.log.errors
        tensor = layer.get_output(index)
        tensor.name = name
        self.net.mark_output(tensor)

    def program(self) -> Program:
        assert not self.log.errors, self.log.errors
        return read(self.net, trt)

    def run(self, group: Any = None, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return Interpreter(self.program(), group).run(inputs)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal(shape).astype(np.float32)).to(dtype)
