"""Rows of what tensor-parallel ranks do together. Natively a layer of the engine does it among the
ranks of the communicator that the runtime binds; with primitives the rank's network ends there and
the runtime does it (segments.py).

A collective stands between casts to and from float32: TensorRT may otherwise fuse it with its
neighbours and then fails to build or skips it (docs/tensorrt.md), and sums come out as exact as
the reference's. The layer's operation cannot be read back, so its metadata says it.
"""

from __future__ import annotations

from llmforge.engine.tensorrt.lowering.basic import run
from llmforge.engine.tensorrt.lowering.context import Lowering
from llmforge.engine.tensorrt.lowering.table import TABLE, lowers_natively
from llmforge.engine.tensorrt.network import Value


@lowers_natively("all_reduce", "collective")
def all_reduce(g: Lowering, x: Value, *, ranks: int) -> Value:
    wide = g.net.cast(x, "float32")
    metadata = '{"op": "all_reduce", "reduce": "sum"}'
    return g.net.cast(g.net.collective(wide, "ALL_REDUCE", "SUM", ranks, metadata), x.dtype)


@lowers_natively("all_gather", "collective")
def all_gather(g: Lowering, x: Value, *, size: int, ranks: int) -> Value:
    """The layer joins along the first dimension, so features come first meanwhile."""
    net = g.net
    features_first = net.transpose(net.cast(x, "float32"), (2, 0, 1))
    metadata = '{"op": "all_gather"}'
    joined = net.collective(features_first, "ALL_GATHER", "NONE", ranks, metadata)
    return net.cast(run(g, net.transpose(joined, (1, 2, 0)), 0, size), x.dtype)


for _op in ("all_reduce", "all_gather"):
    TABLE[_op].by_runtime = True  # where the package has no such layer
