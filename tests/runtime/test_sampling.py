"""The sampler: filters against transformers' processors, the draw against its definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmforge.engine.step import SampleRow, SamplingParams
from llmforge.errors import RequestError
from llmforge.runtime.sampling import filtered, gumbel_noise, penalised, sample

NO_HISTORY = np.array([], np.int32)


def transformers_probabilities(logits, params, history):
    """The distribution that transformers draws from. float64, since at a float32 edge of top-p
    the two may round differently."""
    ids = torch.tensor(history, dtype=torch.int64)[None]
    scores = torch.tensor(logits, dtype=torch.float64)[None]
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    processors = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    for processor in processors:
        scores = processor(ids, scores)
    return scores.softmax(-1)[0].numpy()


def drawn_by(**params):
    return SampleRow(SamplingParams(**params), 0, NO_HISTORY)


def our_probabilities(logits, params, history=NO_HISTORY):
    tokens, scaled = filtered(logits, SampleRow(params, 0, np.asarray(history, np.int32)))
    assert (np.diff(tokens) > 0).all()
    probabilities = np.zeros(len(logits))
    probabilities[tokens] = np.exp(scaled) / np.exp(scaled).sum()
    return probabilities


@settings(max_examples=300, deadline=None)
@given(
    vocab=st.integers(1, 300),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 2, 5, 50, 1000]),
    top_p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 0.999]),
    penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
def test_kept_tokens_and_probabilities_are_those_of_transformers(
    vocab, seed, spread, temperature, top_k, top_p, min_p, penalty
):
    generator = np.random.default_rng(seed)
    logits = (generator.standard_normal(vocab) * spread).astype(np.float32)
    history = generator.integers(0, vocab, 12).astype(np.int32)
    # In float32 from here on both sides, the penalty excepted: it is applied in float32 by us.
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = transformers_probabilities(logits, params, history)
    actual = our_probabilities(logits, params, history)
    assert ((expected > 0) <= (actual > 0)).all()  # transformers' may underflow to 0
    np.testing.assert_allclose(actual, expected, atol=1e-12)
    penalised = SamplingParams(penalty, temperature=temperature, top_k=top_k)
    expected = transformers_probabilities(logits, penalised, history)
    np.testing.assert_allclose(
        our_probabilities(logits, penalised, history), expected, rtol=1e-3, atol=1e-9
    )


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
@pytest.mark.parametrize("top_p", [0.0, 0.2, 0.5, 0.75, 1.0])
def test_ties_are_kept_as_transformers_keeps_them(top_k, top_p):
    logits = np.array([0.5, 2.0, 2.0, 0.5, 2.0, 2.0, -1.0, 2.0], np.float32)
    params = SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p)
    if top_p == 0.0:  # transformers refuses 0; the limit is the last of the largest
        assert our_probabilities(logits, params).argmax() == 7
        assert our_probabilities(logits, params).max() == 1.0
        return
    expected = transformers_probabilities(logits, params, NO_HISTORY)
    np.testing.assert_allclose(our_probabilities(logits, params), expected, atol=1e-12)


def test_of_many_equally_likely_tokens_the_highest_are_kept():
    logits = np.random.default_rng(3).integers(0, 2, 1000).astype(np.float32)
    tokens, _ = filtered(logits, drawn_by(temperature=1.0, top_p=0.9))
    kept_less_likely = tokens[logits[tokens] == 0]
    less_likely = np.flatnonzero(logits == 0)
    assert 100 < len(kept_less_likely) < len(less_likely)
    assert np.array_equal(kept_less_likely, less_likely[-len(kept_less_likely) :])
    assert np.isin(np.flatnonzero(logits == 1), tokens).all()


def test_the_nucleus_of_a_large_vocabulary_equals_a_full_sort():
    logits = (np.random.default_rng(1).standard_normal(50_000) * 3).astype(np.float32)
    for top_p in (0.3, 0.9, 0.999):
        params = SamplingParams(temperature=0.8, top_p=top_p)
        expected = transformers_probabilities(logits, params, NO_HISTORY)
        np.testing.assert_allclose(our_probabilities(logits, params), expected, atol=1e-12)


def test_top_k_of_a_large_vocabulary_is_exact():
    logits = np.random.default_rng(2).standard_normal(100_003).astype(np.float32)
    for top_k in (1, 50, 3_000, 100_002, 100_003, 200_000):
        tokens, _ = filtered(logits, drawn_by(temperature=1.0, top_k=top_k))
        expected = np.sort(np.argsort(-logits, kind="stable")[:top_k])
        assert np.array_equal(tokens, expected)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1e-40),
        SamplingParams(temperature=1e-300, top_p=0.5),
        SamplingParams(temperature=1.0, top_p=0.0),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=1),
        SamplingParams(temperature=1.0, top_k=10**9, top_p=0.0, min_p=1.0),
    ],
)
@pytest.mark.parametrize("vocab", [1, 2, 7, 1000])
def test_at_its_edges_every_filter_keeps_only_the_largest(params, vocab):
    logits = np.random.default_rng(vocab).standard_normal((1, vocab)).astype(np.float32) * 50
    assert sample(logits, [SampleRow(params, 3, NO_HISTORY)])[0] == logits[0].argmax()


def test_greedy_takes_the_lowest_of_equals_and_leaves_logits_alone():
    logits = np.array([[1, 3, 3, 0], [-np.inf, -2, -3, -2]], np.float32)
    before = logits.copy()
    rows = [SampleRow(SamplingParams(), 0, NO_HISTORY)] * 2
    result = sample(logits, rows)
    assert result.tolist() == [1, 1] and result.dtype == np.int32
    history = np.array([1, 1], np.int32)  # counted once
    penalised = SampleRow(SamplingParams(repetition_penalty=1.5), 0, history)
    # 3 → 2 and -2 → -3
    assert sample(logits, [penalised, penalised]).tolist() == [2, 3]
    assert np.array_equal(logits, before)


def test_what_is_deducted_counts_what_was_generated():
    logits = np.array([5, 1, 4, 3, 2], np.float32)
    history = np.array([4, 2, 2, 0, 2, 9, 0, 2], np.int32)  # 9: beyond the vocabulary

    def scores(num_prompt, **penalties):
        row = SampleRow(SamplingParams(**penalties), 8, history, num_prompt)
        return penalised(logits, row).tolist()

    assert scores(3, frequency_penalty=0.5) == [4, 1, 3, 3, 2]
    assert scores(3, presence_penalty=0.5) == [4.5, 1, 3.5, 3, 2]
    assert scores(8, frequency_penalty=0.5, presence_penalty=1.0) == logits.tolist()
    assert scores(0, frequency_penalty=-0.5, presence_penalty=0.25) == [5.75, 1, 5.75, 3, 2.25]
    # The repetition penalty is for the prompt too, and comes first.
    assert scores(3, repetition_penalty=2.0, presence_penalty=0.5) == [2.0, 1, 1.5, 3, 1]
    assert logits.tolist() == [5, 1, 4, 3, 2]
    greedy = SampleRow(SamplingParams(presence_penalty=1.5), 8, history, 3)
    assert sample(logits[None], [greedy])[0] == 0
    assert sample(logits[None], [greedy._replace(params=SamplingParams(0.5))])[0] == 0
    more = greedy._replace(params=SamplingParams(frequency_penalty=1.5))
    assert sample(logits[None], [more])[0] == 3


def test_rows_are_drawn_alike_in_any_batch():
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((12, 64)).astype(np.float32)
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=0.8, seed=2**63 + 5),
        SamplingParams(temperature=1.2, top_k=9, top_p=0.8, seed=1),
        SamplingParams(repetition_penalty=1.4),
        SamplingParams(temperature=0.7, frequency_penalty=0.4, presence_penalty=0.2),
    ]
    history = generator.integers(0, 64, 9).astype(np.int32)
    rows = [SampleRow(kinds[i % 5], i, history, 3) for i in range(12)]
    together = sample(logits, rows)
    for index in range(12):
        assert sample(logits[index : index + 1], [rows[index]])[0] == together[index]
    order = generator.permutation(12)
    assert np.array_equal(sample(logits[order], [rows[i] for i in order]), together[order])
    assert len(sample(logits[:0], [])) == 0


def philox_by_the_book(counter, key):
    """Philox4x32-10 with Python integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (product1 >> 32) ^ c[1] ^ k[0],
            product1 & 0xFFFFFFFF,
            (product0 >> 32) ^ c[3] ^ k[1],
            product0 & 0xFFFFFFFF,
        ]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_gives_the_known_answers_of_its_authors():
    # kat_vectors of Random123 for philox4x32 10
    assert philox_by_the_book([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    counter = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox_by_the_book(counter, [0xA4093822, 0x299F31D0]) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 3, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 11, 2**33 + 1])
@pytest.mark.parametrize("tokens", [range(16), range(10), [0, 2, 3, 9, 151_999]])
def test_noise_is_as_documented(seed, position, tokens):
    key = (seed % 2**32, seed // 2**32)
    noise = gumbel_noise(seed, position, np.array(tokens))
    for token, value in zip(tokens, noise, strict=True):
        counter = (token // 4, position % 2**32, position // 2**32, 0)
        uniform = (philox_by_the_book(counter, key)[token % 4] + 0.5) * 2.0**-32
        assert math.isclose(value, -math.log(-math.log(uniform)), rel_tol=1e-12)


def chi_square(counts, probabilities):
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize(
    "params",
    [SamplingParams(temperature=1.0, seed=3), SamplingParams(temperature=0.6, top_k=6, seed=9)],
)
def test_draws_have_the_distribution(params):
    logits = np.random.default_rng(4).standard_normal(12).astype(np.float32)
    count = 20_000
    rows = [SampleRow(params, position, NO_HISTORY) for position in range(count)]
    drawn = sample(np.broadcast_to(logits, (count, 12)), rows)
    probabilities = our_probabilities(logits, params)
    counts = np.bincount(drawn, minlength=12)
    kept = probabilities > 0
    assert not counts[~kept].any()
    # The mean is k - 1 and the standard deviation sqrt(2(k - 1)): five of them above.
    free = kept.sum() - 1
    assert chi_square(counts[kept], probabilities[kept]) < free + 5 * math.sqrt(2 * free)


def test_neighbouring_seeds_positions_and_tokens_are_independent():
    noise = np.array([gumbel_noise(seed, 5, np.arange(4000)) for seed in range(4)])
    later = np.array([gumbel_noise(0, position, np.arange(4000)) for position in range(1, 5)])
    correlation = np.corrcoef(np.concatenate([noise, later]))
    shifted = np.corrcoef(noise[0][1:], noise[0][:-1])[0, 1]
    off_diagonal = correlation[~np.eye(8, dtype=bool)]
    assert np.abs(off_diagonal).max() < 0.08 and abs(shifted) < 0.08
    assert abs(noise.mean() - 0.5772) < 0.05 and abs(noise.var() - math.pi**2 / 6) < 0.1


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(1.1), SamplingParams(temperature=1.0)]
)
def test_logits_that_are_not_numbers_are_an_error(bad, params):
    logits = np.zeros((2, 5), np.float32)
    logits[1] = float(bad) if bad == "-inf" else 0
    logits[1, 3] = float(bad)
    rows = [SampleRow(params, position, np.array([1], np.int32)) for position in (4, 17)]
    with pytest.raises(RequestError, match=f"token at position 17 is {bad}, so no token"):
        sample(logits, rows)


def test_tokens_with_minus_infinity_are_never_drawn():
    logits = np.full((1, 50), -np.inf, np.float32)
    logits[0, [7, 30]] = 1.0
    for params in (SamplingParams(temperature=5.0), SamplingParams(temperature=5.0, top_k=20)):
        drawn = {int(sample(logits, [SampleRow(params, p, NO_HISTORY)])[0]) for p in range(40)}
        assert drawn == {7, 30}
