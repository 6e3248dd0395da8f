"""staging.cu on an emulated GPU: the host's areas take turns."""

from __future__ import annotations

import pytest
import torch
from emulation.bench import Bench
from emulation.build import unavailable

from llmforge.kernels.launch import Launch, Operand
from llmforge.kernels.staging import deliver, fetch

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

INTS = 4 * 5000  # more than the block has under way at once


def areas(bench: Bench, name: str) -> tuple[Operand, Operand]:
    return bench.operand(f"{name}.0"), bench.operand(f"{name}.1")


def test_steps_fetch_from_and_deliver_to_the_areas_in_turn() -> None:
    bench, most, rows = Bench(), 700, 600
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> torch.Tensor:
        return torch.randint(2**31 - 1, (count,), generator=generator, dtype=torch.int32)

    bench.tensors |= {f"arrays.{turn}": drawn(INTS) for turn in (0, 1)}
    bench.tensors |= {f"drawn.{turn}": drawn(2 * most) for turn in (0, 1)}
    bench.tensors |= {
        "step": torch.zeros(INTS, dtype=torch.int32),
        "sampled": drawn(2 * most),
        "turn": torch.zeros(1, dtype=torch.int32),
    }
    step, sampled, turn = (bench.operand(name) for name in ("step", "sampled", "turn"))
    bring = fetch(step, areas(bench, "arrays"), turn, 4 * (INTS - 4))
    take = deliver(areas(bench, "drawn"), sampled, turn, most)
    for number in range(4):
        now, other = f"{number % 2}", f"{1 - number % 2}"
        bench.tensors["step"].fill_(-1)
        bench.tensors["sampled"].copy_(drawn(2 * most))
        before = {name: tensor.clone() for name, tensor in bench.tensors.items()}
        bench.run(bring)
        bench.run(take, rows=rows)
        assert torch.equal(bench.tensors["step"][:-4], before[f"arrays.{now}"][:-4])
        assert (bench.tensors["step"][-4:] == -1).all(), "beyond what was asked for"
        got, want = bench.tensors[f"drawn.{now}"].clone(), before["sampled"].clone()
        for half in (slice(0, most), slice(most, 2 * most)):
            assert torch.equal(got[half][:rows], want[half][:rows])
            assert torch.equal(got[half][rows:], before[f"drawn.{now}"][half][rows:])
        assert torch.equal(bench.tensors[f"drawn.{other}"], before[f"drawn.{other}"])


def test_only_whole_packs_are_fetched() -> None:
    one = Operand("x", (4,), "int32", 4)
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        fetch(one, (one, one), one, 24)
    assert isinstance(fetch(one, (one, one), one, 32), Launch)
