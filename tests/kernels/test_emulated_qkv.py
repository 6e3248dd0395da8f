"""qkv_pairs.cu on an emulated GPU gives the bits that qkv.cu gives."""

from __future__ import annotations

import pytest
import torch
from emulation.bench import Bench
from emulation.build import unavailable

from llmforge.kernels import attention
from llmforge.kernels.attention import Cache, QkvSteps
from llmforge.model.reference import DTYPES

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))

TOKENS, PAST, BLOCK_SIZE = (5, 1, 3), (0, 17, 30), 16  # of three sequences
OUTPUTS = ("out", "keys", "values")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rope_dim", "bias", "dtype"),
    [
        (8, 2, 64, 64, True, "bfloat16"),
        (4, 4, 32, 16, True, "float16"),  # a part of each head is rotated
        (3, 1, 48, 0, False, "bfloat16"),  # none is
        (40, 8, 80, 80, True, "bfloat16"),  # more heads than a block has at a time
    ],
)
def test_the_bits_of_the_other_kernel(
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope_dim: int,
    bias: bool,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(heads + head_dim)
    bench, tokens, width = Bench(), sum(TOKENS), (heads + 2 * kv_heads) * head_dim
    lens = [n + p for n, p in zip(TOKENS, PAST, strict=True)]
    positions = [torch.arange(p, n) for p, n in zip(PAST, lens, strict=True)]
    angles = torch.randn(tokens, rope_dim // 2)
    cache_shape = (10, BLOCK_SIZE, kv_heads, head_dim)
    bench.tensors |= {
        "qkv": torch.randn(tokens, width).to(DTYPES[dtype]),
        "bias": torch.randn(width).to(DTYPES[dtype]),
        "table": torch.cat((angles.cos(), angles.sin()), dim=1),
        "positions": torch.cat(positions).to(torch.int32),
        "query_starts": torch.tensor((0, *TOKENS)).cumsum(0).to(torch.int32),
        "kv_lens": torch.tensor(lens, dtype=torch.int32),
        "block_table": torch.randperm(9).view(3, 3).to(torch.int32),
        "out": torch.zeros(tokens, heads * head_dim, dtype=DTYPES[dtype]),
        "keys": torch.zeros(cache_shape, dtype=DTYPES[dtype]),
        "values": torch.zeros(cache_shape, dtype=DTYPES[dtype]),
    }
    rows, out = bench.operand("qkv", "tokens"), bench.operand("out", "tokens")
    names = ("keys", "values", "query_starts", "kv_lens", "block_table")
    keys, values, starts, kv_lens, table = map(bench.operand, names)
    cache = Cache(keys, values, starts, kv_lens, table, kv_heads, head_dim, BLOCK_SIZE, 3)
    steps = QkvSteps(
        table=bench.operand("table", "tokens") if rope_dim else None,
        bias=bench.operand("bias") if bias else None,
    )
    q_end, k_end = heads * head_dim, (heads + kv_heads) * head_dim
    q, k, v = (rows.columns(*part) for part in ((0, q_end), (q_end, k_end), (k_end, width)))

    def given() -> dict[str, torch.Tensor]:
        for name in OUTPUTS:
            bench.tensors[name].fill_(7.5)  # which stays where nothing is written
        launch = attention.qkv(out, q, k, v, cache, bench.operand("positions"), steps)
        bench.run(launch, tokens=tokens, sequences=len(TOKENS))
        sources.append(launch.kernel.source)
        return {name: bench.tensors[name].clone() for name in OUTPUTS}

    sources: list[str] = []
    got = given()
    monkeypatch.setattr(attention, "_in_pairs", lambda *_: False)
    want = given()
    assert sources == ["qkv_pairs.cu", "qkv.cu"]
    for name in OUTPUTS:
        assert torch.equal(got[name], want[name]), name
