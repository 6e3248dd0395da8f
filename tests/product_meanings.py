"""What a product with all that our kernels fuse into it must give."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from emulation.bench import Bench

from llmforge.kernels.launch import Launch
from llmforge.model.reference import DTYPES, LOCAL, REFERENCE

EPS = 1e-5
GUARD = 8  # elements behind an output, which must stay as they are
TOLERANCE = {"bfloat16": 6e-3, "float16": 1e-3}  # relative to a row's norm


def random_operands(
    rows: int, features: int, k: int, dtype: str, *, gated: bool
) -> dict[str, torch.Tensor]:
    """x, weight, norm, bias and residual of a product that gives `features` features."""
    weights = features * (2 if gated else 1)
    shapes = {"x": (rows, k), "weight": (weights, k), "norm": (k,), "bias": (weights,)}
    return {
        name: (torch.randn(shape) * (k**-0.5 if name == "weight" else 1.0)).to(DTYPES[dtype])
        for name, shape in (shapes | {"residual": (rows, features)}).items()
    }


def meaning(
    tensors: Mapping[str, torch.Tensor],
    norm: bool,
    bias: bool,
    residual: bool,
    activation: str | None,
    *,
    divides_sums: bool = False,
) -> torch.Tensor:
    """What is meant, the sums in float32. divides_sums: a norm multiplies x by its weights, and
    divides the sums, which are linear in x; what is rounded then is not quite the same."""
    x, dtype = tensors["x"], tensors["x"].dtype
    if norm and not divides_sums:
        (x,) = REFERENCE["rms_norm"]([x, tensors["norm"]], {"eps": EPS}, LOCAL)
    elif norm:
        scale = (x.float().square().mean(1, keepdim=True) + EPS).rsqrt()
        x = x * tensors["norm"]
    sums = x.float() @ tensors["weight"].float().T
    if norm and divides_sums:
        sums = sums * scale
    product = (sums + tensors["bias"].float() if bias else sums).to(dtype)
    if activation:
        attrs = {"activation": activation}
        (product,) = REFERENCE["gated_activation"](list(product.chunk(2, -1)), attrs, LOCAL)
    return product + tensors["residual"] if residual else product


def guarded(bench: Bench, rows: int, features: int, floats: int, counters: int) -> None:
    """Give a bench with a product's operands its output and scratch, with guards behind them."""
    dtype = bench.tensors["x"].dtype
    memory = torch.full((rows * features + GUARD,), float("nan"), dtype=dtype)
    bench.tensors["guarded"] = memory
    bench.tensors["out"] = memory[: rows * features].view(rows, features)
    bench.tensors["partial"] = torch.full((floats + GUARD,), float("nan"))
    bench.tensors["counters"] = torch.zeros(counters, dtype=torch.int32)


def check_twice(bench: Bench, launch: Launch, want: torch.Tensor) -> None:
    """Compare the rows of a `guarded` product with those meant; the second time it finds what the
    first has left."""
    out, allowed = bench.tensors["out"], TOLERANCE[str(bench.tensors["x"].dtype)[6:]]
    for _ in range(2):
        out.fill_(float("nan"))
        bench.run(launch, tokens=len(out))
        errors = (out.float() - want).norm(dim=1)
        assert (errors <= allowed * want.norm(dim=1)).all(), errors
    assert bench.tensors["guarded"][out.numel() :].isnan().all(), "wrote behind its output"
    assert bench.tensors["partial"][-GUARD:].isnan().all(), "wrote behind its scratch"
