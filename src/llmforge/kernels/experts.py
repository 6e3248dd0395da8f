"""Launches of the kernels of mixtures of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmforge.kernels.launch import (
    Argument,
    Float,
    Launch,
    Operand,
    Size,
    block_threads,
    extent,
    load_width,
    require,
    same_dtype,
    specialised,
)

_WARPS = 4
_TOKENS = 8  # that read a router's weights together
_UP_COLUMNS, _DOWN_COLUMNS = 32, 64  # of a block of expert_gemm.cu
_TILE_ROWS = 64  # as there


def router_logits(
    logits: Operand, x: Operand, weight: Operand, bias: Operand | None, *, tokens: int
) -> Launch:
    """logits [tokens, experts] float32 = x weightᵀ + bias, of up to `tokens` tokens."""
    dtype = same_dtype(x, weight, bias)
    experts, hidden = weight.shape[0], weight.features
    require(logits.features == experts and x.features == hidden, "router_logits: shapes")
    assert isinstance(experts, int)
    together = min(_TOKENS, tokens)
    spec = specialised(
        "route.cu", "router_logits", dtype, **_UNUSED_BY_LOGITS,
        EXPERTS=experts, HIDDEN=hidden, WARPS=_WARPS, TOKENS=together, BIAS=int(bias is not None),
    )  # fmt: skip
    rows = _symbol(x)
    arguments = (logits, x, weight, bias, Size(rows), x.row_stride)
    grid = (Size(rows, 1, together), -(-experts // _WARPS), 1)
    return Launch(spec, arguments, grid, _WARPS * 32)


_UNUSED_BY_LOGITS = {"TOP_K": 1, "GROUPS": 1, "KEPT_GROUPS": 1, "GROUP_TOP": 1}


def choose(
    ids: Operand,
    weights: Operand,
    logits: Operand,
    correction: Operand | None,
    attrs: Mapping[str, Any],
) -> Launch:
    """The experts of each token and their weights; `attrs` are those of the op `route`."""
    top_k, groups, experts = attrs["top_k"], attrs["groups"], logits.features
    require(not unfit_route(attrs, experts), unfit_route(attrs, experts))
    require(ids.features == weights.features == top_k, "choose: ids and weights")
    require(correction is None or correction.dtype == "float32", "choose: correction in float32")
    spec = specialised(
        "route.cu", "choose", "float32", EXPERTS=experts, WARPS=_WARPS, TOKENS=1, HIDDEN=1, BIAS=0,
        TOP_K=top_k, GROUPS=groups, KEPT_GROUPS=attrs["kept_groups"], GROUP_TOP=attrs["group_top"],
        SIGMOID=int(attrs["score"] == "sigmoid"), NORMALIZE=int(attrs["normalize"]),
        CORRECTION=int(correction is not None),
    )  # fmt: skip
    rows = _symbol(ids)
    arguments = (ids, weights, logits, correction, Size(rows), Float(attrs["scale"]))
    return Launch(spec, arguments, (Size(rows, 1, _WARPS), 1, 1), _WARPS * 32)


def unfit_route(attrs: Mapping[str, Any], experts: int) -> str:
    """Why `choose` cannot route like this, in a line; empty where it can."""
    most = {
        "experts": (experts, 1024),
        "top_k": (attrs["top_k"], 32),
        "groups": (attrs["groups"], 31),
    }
    reasons = [
        f"{name} {given}, at most {limit}" for name, (given, limit) in most.items() if given > limit
    ]
    return "; ".join(reasons)


@dataclass(frozen=True)
class Experts:
    """The experts that a rank holds: gate_up [count, 2 inner, hidden], down [count, hidden, inner]
    and their biases; and what the op `experts` says of them."""

    gate_up: Operand
    down: Operand
    up_bias: Operand | None
    down_bias: Operand | None
    top_k: int
    first: int
    activation: str
    alpha: float
    limit: float | None

    @property
    def count(self) -> int:
        return int(self.gate_up.shape[0])

    @property
    def hidden(self) -> int:
        return self.gate_up.features

    @property
    def inner(self) -> int:
        return self.down.features

    def tiles(self, tokens: int) -> int:
        """The most tiles that expert_gemm.cu makes of `tokens` tokens."""
        return tokens * self.top_k // _TILE_ROWS + self.count

    @property
    def _defines(self) -> dict[str, int | str]:
        return {
            "TOP_K": self.top_k, "FIRST": self.first, "COUNT": self.count, "HIDDEN": self.hidden,
            "INNER": self.inner, "UP_BIAS": int(self.up_bias is not None),
            "DOWN_BIAS": int(self.down_bias is not None), "LIMITED": int(self.limit is not None),
            f"ACTIVATION_{self.activation.upper()}": 1,
        }  # fmt: skip

    def _kernel(self, source: str, entry: str, *operands: Operand, **defines: int) -> Any:
        dtype = same_dtype(self.gate_up, self.down, self.up_bias, self.down_bias, *operands)
        defines["WIDTH"] = min(
            load_width(*operands, run=size) for size in (self.hidden, self.inner)
        )
        return specialised(source, entry, dtype, **{**self._defines, **defines})

    @property
    def _bounds(self) -> tuple[Argument, Argument]:
        return Float(self.alpha), Float(self.limit or 0.0)

    # -- few tokens ------------------------------------------------------------------------------

    def stream(
        self, out: Operand, x: Operand, ids: Operand, weights: Operand, activated: Operand
    ) -> tuple[Launch, Launch]:
        """The launches for few tokens. `activated` has room for `inner` elements a pair."""
        rows, warps = _symbol(x), _WARPS
        up = self._kernel("expert_stream.cu", "expert_up", x, activated, WARPS=warps)
        down = self._kernel("expert_stream.cu", "expert_down", out, activated, WARPS=warps)
        up_grid = (Size(rows, self.top_k), -(-self.inner // warps), 1)
        return (
            Launch(
                up,
                (activated, x, ids, self.gate_up, self.up_bias, x.row_stride, *self._bounds),
                up_grid,
                warps * 32,
            ),
            Launch(
                down,
                (out, activated, ids, weights, self.down, self.down_bias),
                (extent(rows), -(-self.hidden // warps), 1),
                warps * 32,
            ),
        )

    # -- many tokens -----------------------------------------------------------------------------

    def grouped(
        self,
        out: Operand,
        x: Operand,
        ids: Operand,
        weights: Operand,
        scratch: GroupedScratch,
        *,
        tokens: int,
    ) -> tuple[Launch, ...]:
        """The launches for up to `tokens` tokens, in order."""
        rows, source, tiles = _symbol(x), "expert_gemm.cu", self.tiles(tokens)
        order, listed = scratch.order, scratch.tiles
        activated, products = scratch.activated, scratch.products
        common = {"COLUMNS": _UP_COLUMNS}
        sort = self._kernel(source, "sort_pairs", activated, **common)
        up = self._kernel(source, "up_tiles", x, activated, **common)
        down = self._kernel(source, "down_tiles", activated, products, COLUMNS=_DOWN_COLUMNS)
        weigh = self._kernel(source, "weigh_pairs", out, products, **common)
        up_arguments: tuple[Argument, ...] = (
            activated, x, order, listed, self.gate_up, self.up_bias, x.row_stride, *self._bounds,
        )  # fmt: skip
        up_grid = (tiles, -(-self.inner // _UP_COLUMNS), 1)
        down_arguments = (products, activated, order, listed, self.down, self.down_bias)
        down_grid = (tiles, -(-self.hidden // _DOWN_COLUMNS), 1)
        weigh_grid = (extent(rows), -(-self.hidden // 256), 1)
        return (
            Launch(sort, (order, listed, ids, Size(rows)), (1, 1, 1), 1024),
            Launch(up, up_arguments, up_grid, 256),
            Launch(down, down_arguments, down_grid, 256),
            Launch(weigh, (out, products, ids, weights), weigh_grid, 256),
        )


@dataclass(frozen=True)
class GroupedScratch:
    """Room that `Experts.grouped` needs. A row a token: `order` top_k int32, `activated` top_k
    times inner and `products` top_k times hidden elements. `tiles`: 1 + 3 int32 for each."""

    order: Operand
    tiles: Operand
    activated: Operand
    products: Operand


def token_gate(out: Operand, x: Operand, by: Operand, weight: Operand) -> Launch:
    """out = x sigmoid(by · weight)."""
    dtype = same_dtype(out, x, by, weight)
    require(weight.features == by.features and out.shape == x.shape, "token_gate: shapes")
    threads = block_threads(x.features, 256)
    spec = specialised(
        "token_gate.cu", "token_gate", dtype,
        FEATURES=x.features, HIDDEN=by.features, THREADS=threads,
    )  # fmt: skip
    arguments = (out, x, by, weight, out.row_stride, x.row_stride, by.row_stride)
    return Launch(spec, arguments, (extent(x.shape[0]), 1, 1), threads)


def _symbol(operand: Operand) -> str:
    """The name of the operand's number of rows."""
    rows = operand.shape[0]
    assert isinstance(rows, str), operand
    return rows
