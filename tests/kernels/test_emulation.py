"""The emulation of a GPU itself: that it means what CUDA means, and that it shows what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulation.bench import Bench
from emulation.build import unavailable
from emulation.device import EmulationError

from llmforge.kernels.launch import Launch, specialised

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))


def run(body, seed=0, dtype="float32", threads=64, x=None, out=None, shared=0, hidden=False):
    """`out` [64 x int32] as a kernel leaves it: its body, with `x` to read. hidden: the kernel
    before may still write x."""
    text = (
        '#include "common.cuh"\n'
        f'extern "C" __global__ void kernel(int* out, const T* x) {{ {body} }}\n'
    )
    bench = Bench(seed)
    bench.tensors["out"] = torch.full((64,), -7, dtype=torch.int32) if out is None else out
    bench.tensors["x"] = torch.arange(64.0) if x is None else x
    spec = specialised("kernel.cu", "kernel", dtype)
    operands = (bench.operand("out"), bench.operand("x"))
    bench.device.hide([bench.tensors["x"]] if hidden else [])
    bench.run(Launch(spec, operands, (1, 1, 1), threads, shared), text=text)
    return bench.tensors["out"]


SEEDS = 8


def results(body, **options):
    return [run(body, seed, **options).tolist() for seed in range(SEEDS)]


REVERSE = "__shared__ int a[64]; const int i = threadIdx.x; a[i] = i; %s out[i] = a[63 - i];"


def test_what_wants_a_barrier_shows_without_it():
    right = list(range(63, -1, -1))
    assert results(REVERSE % "__syncthreads();") == [right] * SEEDS
    assert any(found != right for found in results(REVERSE % ""))
    in_warp = REVERSE.replace("63 - i", "i ^ 1")
    assert results(in_warp % "__syncwarp();") == [[i ^ 1 for i in range(64)]] * SEEDS
    assert any(found != [i ^ 1 for i in range(64)] for found in results(in_warp % ""))


def test_a_warp_that_runs_ahead_shows_what_it_overwrites():
    """Two sums over the block: the second must not begin before all have read the first."""
    body = """
    __shared__ float scratch[2];
    float a = block_sum(1, scratch); %s float b = block_sum(2, scratch);
    out[threadIdx.x] = (int)(a + b);
    """
    assert results(body % "__syncthreads();") == [[192] * 64] * SEEDS
    assert any(found != [192] * 64 for found in results(body % ""))


def test_shared_memory_that_nobody_wrote_is_wild():
    assert run("__shared__ int a[64]; out[threadIdx.x] = a[threadIdx.x];").tolist() == [-1] * 64
    dynamic = "extern __shared__ int a[]; out[threadIdx.x] = a[threadIdx.x];"
    text = run(
        dynamic.replace("extern __shared__ int a[];", "extern __shared__ int a[];"), shared=256
    )
    assert text.tolist() == [-1] * 64


def test_threads_that_cannot_go_on_are_named():
    with pytest.raises(EmulationError, match=r"no thread of block \(0, 0, 0\) can go on: "):
        run("if (threadIdx.x < 40) __syncthreads(); else __syncwarp();")
    with pytest.raises(EmulationError, match="different __syncthreads"):
        run("if (threadIdx.x < 40) __syncthreads();\nelse __syncthreads();")
    with pytest.raises(EmulationError, match="different functions"):
        run("if (threadIdx.x % 2) __syncwarp(); else __shfl_sync(FULL_WARP, 1, 0);")
    with pytest.raises(EmulationError, match=r"kernel: a trap: block \(0, 0, 0\), thread 5"):
        run("if (threadIdx.x == 5) __trap();")


def test_an_address_that_is_no_memory_ends_the_launch():
    with pytest.raises(EmulationError, match=r"touches no memory at .*, thread 5"):
        run("if (threadIdx.x == 5) out[1ll << 40] = 1;")
    assert run("out[threadIdx.x] = 1;").tolist() == [1] * 64


def test_threads_that_have_ended_are_not_waited_for():
    body = (
        "if (threadIdx.x >= 40) return; __syncthreads(); out[threadIdx.x] = __syncthreads_count(1);"
    )
    assert run(body.replace("; out", ";\nout")).tolist() == [40] * 40 + [-7] * 24


def test_lanes_exchange():
    i = list(range(64))
    lane = "const int i = threadIdx.x; out[i] = "
    assert run(lane + "__shfl_xor_sync(FULL_WARP, i, 5);").tolist() == [j ^ 5 for j in i]
    assert run(lane + "__shfl_sync(FULL_WARP, i, 3, 8);").tolist() == [j // 8 * 8 + 3 for j in i]
    down = [j + 3 if j % 16 < 13 else j for j in i]
    assert run(lane + "__shfl_down_sync(FULL_WARP, i, 3, 16);").tolist() == down
    up = [j - 3 if j % 32 >= 3 else j for j in i]
    assert run(lane + "__shfl_up_sync(FULL_WARP, i, 3);").tolist() == up
    votes = sum(1 << j for j in range(0, 31, 3))
    assert run(lane + "__ballot_sync(FULL_WARP, i % 32 % 3 == 0);").tolist() == [votes] * 64
    halves = "const int i = threadIdx.x; const u32 m = i % 32 < 16 ? 0xffffu : 0xffff0000u;"
    assert run(halves + "out[i] = __reduce_add_sync(m, 1);").tolist() == [16] * 64


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_product_on_tensor_cores(dtype):
    """Fragments as the PTX ISA lays them out."""
    generator = torch.Generator().manual_seed(1)
    kind = getattr(torch, dtype)
    a, b = (torch.randn(n, 16, generator=generator).to(kind) for n in (16, 8))
    body = """
    const u32* A = (const u32*)x; const u32* B = A + 128;
    const int g = threadIdx.x / 4, t = threadIdx.x % 4;
    float d[4] = {1, 1, 1, 1};
    mma(d, A[g * 8 + t], A[(g + 8) * 8 + t], A[g * 8 + t + 4], A[(g + 8) * 8 + t + 4],
        B[g * 8 + t], B[g * 8 + t + 4]);
    for (int i = 0; i < 4; i++) ((float*)out)[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
    """
    out = run(body, dtype=dtype, threads=32, x=torch.cat([a, b]), out=torch.zeros(128))
    expected = a.float() @ b.float().T + 1
    assert torch.allclose(out.reshape(16, 8), expected, rtol=1e-5, atol=1e-5)


def test_conversions_round_to_nearest_even():
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (60000,), generator=generator).to(torch.int32)
    halves = torch.arange(65536).to(torch.int16).view(torch.float16).float()
    between = (halves[:-1] + halves[1:]) / 2  # ties
    x = torch.cat([bits.view(torch.float32), halves, between])
    x = torch.cat([x, torch.zeros(-len(x) % 32)])
    finite = x.isfinite()
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        body = f"""
        const float* from = (const float*)x;
        for (int i = threadIdx.x; i < {len(x)}; i += 32) ((float*)out)[i] = rounded(from[i]);
        """
        got = run(body, dtype=name, threads=32, x=x, out=torch.zeros(len(x)))
        want = x.to(dtype).float()
        assert torch.equal(got[finite], want[finite]) and got[x.isnan()].isnan().all()


BULK = """
__shared__ u64 barrier;
__shared__ __align__(16) int a[64];
const int i = threadIdx.x;
if (i == 0) { barrier_init(&barrier); barriers_ready(); }
__syncthreads();
if (i == 0) { barrier_expect(&barrier, 256); copy_bulk(a, x, 256, &barrier, evict_first()); }
%s
out[i] = a[i];
"""
ASYNC = """
__shared__ __align__(16) int a[64];
const int i = threadIdx.x;
if (i < 16) copy_async(a + 4 * i, x + 4 * i);
copy_async_commit();
%s
__syncthreads();
out[i] = a[i];
"""


@pytest.mark.parametrize(
    ("body", "wait"), [(BULK, "barrier_wait(&barrier, 0);"), (ASYNC, "copy_async_wait<0>();")]
)
def test_who_does_not_wait_for_a_copy_has_not_got_it(body, wait):
    x = torch.arange(64, dtype=torch.int32).view(torch.float32)
    right = list(range(64))
    assert results(body % wait, x=x) == [right] * SEEDS
    assert any(found != right for found in results(body % "", x=x))
    with pytest.raises(EmulationError, match="a barrier that nobody completes"):
        run(BULK.replace("256, &b", "240, &b") % "barrier_wait(&barrier, 0);", x=x)


def test_who_does_not_wait_for_the_kernel_before_does_not_see_what_it_wrote():
    early = "const int i = threadIdx.x; const int y = x[i]; wait_for_previous(); out[i] = y;"
    late = "const int i = threadIdx.x; wait_for_previous(); const int y = x[i]; out[i] = y;"
    assert run(late, hidden=True).tolist() == list(range(64))
    assert run(early).tolist() == list(range(64))
    assert run(early, hidden=True).tolist() != list(range(64))


def test_writes_beside_the_operands_are_seen():
    bench = Bench()
    bench.tensors["all"] = torch.zeros(64)
    bench.device.watch(bench.tensors["all"])
    out = replace(bench.operand("all"), shape=("tokens",), offset=8)
    text = (
        '#include "common.cuh"\n'
        'extern "C" __global__ void kernel(T* out, int at) { out[(int)threadIdx.x + at] = 1; }\n'
    )
    spec = specialised("kernel.cu", "kernel", "float32")
    for at in (0, 1, -1):
        launch = Launch(spec, (out, at), (1, 1, 1), 32)
        if at == 0:
            bench.run(launch, text=text, tokens=32)
            continue
        with pytest.raises(EmulationError, match="kernel: writes outside its operands"):
            bench.run(launch, text=text, tokens=32)
