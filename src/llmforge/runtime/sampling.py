"""Drawing next tokens from logits, on the host, with numpy.

The filters are transformers' logits processors in the same order: repetition penalty, temperature,
top-k, top-p, min-p; frequency and presence penalty come behind that for repetition. The draw is the
Gumbel-max trick with noise that is a function of (seed, position, token) alone, so a row's token
depends on nothing else in its batch, and a target that samples on its device by the same definition
(see `gumbel_noise`) draws the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llmforge.engine.step import Float32, Int32, SampleRow
from llmforge.errors import RequestError

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_GROUP = 32  # scores of a group in _kth_largest


def sample(logits: Float32, rows: Sequence[SampleRow]) -> Int32:
    """One token for each row: `logits` [R, vocab] with `rows` [R] → int32 [R].

    Greedy rows get the largest logit, ties to the lowest token. `logits` is not changed. Raises
    RequestError where a row has NaN or +inf, or nothing but -inf.
    """
    assert len(logits) == len(rows), "one SampleRow for each row of logits"
    plain = np.array([row.params.greedy and not row.params.penalises for row in rows], np.bool_)
    if plain.all():
        return _argmax(logits, rows)
    tokens = np.empty(len(rows), np.int32)
    if plain.any():
        tokens[plain] = _argmax(logits[plain], [rows[i] for i in range(len(rows)) if plain[i]])
    for index in np.flatnonzero(~plain).tolist():
        tokens[index] = _sample_row(logits[index], rows[index])
    return tokens


def filtered(logits: Float32, row: SampleRow) -> tuple[Int64, Float64]:
    """What a row that is not greedy is drawn from: the kept tokens in ascending order, and for each
    ``(logit - largest logit) / temperature`` after the penalties: log-probabilities up to a
    constant.

    A token stays in top-k if its logit is at least the k-th largest (so ties may keep more than
    k); in top-p if the more likely tokens do not yet reach top_p, where of equally likely tokens
    the highest id counts as more likely (what a stable ascending sort gives transformers); in
    min-p if its probability is at least min_p times the largest. At least one is kept.
    """
    params = row.params
    scores = penalised(logits, row)
    largest = float(scores.max())
    _check_finite(largest, row.position)
    if 0 < params.top_k < len(scores):
        bound = _kth_largest(scores, params.top_k)
        tokens = np.flatnonzero((scores >= bound) & (scores > -np.inf))
        # Subtracting before dividing keeps tiny temperatures finite.
        scaled = (scores[tokens].astype(np.float64) - largest) / params.temperature
    else:
        tokens = np.flatnonzero(scores > -np.inf)
        kept = scores if len(tokens) == len(scores) else scores[tokens]
        scaled = (kept.astype(np.float64) - largest) / params.temperature
    if params.top_p < 1.0:
        keep = _nucleus(np.exp(scaled), params.top_p)
        tokens, scaled = tokens[keep], scaled[keep]
    if params.min_p > 0.0:
        keep = np.flatnonzero(np.exp(scaled) >= params.min_p)
        tokens, scaled = tokens[keep], scaled[keep]
    return tokens, scaled


def penalised(logits: Float32, row: SampleRow) -> Float32:
    """Logits [vocab] of tokens in the row's history divided by the repetition penalty, or
    multiplied where negative; then those of generated tokens less ``frequency_penalty * count +
    presence_penalty``, as OpenAI's API defines them. A new array where the row has penalties."""
    if not row.params.penalises:
        return logits
    assert not row.ahead, "the host draws when all tokens before are known"
    result = logits.copy()
    if row.params.repetition_penalty != 1.0:
        seen = row.history[row.history < len(logits)]
        values = logits[seen]
        factor = np.float32(row.params.repetition_penalty)
        # A token that occurs twice is written twice with the same value.
        result[seen] = np.where(values < 0, values * factor, values / factor)
    if row.params.deducts:
        tokens, counts = row.generated()
        amounts = np.float32(row.params.frequency_penalty) * counts.astype(np.float32)
        amounts += np.float32(row.params.presence_penalty)
        inside = tokens < len(logits)
        result[tokens[inside]] -= amounts[inside]
    return result


def gumbel_noise(seed: int, position: int, tokens: Int64) -> Float64:
    """Standard Gumbel noise, float64, for ascending tokens at a position.

    Defined in uint32 arithmetic as Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
    numbers: as easy as 1, 2, 3", SC 2011), so that any device can compute the same:

        key     = (seed mod 2^32, (seed div 2^32) mod 2^32)
        counter = (token div 4, position mod 2^32, position div 2^32, 0)
        word    = philox4x32_10(counter, key)[token mod 4]
        u       = (word + 0.5) * 2^-32          exact in float64, and never 0 or 1
        noise   = -log(-log(u))                 in float64

    One round of Philox maps counter (c0, c1, c2, c3) and key (k0, k1) to
    ``(hi(M1*c2) ^ c1 ^ k0, lo(M1*c2), hi(M0*c0) ^ c3 ^ k1, lo(M0*c0))`` with M0 = 0xD2511F53 and
    M1 = 0xCD9E8D57; between rounds k0 += 0x9E3779B9 and k1 += 0xBB67AE85 (mod 2^32).
    """
    word = _philox_words(seed, position, tokens)
    uniform = (word.astype(np.float64) + 0.5) * 2.0**-32
    noise: Float64 = -np.log(-np.log(uniform))
    return noise


def _sample_row(logits: Float32, row: SampleRow) -> int:
    if row.params.greedy:
        return int(_argmax(penalised(logits, row)[None], [row])[0])
    tokens, scaled = filtered(logits, row)
    if len(tokens) == 1:
        return int(tokens[0])
    # The tokens ascend and argmax takes the first of equals: ties go to the lowest token.
    scaled += gumbel_noise(row.params.seed, row.position, tokens)
    return int(tokens[scaled.argmax()])


def _argmax(logits: Float32, rows: Sequence[SampleRow]) -> Int32:
    tokens: Int32 = logits.argmax(axis=1).astype(np.int32)
    # argmax takes NaN for the largest, so looking at what it found is enough.
    for row, largest in zip(rows, logits[np.arange(len(tokens)), tokens], strict=True):
        _check_finite(float(largest), row.position)
    return tokens


def _check_finite(largest: float, position: int) -> None:
    if not np.isfinite(largest):
        raise RequestError(
            f"the largest logit of the token at position {position} is {largest}, so no token can "
            "be drawn; the weights or the engine's precision are unfit "
            "(look for NaN weights with: llmforge verify; build with a wider dtype)"
        )


def _kth_largest(scores: Float32, k: int) -> np.float32:
    """Exactly the k-th largest, for 1 <= k <= n, mostly without partitioning all n.

    Cut the scores into at least k groups: the k-th largest of the groups' maxima is reached by k
    scores, so it is a lower bound, and only the scores that reach it need be partitioned.
    """
    groups = len(scores) // _GROUP
    if groups >= k:
        maxima = scores[: groups * _GROUP].reshape(groups, _GROUP).max(axis=1)
        scores = scores[scores >= np.partition(maxima, groups - k)[groups - k]]
    found: np.float32 = np.partition(scores, len(scores) - k)[len(scores) - k]
    return found


def _nucleus(weights: Float64, top_p: float) -> Int64:
    """Ascending indices of the nucleus of n unnormalised probabilities.

    With the tokens in ascending order, those are removed whose cumulative probability is at most
    ``1 - top_p``. All tokens with a probability below ``(1 - top_p) / n`` are removed without
    sorting them: they come first in that order, and together they have less than
    ``n * (1 - top_p) / n``. At least the last token of the order is kept.
    """
    removed_mass = (1.0 - top_p) * weights.sum()
    small = weights < removed_mass / len(weights)
    rest = np.flatnonzero(~small)
    if len(rest) == 0:  # only by rounding, where all are equally likely
        return np.array([len(weights) - 1])
    order = rest[weights[rest].argsort(kind="stable")]
    cumulative = weights[order].cumsum() + weights[small].sum()
    first = min(int(np.searchsorted(cumulative, removed_mass, side="right")), len(order) - 1)
    kept: Int64 = np.sort(order[first:])
    return kept


def _philox_words(seed: int, position: int, tokens: Int64) -> UInt64:
    """The 32-bit words of `gumbel_noise` for ascending tokens, as uint64."""
    of_token = tokens >> 2
    is_new = np.empty(len(tokens), np.bool_)
    is_new[:1] = True
    np.not_equal(of_token[1:], of_token[:-1], out=is_new[1:])
    words = _philox(seed, position, of_token[is_new].astype(np.uint64))
    if words.size == len(tokens):
        return words.reshape(-1)
    selected: UInt64 = words[is_new.cumsum() - 1, tokens & 3]
    return selected


def _philox(seed: int, position: int, blocks: UInt64) -> UInt64:
    """Philox4x32-10 of counters (block, position): [n] → [n, 4]."""
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    c0 = blocks
    c1 = np.full_like(blocks, position & 0xFFFFFFFF)
    c2 = np.full_like(blocks, position >> 32)
    c3 = np.zeros_like(blocks)
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (product1 >> _SHIFT) ^ c1 ^ np.uint64(key0)
        c1 = product1 & _MASK
        c2 = (product0 >> _SHIFT) ^ c3 ^ np.uint64(key1)
        c3 = product0 & _MASK
        key0 = key0 + _KEY_STEPS[0] & 0xFFFFFFFF
        key1 = key1 + _KEY_STEPS[1] & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=1)
