"""Random exchanges between ranks, each beside what it should give: for ranks on GPUs and for
emulated ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from llmforge.comm import Comm
from llmforge.engine.cuda.checking import TOLERANCE
from llmforge.kernels import collectives
from llmforge.kernels.collectives import Group
from llmforge.kernels.launch import Operand
from llmforge.model.reference import DTYPES, REFERENCE


class Bench(Protocol):
    """Launches of one rank, bound to tensors by name."""

    comm: Comm
    tensors: dict[str, torch.Tensor]

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor where launches read and write it."""
        ...

    def run(self, made: collectives.Collective, rows: int) -> None: ...


def whole(name: str, *shape: int | str, dtype: str) -> Operand:
    return Operand(name, shape, dtype, int(shape[-1]))


def drawn(seed: int, shape: tuple[int, ...], dtype: str) -> torch.Tensor:
    """Values of very different size, so that the order of a sum shows."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.randint(-3, 4, shape, generator=generator)
    return (torch.randn(shape, generator=generator) * 10.0**powers).to(DTYPES[dtype])


def in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    wide = torch.float64 if parts[0].dtype == torch.float32 else torch.float32
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def random_round(bench: Bench, rng: Any, seed: int) -> None:
    """All ranks draw the same from `rng`."""
    dtype = str(rng.choice(["float32", "bfloat16", "float16"]))
    features = int(rng.choice([1, 36, 64, 1000, 2048, 4096]))
    most = int(rng.choice([4, 256]))
    rows = int(rng.integers(1, most + 1))
    kind = str(rng.choice(["reduce", "norm", "gather", "message", "broadcast"]))
    one_round(bench, kind, dtype, features, most, rows, seed)


def one_round(
    bench: Bench, kind: str, dtype: str, features: int, most: int, rows: int, seed: int
) -> None:
    comm, shape = bench.comm, (rows, features)
    xs = [drawn(seed + rank, shape, dtype) for rank in range(comm.size)]
    extra = {
        name: drawn(seed + 90 + i, (features,) if name in "bw" else shape, dtype)
        for i, name in enumerate("rbw")
    }
    bench.tensors = {name: bench.place(tensor) for name, tensor in extra.items()}
    bench.tensors["x"] = bench.place(xs[comm.rank])
    padding = 3 if kind == "gather" and features > 3 else 0
    width = features * comm.size - padding if kind == "gather" else features
    for name in ("out", "sum"):
        poisoned = torch.full((rows, width), torch.nan, dtype=DTYPES[dtype])
        bench.tensors[name] = bench.place(poisoned)
    x, r, out_sum = (whole(n, "tokens", features, dtype=dtype) for n in ("x", "r", "sum"))
    out = whole("out", "tokens", width, dtype=dtype)
    b, w = (whole(name, features, dtype=dtype) for name in "bw")
    group = Group(comm.size, True, most)
    what = (kind, dtype, features, most, rows)
    if kind == "message":
        bench.run(collectives.send(x, most), rows)
        bench.run(collectives.receive(out, most), rows)
        assert torch.equal(bench.tensors["out"].cpu(), xs[comm.rank - 1]), what
        return
    if kind == "broadcast":
        ids = torch.randint(2**31, (comm.size, rows), generator=torch.Generator().manual_seed(seed))
        mine, first = ids[comm.rank].to(torch.int32), ids[0].to(torch.int32)
        bench.tensors["ids"] = bench.place(mine)
        bench.run(collectives.broadcast(Operand("ids", ("tokens",), "int32", 1), group), rows)
        assert torch.equal(bench.tensors["ids"].cpu(), first), what
        return
    if kind == "gather":
        bench.run(collectives.all_gather(out, x, group), rows)
        expected = torch.cat(xs, dim=-1)[:, :width]
        assert torch.equal(bench.tensors["out"].cpu(), expected), what
        return
    total = in_rank_order(xs)
    if kind == "reduce":
        bench.run(collectives.all_reduce(out, x, group), rows)
        assert torch.equal(bench.tensors["out"].cpu(), total), what
        return
    made = collectives.all_reduce(
        out, x, group, bias=b, residual=r, weight=w, out_sum=out_sum, eps=1e-5
    )
    bench.run(made, rows)
    total = total + extra["b"] + extra["r"]
    assert torch.equal(bench.tensors["sum"].cpu(), total), what
    [normed] = REFERENCE["rms_norm"]([total, extra["w"]], {"eps": 1e-5}, None)
    got, want = bench.tensors["out"].cpu().float(), normed.float()
    assert float((got - want).norm() / want.norm()) <= TOLERANCE[dtype], what
