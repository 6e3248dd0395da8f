"""The interpreter, a kind of layer at a time, against plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tensorrt_rtx as trt
import torch
from hand_made import Hand, numbers
from interpreter import Interpreter, Mismatch
from network_reader import Unreadable
from thread_comm import run_ranks
from torch.nn import functional as F

EW, UN, RE = trt.ElementWiseOperation, trt.UnaryOperation, trt.ReduceOperation
ACT, MAT = trt.ActivationType, trt.MatrixOperation

Make = Callable[[Hand, Any], Any]


def of_one(make: Make, x: torch.Tensor, *dynamic: int) -> torch.Tensor:
    """What the layer that `make` adds gives for x, whose dimensions `dynamic` vary."""
    hand = Hand()
    hand.output(make(hand, hand.input("x", x, *dynamic)))
    return hand.run(x=x)["out"]


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


X = numbers(2, 3, 8)
UNARIES = [
    (UN.EXP, torch.exp), (UN.NEG, torch.neg), (UN.SIN, torch.sin), (UN.COS, torch.cos),
    (UN.ERF, torch.erf), (UN.ABS, torch.abs), (UN.RECIP, torch.reciprocal), (UN.FLOOR, torch.floor),
]  # fmt: skip


@pytest.mark.parametrize(("op", "expected"), UNARIES, ids=lambda v: getattr(v, "name", ""))
def test_unary(op: Any, expected: Any) -> None:
    same(of_one(lambda h, x: h.net.add_unary(x, op), X), expected(X))


def test_square_root_logarithm_and_not() -> None:
    positive = X.abs() + 0.1
    same(of_one(lambda h, x: h.net.add_unary(x, UN.SQRT), positive), positive.sqrt())
    same(of_one(lambda h, x: h.net.add_unary(x, UN.LOG), positive), positive.log())
    truth = X > 0
    assert of_one(lambda h, x: h.net.add_unary(x, UN.NOT), truth).equal(~truth)


ACTIVATIONS = [
    (ACT.RELU, F.relu), (ACT.SIGMOID, torch.sigmoid), (ACT.TANH, torch.tanh),
    (ACT.GELU_ERF, F.gelu), (ACT.GELU_TANH, lambda t: F.gelu(t, approximate="tanh")),
]  # fmt: skip


@pytest.mark.parametrize(("op", "expected"), ACTIVATIONS, ids=lambda v: getattr(v, "name", ""))
def test_activation(op: Any, expected: Any) -> None:
    same(of_one(lambda h, x: h.net.add_activation(x, op), X), expected(X))


Y = numbers(2, 3, 8, seed=1)
BINARIES = [
    (EW.SUM, torch.add), (EW.SUB, torch.sub), (EW.PROD, torch.mul), (EW.DIV, torch.div),
    (EW.MAX, torch.maximum), (EW.MIN, torch.minimum), (EW.GREATER, torch.gt), (EW.LESS, torch.lt),
    (EW.EQUAL, torch.eq),
]  # fmt: skip


@pytest.mark.parametrize(("op", "expected"), BINARIES, ids=lambda v: getattr(v, "name", ""))
def test_elementwise(op: Any, expected: Any) -> None:
    got = of_one(lambda h, x: h.net.add_elementwise(x, h.constant(Y), op), X)
    assert got.equal(expected(X, Y))


def test_elementwise_broadcasts_and_divides_whole_numbers() -> None:
    row = numbers(1, 1, 8, seed=2)
    same(of_one(lambda h, x: h.net.add_elementwise(x, h.constant(row), EW.SUM), X), X + row)
    whole = torch.tensor([7, -7, 9], dtype=torch.int32)
    two = torch.tensor([2], dtype=torch.int32)
    for op, expected in ((EW.DIV, [3, -3, 4]), (EW.FLOOR_DIV, [3, -4, 4])):
        got = of_one(lambda h, x, op=op: h.net.add_elementwise(x, h.constant(two), op), whole)
        assert got.tolist() == expected
    truth = torch.tensor([True, False, True])
    got = of_one(
        lambda h, x: h.net.add_elementwise(x, h.constant(torch.tensor([True])), EW.AND), truth
    )
    assert got.equal(truth)


def test_half_precision_rounds_once_a_layer() -> None:
    x = numbers(4, 8, dtype=torch.bfloat16)
    got = of_one(lambda h, t: h.net.add_elementwise(t, h.constant(x), EW.PROD), x)
    assert got.dtype == torch.bfloat16 and got.equal((x.float() * x.float()).bfloat16())


def test_constants_of_every_dtype_are_read_back() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64):
        value = (numbers(3, 5) * 10).to(dtype)
        hand = Hand()
        hand.output(hand.net.add_identity(hand.constant(value)))
        assert hand.run()["out"].equal(value)
    hand = Hand()
    hand.output(hand.net.add_identity(hand.constant(torch.tensor(True))))
    assert hand.run()["out"].equal(torch.tensor(True))


def test_cast_and_select() -> None:
    got = of_one(lambda h, x: h.net.add_cast(x, trt.bfloat16), X)
    assert got.equal(X.bfloat16())

    def chosen(h: Hand, x: Any) -> Any:
        greater = h.net.add_elementwise(x, h.constant(Y), EW.GREATER).get_output(0)
        return h.net.add_select(greater, x, h.constant(Y))

    assert of_one(chosen, X).equal(torch.maximum(X, Y))


def test_shuffle_transposes_reshapes_and_transposes() -> None:
    def heads(h: Hand, x: Any) -> Any:
        layer = h.net.add_shuffle(x)
        layer.reshape_dims = (0, 0, 2, 4)
        layer.second_transpose = (0, 2, 1, 3)
        return layer

    def back(h: Hand, x: Any) -> Any:
        layer = h.net.add_shuffle(x)
        layer.first_transpose = (0, 2, 1)
        layer.reshape_dims = (0, -1)
        return layer

    for dynamic in ((), (0, 1)):
        same(of_one(heads, X, *dynamic), X.view(2, 3, 2, 4).transpose(1, 2))
    same(of_one(back, X, 0), X.transpose(1, 2).reshape(2, -1))


def test_shuffle_by_a_computed_shape() -> None:
    def flat(h: Hand, x: Any) -> Any:
        shape = h.net.add_shape(x).get_output(0)
        rows = h.net.add_slice(shape, (0,), (1,), (1,)).get_output(0)
        rest = h.constant(torch.tensor([24], dtype=torch.int64))
        layer = h.net.add_shuffle(x)
        joined = h.net.add_concatenation([rows, rest])
        layer.set_input(1, joined.get_output(0))
        return layer

    same(of_one(flat, X, 0), X.view(2, 24))


def test_slices_with_fixed_and_computed_bounds() -> None:
    same(
        of_one(lambda h, x: h.net.add_slice(x, (0, 1, 2), (2, 2, 3), (1, 1, 2)), X), X[:, 1:, 2::2]
    )

    def tail(h: Hand, x: Any) -> Any:
        layer = h.net.add_slice(x, (0, 0, 4), (2, 3, 4), (1, 1, 1))
        shape = h.net.add_shape(x).get_output(0)
        half = torch.tensor([1, 1, 2], dtype=torch.int64)
        sizes = h.net.add_elementwise(shape, h.constant(half), EW.FLOOR_DIV).get_output(0)
        layer.set_input(2, sizes)
        return layer

    same(of_one(tail, X, 0, 1), X[:, :, 4:])
    with pytest.raises(Mismatch, match="indices"):
        hand = Hand()
        x = hand.input("x", X, 0, 1)
        hand.output(hand.net.add_slice(x, (0, 2, 0), (2, 2, 8), (1, 1, 1)))
        hand.run(x=X)


def test_concatenation_squeeze_and_unsqueeze() -> None:
    def joined(h: Hand, x: Any) -> Any:
        layer = h.net.add_concatenation([x, h.constant(Y)])
        layer.axis = 2
        return layer

    same(of_one(joined, X), torch.cat((X, Y), 2))
    axes = torch.tensor([1, 3], dtype=torch.int64)
    got = of_one(lambda h, x: h.net.add_unsqueeze(x, h.constant(axes)), X)
    same(got, X[:, None, :, None])
    got = of_one(lambda h, x: h.net.add_squeeze(x, h.constant(axes)), got)
    same(got, X)


def test_gathers() -> None:
    table, rows = numbers(10, 4), torch.tensor([[1, 9], [0, 3]], dtype=torch.int32)
    got = of_one(lambda h, i: h.net.add_gather(h.constant(table), i, 0), rows, 0, 1)
    same(got, table[rows.long()])

    def last(h: Hand, x: Any) -> Any:
        layer = h.net.add_gather_v2(
            x, h.constant(torch.tensor([[2], [0]], dtype=torch.int32)), trt.GatherMode.ND
        )
        layer.num_elementwise_dims = 1
        return layer

    same(of_one(last, X), torch.stack((X[0, 2], X[1, 0])))
    index = torch.tensor([[[1, 0]], [[2, 2]]], dtype=torch.int32)

    def by_element(h: Hand, x: Any) -> Any:
        layer = h.net.add_gather_v2(x, h.constant(index), trt.GatherMode.ELEMENT)
        layer.axis = 2
        return layer

    same(of_one(by_element, X), X.gather(2, index.long()))


def test_an_index_out_of_range_is_an_error() -> None:
    rows = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(Mismatch, match=r"indices 0\.\.10 of 10 rows"):
        of_one(lambda h, i: h.net.add_gather(h.constant(numbers(10, 4)), i, 0), rows)


def test_fills() -> None:
    def iota(h: Hand, x: Any) -> Any:
        layer = h.net.add_fill((5,), trt.FillOperation.LINSPACE, trt.int32)
        layer.set_input(0, h.net.add_shape(x).get_output(0))
        layer.set_input(1, h.constant(torch.tensor(3, dtype=torch.int32)))
        layer.set_input(2, h.constant(torch.tensor([2], dtype=torch.int32)))
        return layer

    assert of_one(iota, numbers(4), 0).tolist() == [3, 5, 7, 9]

    def table(h: Hand, x: Any) -> Any:
        layer = h.net.add_fill((2, 3), trt.FillOperation.LINSPACE, trt.int32)
        layer.set_input(1, h.constant(torch.tensor(0, dtype=torch.int32)))
        layer.set_input(2, h.constant(torch.tensor([10, 1], dtype=torch.int32)))
        return layer

    assert of_one(table, numbers(4)).tolist() == [[0, 1, 2], [10, 11, 12]]


def test_reductions_softmax_topk_and_running_sums() -> None:
    for op, expected in (
        (RE.SUM, X.sum(2)), (RE.AVG, X.mean(2)), (RE.MAX, X.amax(2)), (RE.MIN, X.amin(2)),
    ):  # fmt: skip
        same(of_one(lambda h, x, op=op: h.net.add_reduce(x, op, 1 << 2, False), X), expected)
    same(of_one(lambda h, x: h.net.add_reduce(x, RE.SUM, 5, True), X), X.sum((0, 2), True))

    def softmax(h: Hand, x: Any) -> Any:
        layer = h.net.add_softmax(x)
        layer.axes = 1 << 1
        return layer

    same(of_one(softmax, X), X.softmax(1))
    hand = Hand()
    top = hand.net.add_topk(hand.input("x", X), trt.TopKOperation.MAX, 3, 1 << 2)
    hand.output(top, "values", 0)
    hand.output(top, "places", 1)
    found, largest = hand.run(x=X), X.topk(3)
    assert found["values"].equal(largest.values)
    assert found["places"].equal(largest.indices.int())
    axis = torch.tensor(1, dtype=torch.int32)
    sums = trt.CumulativeOperation.SUM
    got = of_one(lambda h, x: h.net.add_cumulative(x, h.constant(axis), sums, False, False), X)
    same(got, X.cumsum(1))


def test_normalization_takes_the_mean_off() -> None:
    scale, bias = numbers(1, 1, 8, seed=4), numbers(1, 1, 8, seed=5)

    def norm(h: Hand, x: Any) -> Any:
        layer = h.net.add_normalization_v2(x, h.constant(scale), h.constant(bias), 1 << 2)
        layer.epsilon = 1e-3
        return layer

    same(of_one(norm, X, 0, 1), F.layer_norm(X, (8,), scale.view(-1), bias.view(-1), 1e-3))


def test_products() -> None:
    weight = numbers(1, 5, 8, seed=3)
    got = of_one(
        lambda h, x: h.net.add_matrix_multiply(x, MAT.NONE, h.constant(weight), MAT.TRANSPOSE), X
    )
    same(got, F.linear(X, weight[0]))
    got = of_one(
        lambda h, x: h.net.add_matrix_multiply(x, MAT.TRANSPOSE, h.constant(Y), MAT.NONE), X
    )
    same(got, X.mT @ Y)
    half, square = X.half(), numbers(1, 8, 8, dtype=torch.float16)
    got = of_one(
        lambda h, x: h.net.add_matrix_multiply(x, MAT.NONE, h.constant(square), MAT.NONE), half
    )
    assert got.equal((half.float() @ square.float()).half())


def test_scatter_and_one_hot() -> None:
    rows = torch.tensor([[1], [0]], dtype=torch.int32)
    new = numbers(2, 8, seed=6)

    def scattered(h: Hand, x: Any) -> Any:
        return h.net.add_scatter(x, h.constant(rows), h.constant(new), trt.ScatterMode.ND)

    same(of_one(scattered, numbers(2, 8)), new.flip(0))
    hot = torch.tensor([0.0, 1.0])

    def one_hot(h: Hand, x: Any) -> Any:
        depth = h.constant(torch.tensor(4, dtype=torch.int32))
        return h.net.add_one_hot(x, h.constant(hot), depth, -1)

    places = torch.tensor([2, 0], dtype=torch.int32)
    assert of_one(one_hot, places).equal(F.one_hot(places.long(), 4).float())


# -- attention and its cache -----------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 4])
def test_rotary_embedding(interleaved: bool, dim: int) -> None:
    x, positions = numbers(2, 3, 5, 8), torch.arange(10, dtype=torch.int32).view(2, 5)
    angles = torch.arange(10).view(-1, 1) * torch.tensor([1.0, 0.1, 0.01, 0.001])[: dim // 2]

    def rotary(h: Hand, t: Any) -> Any:
        layer = h.net.add_rotary_embedding(
            t, h.constant(angles.cos()), h.constant(angles.sin()), interleaved, dim
        )
        layer.set_input(3, h.constant(positions))
        return layer

    pairs = x[..., :dim].unflatten(-1, (-1, 2) if interleaved else (2, -1))
    pairs = pairs if interleaved else pairs.mT
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles).view(2, 1, 5, -1)
    turned = torch.view_as_real(turned)
    turned = (turned if interleaved else turned.mT).flatten(-2)
    same(of_one(rotary, x), torch.cat((turned, x[..., dim:]), -1))


def cached(new: int) -> tuple[Hand, dict[str, torch.Tensor]]:
    """A network that writes 2 sequences' `new` tokens after 1 and 5 others, in 6 places."""
    hand = Hand()
    inputs = {
        "cache": numbers(2, 2, 6, 4),
        "update": numbers(2, 2, new, 4, seed=1),
        "at": torch.tensor([1, 5], dtype=torch.int32),
    }
    tensors = [hand.input(name, value) for name, value in inputs.items()]
    layer = hand.net.add_kv_cache_update(*tensors, trt.KVCacheMode.LINEAR)
    hand.output(layer, "cache.out")
    return hand, inputs


def test_a_cache_is_updated_in_its_own_memory_and_not_beyond_it() -> None:
    hand, inputs = cached(3)
    expected = inputs["cache"].clone()
    expected[0, :, 1:4] = inputs["update"][0]
    expected[1, :, 5:] = inputs["update"][1, :, :1]
    out = hand.run(**inputs)["cache.out"]
    assert out.data_ptr() == inputs["cache"].data_ptr()
    assert out.equal(expected)
    assert hand.program().aliases == {"cache.out": "cache"}


def attended(**changes: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Grouped attention of 3 queries over 6 keys with what `changes` sets on the layer."""
    hand = Hand()
    values = {
        "q": numbers(2, 4, 3, 8), "k": numbers(2, 2, 6, 8, seed=1), "v": numbers(2, 2, 6, 8, seed=2)
    }  # fmt: skip
    q, k, v = (hand.input(name, value, 0) for name, value in values.items())
    causal = changes.pop("causal", trt.CausalMaskKind.NONE)
    layer = hand.net.add_attention_v2(q, k, v, trt.AttentionNormalizationOp.SOFTMAX, causal)
    for name, value in changes.items():
        setattr(layer, name, hand.constant(value))
    layer.decomposable = True
    hand.output(layer)
    return hand.run(**values)["out"], values


def plain(values: dict[str, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(**dict(zip(("query", "key", "value"), values.values(), strict=True)), attn_mask=mask, scale=1.0, enable_gqa=True)  # fmt: skip  # noqa: E501


def test_attention_with_masks() -> None:
    mask = torch.rand(2, 1, 3, 6, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[..., 0] = True
    got, values = attended(mask=mask)
    same(got, plain(values, mask))
    added = numbers(1, 1, 3, 6, seed=9)
    got, values = attended(mask=added)
    same(got, plain(values, added.expand(2, 4, 3, 6)))


def test_attention_with_causal_kinds_and_lengths() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(6)
    got, values = attended(causal=trt.CausalMaskKind.LOWER_RIGHT)
    same(got, plain(values, columns <= rows + 3))
    got, values = attended(causal=trt.CausalMaskKind.UPPER_LEFT)
    same(got, plain(values, columns <= rows))
    lengths = torch.tensor([4, 6], dtype=torch.int32)
    got, values = attended(key_value_lengths=lengths, causal=trt.CausalMaskKind.LOWER_RIGHT)
    offsets = (lengths - 3).view(2, 1, 1, 1)
    same(got, plain(values, columns <= rows + offsets))


def test_attention_has_no_scale_and_shows_unwritten_memory() -> None:
    mask = torch.ones(1, 1, 3, 6, dtype=torch.bool)
    mask[..., 5] = False
    got, values = attended(mask=mask)
    assert not torch.allclose(got, plain({**values, "q": values["q"] * 8**-0.5}, mask))
    hand = Hand()
    names = [hand.input(name, value) for name, value in values.items()]
    layer = hand.net.add_attention_v2(
        *names, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    layer.mask = hand.constant(mask)
    hand.output(layer)
    values["v"][:, :, 5] = torch.nan
    assert hand.run(**values)["out"].isnan().all()


# -- collectives -----------------------------------------------------------------------------------


def collective(operation: Any, reduce: Any, metadata: str) -> Hand:
    hand = Hand()
    layer = hand.net.add_dist_collective(hand.input("x", X), operation, reduce, -1, [])
    layer.num_ranks = 2
    layer.metadata = metadata
    hand.output(layer)
    return hand


def test_collectives_join_two_networks_in_lock_step() -> None:
    parts = (X, Y)
    reduce = collective(
        trt.CollectiveOperation.ALL_REDUCE, RE.SUM, '{"op": "all_reduce", "reduce": "sum"}'
    ).program()
    for out in run_ranks(2, lambda c: Interpreter(reduce, c).run({"x": parts[c.rank]})["out"]):
        same(out, X + Y)
    gather = collective(
        trt.CollectiveOperation.ALL_GATHER, RE.NONE, '{"op": "all_gather"}'
    ).program()
    for out in run_ranks(2, lambda c: Interpreter(gather, c).run({"x": parts[c.rank]})["out"]):
        same(out, torch.cat(parts))


def test_a_collective_that_says_nothing_or_has_no_ranks_is_refused() -> None:
    silent = collective(trt.CollectiveOperation.ALL_GATHER, RE.NONE, "")
    with pytest.raises(Unreadable, match="metadata"):
        silent.program()
    alone = collective(trt.CollectiveOperation.ALL_GATHER, RE.NONE, '{"op": "all_gather"}')
    with pytest.raises(Mismatch, match="2 ranks"):
        alone.run(x=X)


# -- what does not hold together is refused --------------------------------------------------------


def test_inputs_of_another_dtype_or_shape_are_refused() -> None:
    hand = Hand()
    hand.output(hand.net.add_identity(hand.input("x", X, 0)))
    with pytest.raises(Mismatch, match="declared"):
        hand.run(x=X.half())
    with pytest.raises(Mismatch, match="declared"):
        hand.run(x=X[..., :4])
    with pytest.raises(Mismatch, match="not given"):
        hand.run()


def test_an_unknown_kind_of_layer_is_refused() -> None:
    hand = Hand()
    hand.output(hand.net.add_non_zero(hand.input("x", X)))
    with pytest.raises(Unreadable, match="NON_ZERO"):
        hand.program()
