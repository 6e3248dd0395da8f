"""The lowering table: op x (native layers, primitives). Importing this fills it."""

from llmforge.engine.tensorrt.lowering import attention, basic, collectives, experts, rope
from llmforge.engine.tensorrt.lowering.table import TABLE

__all__ = ["TABLE", "attention", "basic", "collectives", "experts", "rope"]
