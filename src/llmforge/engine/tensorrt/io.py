"""The tensors at the edge of an engine: their names and shapes, stated once.

A call has B rows, sequences in neighbouring slots of the cache, with S new tokens each; R of the
B * S tokens' logits are wanted. Dimensions are numbers or "B", "S", "R".

    token_ids    [B, S]  the new tokens
    positions    [B, S]  the position of each, less than the capacity; rising along real tokens
    past_lens    [B]     positions of the slot that hold a token before this call: the new ones
                         follow (behind the slot's end nothing is written)
    prompt_lens  [B]     tokens of each prompt; only where a rotary embedding depends on it
    logit_rows   [R]     rows of the flattened [B * S]

All int32. A cache is [B, heads, capacity, size], and all of it holds finite numbers (zeroed at
first): what lies beyond a sequence's end is masked, but is multiplied by zero. With native layers
its updated form, NAME.out, is the same memory; with primitives NAME.new [B, heads, S, size] is what
the runtime has to write into it. Hidden states have the names of the graph's tensors: [tokens, F]
is [B, S, F] here, [rows, F] is [R, F]. Weights that are not in the engine are inputs weight.0,
weight.1, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmforge.engine.step import Limits
from llmforge.model.graph import Shape, Tensor

TOKEN_IDS = "token_ids"
POSITIONS = "positions"
PAST_LENS = "past_lens"
PROMPT_LENS = "prompt_lens"
LOGIT_ROWS = "logit_rows"

STEP_SHAPES: Mapping[str, Shape] = {
    TOKEN_IDS: ("B", "S"),
    POSITIONS: ("B", "S"),
    PAST_LENS: ("B",),
    PROMPT_LENS: ("B",),
    LOGIT_ROWS: ("R",),
}


def weight_input(index: int) -> str:
    """What an engine calls its input number `index` that is a weight."""
    return f"weight.{index}"


_DIMENSIONS: Mapping[str, Shape] = {"tokens": ("B", "S"), "rows": ("R",)}


def engine_shape(tensor: Tensor) -> Shape:
    """The shape at the edge of an engine of a graph's hidden state."""
    first = tensor.shape[0]
    assert isinstance(first, str), tensor
    return (*_DIMENSIONS[first], *tensor.shape[1:])


@dataclass(frozen=True)
class Profile:
    """The sizes that B, S and R take in one kind of call: least, most common, most."""

    B: tuple[int, int, int]
    S: tuple[int, int, int]
    R: tuple[int, int, int]

    def shapes(self, shape: Shape) -> tuple[tuple[int, ...], ...]:
        """The least, the most common and the greatest shape of a tensor."""
        return tuple(
            tuple(getattr(self, d)[which] if isinstance(d, str) else d for d in shape)
            for which in range(3)
        )


PREFILL, DECODE = 0, 1  # indices of the profiles


def profiles(limits: Limits) -> tuple[Profile, Profile]:
    """The kinds of calls: prefill of one sequence at a time, whose scores alone are
    heads x S x (capacity + S) numbers, and decode of any batch."""
    most = limits.max_batch_size
    chunk = min(limits.max_num_tokens, limits.max_seq_len)
    prefill = Profile(B=(1, 1, 1), S=(1, chunk, chunk), R=(1, 1, most))
    batches = (1, min(8, most), most)
    return prefill, Profile(B=batches, S=(1, 1, 1), R=batches)
