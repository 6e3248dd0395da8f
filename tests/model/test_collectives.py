"""The collectives' plain meanings, over ranks as threads."""

import pytest
import torch
from thread_comm import run_ranks

from llmforge.comm import Comm
from llmforge.model.reference import REFERENCE, Context


def context(comm: Comm, **sizes: int) -> Context:
    return Context(comm, comm, sizes)


def part(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A rank's operand: values of very different size, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(
        -4, 5, shape, generator=generator
    )
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("shape", [(3, 5), (301, 257)], ids=["one exchange", "two exchanges"])
def test_all_reduce_is_the_sum_in_rank_order(
    shape: tuple[int, int], ranks: int, dtype: torch.dtype
) -> None:
    parts = [part(rank, shape, dtype) for rank in range(ranks)]
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    expected = parts[0].to(wide)
    for other in parts[1:]:
        expected = expected + other.to(wide)

    def work(comm: Comm) -> torch.Tensor:
        return REFERENCE["all_reduce"]([parts[comm.rank]], {"ranks": ranks}, context(comm))[0]

    for result in run_ranks(ranks, work):
        assert torch.equal(result, expected.to(dtype)), "the same bits on every rank"


def test_all_gather_joins_features_and_drops_the_padding() -> None:
    parts = [part(rank, (4, 3), torch.bfloat16) for rank in range(3)]

    def work(comm: Comm) -> torch.Tensor:
        attrs = {"size": 7, "ranks": 3}
        return REFERENCE["all_gather"]([parts[comm.rank]], attrs, context(comm))[0]

    for result in run_ranks(3, work):
        assert torch.equal(result, torch.cat(parts, dim=-1)[:, :7])


def test_send_and_recv_with_a_symbolic_shape() -> None:
    sent = part(0, (6, 4), torch.float16)

    def work(comm: Comm) -> torch.Tensor | None:
        if comm.rank == 0:
            assert REFERENCE["send"]([sent], {"to": 1}, context(comm)) == ()
            return None
        attrs = {"source": 0, "shape": ["tokens", 4], "dtype": "float16"}
        return REFERENCE["recv"]([], attrs, context(comm, tokens=6))[0]

    received = run_ranks(2, work)[1]
    assert received is not None and torch.equal(received, sent)
