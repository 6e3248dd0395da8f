"""Single kernels on an emulated GPU where the tiny models do not go: sizes that divide nothing, a
large eps, and sampling of many rows with as many kinds of parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulation.bench import Bench
from emulation.build import unavailable

from llmforge.engine.device_sampling import PARAMS, fill_params
from llmforge.engine.step import SampleRow, SamplingParams
from llmforge.kernels import launch as kernels
from llmforge.kernels import sampling
from llmforge.runtime.sampling import sample

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TOKENS = 3
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.allclose(got.float(), want.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("features", "dtype"), [(36, torch.float32), (1000, torch.bfloat16), (1030, torch.float16)]
)
def test_norms(features, dtype):
    bench, eps = Bench(), 0.3
    generator = torch.Generator().manual_seed(features)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, r = drawn(TOKENS, features), drawn(TOKENS, features)
    w, b = drawn(features), drawn(features)
    out, out_sum = (torch.full_like(x, torch.nan) for _ in range(2))
    bench.tensors.update(x=x, r=r, w=w, b=b, out=out, sum=out_sum)
    matrices = {name: bench.operand(name, "tokens") for name in ("x", "r", "out", "sum")}
    weight, bias = bench.operand("w"), bench.operand("b")

    bench.run(
        kernels.rms_norm(
            matrices["out"], matrices["x"], weight, eps=eps, residual=matrices["r"],
            out_sum=matrices["sum"],
        ),
        tokens=TOKENS,
    )  # fmt: skip
    total = x + r
    wide = total.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    assert torch.equal(out_sum, total)
    close(out, (wide * scale).to(dtype) * w, dtype)

    out.fill_(torch.nan)
    made = kernels.layer_norm(matrices["out"], matrices["x"], weight, bias, eps=eps, run=features)
    bench.run(made, tokens=TOKENS)
    wide = x.float()
    deviation = torch.sqrt(wide.var(-1, keepdim=True, unbiased=False) + eps)
    normed = (wide - wide.mean(-1, keepdim=True)) / deviation
    close(out, normed * w.float() + b.float(), dtype)


def random_params(rng: np.random.Generator) -> SamplingParams:
    def maybe(value: float, otherwise: float) -> float:
        return value if rng.random() < 0.5 else otherwise

    return SamplingParams(
        temperature=maybe(0.2 + 2 * rng.random(), 1.0),
        top_p=maybe(0.01 + 0.98 * rng.random(), 1.0),
        top_k=int(maybe(rng.integers(1, 12), 0)),
        repetition_penalty=maybe(0.7 + rng.random(), 1.0),
        frequency_penalty=maybe(rng.integers(-8, 9) / 16, 0.0),
        presence_penalty=maybe(rng.random() - 0.5, 0.0),
        min_p=(0.0, 0.3 * rng.random(), 1.0)[rng.integers(3)],
        seed=int(rng.integers(2**63)),
    )


def drawn(logits: torch.Tensor, drawn_by: list[SampleRow]) -> Bench:
    """What sample.cu leaves: "tokens" and "largest"."""
    rows, vocab = logits.shape
    # Every second row's last token is what the step began with; the step has more tokens.
    ids, places = np.full(2 * rows, -7, np.int32), np.arange(rows, dtype=np.int32) * 2 + 1
    begun = list(drawn_by)
    for index, row in enumerate(drawn_by):
        if index % 2 and len(row.history):
            ids[places[index]] = row.history[-1]
            begun[index] = row._replace(history=np.append(row.history[:-1], np.int32(~index)))
    params, history = np.zeros(rows, PARAMS), np.zeros(3 * rows * vocab, np.int32)
    fill_params(params, begun, history)
    bench = Bench()
    bench.tensors.update(
        logits=logits,
        params=torch.from_numpy(params.view(np.int32)),
        history=torch.from_numpy(history),
        ids=torch.from_numpy(ids),
        places=torch.from_numpy(places),
        seen=torch.full((rows, sampling.seen_words(vocab)), -1, dtype=torch.int32),
        bests=torch.full((rows, 2 * sampling.sample_parts(vocab)), -1, dtype=torch.int32),
        arrived=torch.zeros(rows, dtype=torch.int32),
        tokens=torch.full((rows,), -1, dtype=torch.int32),
        largest=torch.zeros(rows),
    )
    names = ("tokens", "largest", "logits", "params", "history")
    scratch = sampling.SampleScratch(*map(bench.operand, ("seen", "bests", "arrived")))
    step = bench.operand("ids"), bench.operand("places")
    call = sampling.sample(*map(bench.operand, names), scratch=scratch, step=step)
    bench.run(call)
    assert not bench.tensors["arrived"].any(), "the next step counts from zero"
    return bench


@pytest.mark.parametrize(
    ("vocab", "dtype", "rows"),
    [
        (301, torch.float32, 120), (1024, torch.bfloat16, 120), (96, torch.float16, 120),
        (16_400, torch.bfloat16, 8),
    ],
)  # fmt: skip
def test_tokens_drawn_are_those_that_the_runtime_draws(vocab, dtype, rows):
    """Logits of few different values, so that many are equal at every bound; in the last case two
    blocks share a row."""
    rng = np.random.default_rng(vocab)
    steps = torch.from_numpy(rng.integers(-12, 13, (rows, vocab))) / 8
    logits = torch.where(torch.from_numpy(rng.random((rows, vocab)) < 0.02), -torch.inf, steps)
    logits[:, 0] = 0.0  # no row has nothing but -inf
    logits = logits.to(dtype)
    drawn_by = [
        SampleRow(
            # Of some, only the last token was generated.
            random_params(rng),
            int(rng.integers(2**40)),
            history,
            len(history) - 1 if rng.random() < 0.3 else int(rng.integers(len(history))),
        )
        for history in rng.integers(0, vocab, (rows, vocab // 2)).astype(np.int32)
    ]
    bench = drawn(logits, drawn_by)
    want = sample(logits.float().numpy(), drawn_by)
    assert bench.tensors["tokens"].tolist() == want.tolist()


@pytest.mark.parametrize(("vocab", "dtype"), [(40_016, torch.bfloat16), (9_001, torch.float32)])
def test_greedy_tokens_are_the_first_of_the_largest_logits(vocab, dtype):
    """In rows longer than what a block loads at once, divided unevenly; NaN is seen wherever it
    is."""
    rng, rows = np.random.default_rng(vocab), 12
    logits = torch.from_numpy(rng.integers(-12, 13, (rows, vocab))).to(dtype)
    at = rng.integers(1, vocab, rows)
    at[0] = vocab - 1
    for row in range(0, 4):
        logits[row, at[row]] = 20.0  # the only one
    logits[4, : at[4]] = -torch.inf
    logits[5, at[5]] = logits[6, 0] = torch.nan
    logits[7, at[7]] = torch.inf
    greedy = SampleRow(SamplingParams(temperature=0.0), 0, np.zeros(0, np.int32))
    bench = drawn(logits, [greedy] * rows)
    torch.testing.assert_close(
        bench.tensors["largest"], logits.float().max(-1).values, equal_nan=True, rtol=0, atol=0
    )
    numbers = [row for row in range(rows) if row not in (5, 6)]
    first = torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits[numbers].float()])
    assert bench.tensors["tokens"][numbers].tolist() == first.tolist()
    assert bench.tensors["tokens"][5] == at[5] and bench.tensors["tokens"][6] == 0


def test_the_last_token_alone_is_penalised():
    """It is what the step began with, and nothing else is known of the sequence's tokens."""
    likes = SamplingParams(presence_penalty=-2.0)
    rows = [SampleRow(likes, 3, np.array([1, 7, last], np.int32), 2) for last in (5, 6)]
    logits = torch.zeros(2, 40)
    logits[:, 9] = 1.0
    assert drawn(logits, rows).tensors["tokens"].tolist() == [5, 6]
