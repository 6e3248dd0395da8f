// What CUDA C++ has no words for: every instruction that kernels write in PTX, each in a function.
// (Those of compute capability 9.0 alone: wgmma.cuh.)
// (The tests' emulation of a GPU has the same functions in C++.)
#pragma once

// -- the hand-over between kernels ----------------------------------------------------------------

// Programmatic dependent launch: a kernel's blocks may start while the one before it still runs.
// Nothing that the kernel before writes may be read, and nothing may be written, before
// `wait_for_previous`. Every kernel calls both, so a kernel that has waited knows that all kernels
// before it are complete. (But for decode_plan.cu's result, which decode_attention.cu reads before:
// that lets nothing start until all is written; nor does `fetch` of staging.cu.)
DEVICE void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -- the tensor cores -----------------------------------------------------------------------------

#if defined(MMA_TYPE)
// d[16 x 8] += a[16 x 16] b[16 x 8] on the tensor cores. Fragment layouts: PTX ISA, "mma.m16n8k16".
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPE "." MMA_TYPE
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix of 16-bit elements transposed: a lane has, and gets, elements 2t and 2t + 1 of row
// g (g = lane / 4, t = lane % 4).
DEVICE u32 transposed(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

// The products of two pairs of T, rounded to T (bfloat16: from compute capability 9.0).
DEVICE u32 multiply_pairs(u32 a, u32 b) {
    u32 products;
    asm("mul.rn." MMA_TYPE "x2 %0, %1, %2;" : "=r"(products) : "r"(a), "r"(b));
    return products;
}
#endif

// -- arithmetic -----------------------------------------------------------------------------------

// 2 to the power of x, to about 22 bits, of x below -126 zero.
DEVICE float power_of_2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// -- memory between ranks -------------------------------------------------------------------------

DEVICE void store_release(u32* address, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
DEVICE u32 load_acquire(const u32* address) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
DEVICE u64 nanoseconds() {
    u64 now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    return now;
}

// -- copies to shared memory that run beside the arithmetic (bulk ones: from compute capability 9.0)

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// A barrier in shared memory whose phase ends when so many threads have arrived and the bytes that
// they expect have come.
DEVICE void barrier_init(u64* barrier, u32 count = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(count));
}
// Behind `barrier_init`, for the copy engine to see it.
DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
DEVICE void barrier_arrive(u64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
                 : "memory");
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    asm volatile(
        "{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; "
        "@!done bra again; }" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

struct alignas(64) TensorMap {
    char bytes[128];
};

// Copies the box at these coordinates, the innermost first.
DEVICE void copy_box(void* target, const TensorMap* map, int c0, int c1, int c2, int c3,
                     u64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(target)),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier))
        : "memory");
}
DEVICE void copy_box(void* target, const TensorMap* map, int c0, int c1, int c2, int c3,
                     u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(target)),
        "l"(map), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

// Copies bytes that lie together: addresses and size are multiples of 16.
DEVICE void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(target)),
        "l"(source), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
        : "memory");
}

// What the L2 cache does with what a copy reads: drop it before all else, or the usual.
DEVICE u64 evict_first() {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

// Copies 16 bytes for this thread alone, which waits for its own.
DEVICE void copy_async(void* target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(target)),
                 "l"(source)
                 : "memory");
}
// Ends a group of copies of this thread.
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Returns when at most the last PENDING groups of this thread are still under way.
template <int PENDING>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
