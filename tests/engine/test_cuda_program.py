"""Where a program's buffers lie."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from llmforge.engine.cuda.program import ALIGNMENT, Instruction, Matmul, plan_arena
from llmforge.kernels.launch import Operand


def instruction(*buffers: str) -> Instruction:
    """One that uses these buffers, at most four."""
    operands: list[Any] = [Operand(name, (1,), "int32", 1) for name in buffers]
    x, weight, bias, out = operands + operands[:1] * (4 - len(operands))
    return Instruction(Matmul(x, weight, bias, out), ())


@given(st.data())
def test_buffers_that_are_alive_at_once_do_not_overlap(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 8))
    names = [f"arena.{i}" for i in range(count)]
    sizes = {name: data.draw(st.integers(1, 3000)) for name in names}
    used = st.lists(st.sampled_from([*names, "weights"]), min_size=1, max_size=4)
    program = data.draw(st.lists(used, min_size=1, max_size=10))
    written = sorted({name for each in program for name in each} & set(names))
    kept = data.draw(st.lists(st.sampled_from(written), unique=True)) if written else []
    offsets, total = plan_arena([instruction(*each) for each in program], sizes, kept)
    assert sorted(offsets) == written
    alive = {}
    for name in written:
        at = [index for index, each in enumerate(program) if name in each]
        alive[name] = range(at[0], len(program) + 1 if name in kept else at[-1] + 1)
        assert offsets[name] % ALIGNMENT == 0 and offsets[name] + sizes[name] <= total
    for name in written:
        for other in written[written.index(name) + 1 :]:
            if set(alive[name]) & set(alive[other]):
                first, second = sorted((name, other), key=offsets.__getitem__)
                assert offsets[first] + sizes[first] <= offsets[second]


def test_a_buffer_lies_behind_all_that_are_alive_with_it() -> None:
    """Behind the longest, not behind the one that begins last."""
    program = [
        instruction("arena.long", "arena.new"),
        instruction("arena.low", "arena.high", "arena.new"),
    ]
    sizes = {"arena.long": 8, "arena.low": 4, "arena.high": 3, "arena.new": 1}
    sizes = {name: size * ALIGNMENT for name, size in sizes.items()}
    offsets, _ = plan_arena(program, sizes, [])
    assert offsets["arena.new"] == 8 * ALIGNMENT
    assert offsets["arena.high"] == 4 * ALIGNMENT


def test_memory_is_used_again() -> None:
    program = [instruction("arena.a"), instruction("arena.a", "arena.b"), instruction("arena.b")]
    program += [instruction("arena.c"), instruction("arena.c", "arena.d")]
    sizes = {f"arena.{name}": ALIGNMENT for name in "abcd"}
    assert plan_arena(program, sizes, [])[1] == 2 * ALIGNMENT
    assert plan_arena(program, sizes, ["arena.a"])[1] == 3 * ALIGNMENT


def test_a_hole_that_fits_is_filled() -> None:
    program = [
        instruction("arena.all", "arena.a"),
        instruction("arena.a", "arena.b"),
        instruction("arena.b", "arena.c", "arena.all"),
    ]
    sizes = {"arena.all": 4, "arena.a": 2, "arena.b": 2, "arena.c": 2}
    sizes = {name: size * ALIGNMENT for name, size in sizes.items()}
    offsets, total = plan_arena(program, sizes, [])
    assert offsets["arena.c"] == offsets["arena.a"] == 4 * ALIGNMENT
    assert total == 8 * ALIGNMENT
