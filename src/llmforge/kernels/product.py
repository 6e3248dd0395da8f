"""What our own product kernels have in common: the operands that they fuse, and the room for their
rings."""

from __future__ import annotations

from llmforge.kernels.launch import Operand, require

# Of a multiprocessor's 228 KB of shared memory: for the blocks of a product that is alone, two of
# which do not fit, and for those of one that is not, which fit beside.
ALONE_BYTES = 117 << 10
SHARED_BYTES = 110 << 10
OVERHEAD_BYTES = 2 << 10  # of a block, for its barriers and the system


def fused_defines(
    kernel: str,
    out: Operand,
    weight: Operand,
    *,
    bias: Operand | None,
    residual: Operand | None,
    norm_weight: Operand | None,
    activation: str | None,
) -> dict[str, int]:
    """Macros for what a kernel fuses into a product: see `stream.stream_gemm`. Raises ValueError,
    in the kernel's name, where that does not go together."""
    features, gated = weight.shape[0], activation is not None
    assert isinstance(features, int)
    require(weight.contiguous and weight.offset == 0, f"{kernel}: weights lie whole")
    require(not gated or features % 2 == 0, f"{kernel}: as many rows of gate as of up")
    require(not (gated and residual), f"{kernel}: gated or residual, not both")
    expected = features // 2 if gated else features
    require(out.features == expected, f"{kernel}: out's features")
    defines = {
        "NORM": int(norm_weight is not None),
        "BIAS": int(bias is not None),
        "RESIDUAL": int(residual is not None),
        "GATED": int(gated),
    }
    if activation is not None:
        defines[f"ACTIVATION_{activation.upper()}"] = 1
    return defines
