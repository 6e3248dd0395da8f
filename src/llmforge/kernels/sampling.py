"""The launch of sample.cu: a token for each row of logits."""

from __future__ import annotations

from dataclasses import dataclass

from llmforge.kernels.launch import Launch, Operand, Size, load_width, require, specialised

SAMPLE_PARAMS_BYTES = 72  # struct Params of sample.cu
_THREADS = 512
# Logits of two bytes that a block's threads have under way at once: 4 loads of 8 each.
_LOGITS = 4 * 8 * _THREADS


@dataclass(frozen=True)
class SampleScratch:
    """What sample.cu needs of its own, for each row: `seen` `seen_words` int32, `bests`
    2 * `sample_parts` int32, `arrived` one int32, zero before and after."""

    seen: Operand
    bests: Operand
    arrived: Operand


def seen_words(vocab: int) -> int:
    """Words of a row's two bits a token."""
    return 2 * -(-vocab // 32)


def sample_parts(vocab: int) -> int:
    """How many blocks share a row's logits: so many that their threads have all loads under way at
    once."""
    return -(-vocab // _LOGITS)


def sample(
    tokens: Operand,
    largest: Operand,
    logits: Operand,
    params: Operand,
    history: Operand,
    scratch: SampleScratch,
    step: tuple[Operand, Operand] | None = None,
) -> Launch:
    """One token a row of logits [rows, vocabulary]; see sample.cu for the other operands. step: the
    step's token_ids and logit_rows, without which no row may be `ahead`."""
    require(logits.contiguous, "sample: logits must be contiguous")
    vocab, rows = logits.features, logits.shape[0]
    parts = sample_parts(vocab)
    spec = specialised(
        "sample.cu", "sample", logits.dtype,
        VOCAB=vocab, WIDTH=load_width(logits, run=vocab), THREADS=_THREADS, PARTS=parts,
    )  # fmt: skip
    arguments = (
        tokens, largest, logits, params, history, *(step or (None, None)), scratch.seen,
        scratch.bests, scratch.arrived,
    )  # fmt: skip
    blocks = rows * parts if isinstance(rows, int) else Size(rows, parts)
    return Launch(spec, arguments, (blocks, 1, 1), _THREADS)
