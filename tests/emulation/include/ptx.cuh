// An emulation of a GPU: what the functions of csrc/ptx.cuh mean.
#pragma once

DEVICE void let_next_start() {}
DEVICE void wait_for_previous() { emulation::wait_for_previous(); }

#if defined(MMA_TYPE)
// Lane (g = lane / 4, t = lane % 4) has of a the rows g and g + 8, of b the column g; elements 2t and
// 2t + 1 of the first 8 of k, then of the last 8; of d rows g and g + 8, columns 2t and 2t + 1.
DEVICE void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 own[6] = {a0, a1, a2, a3, b0, b1};
    emulation::Meeting& meeting = emulation::meet_warp(FULL_WARP, "mma", own, sizeof own);
    if (meeting.arrived != FULL_WARP) emulation::fail("a product without all lanes of the warp");
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    auto element = [&](int of, int word, int half) {
        T x;
        memcpy(&x, meeting.values[of] + 4 * word + 2 * half, sizeof x);
        return to_float(x);
    };
    for (int column = 0; column < 2; column++) {
        float sums[2] = {d[column], d[2 + column]};
        for (int k = 0; k < 16; k++) {
            const int within = k % 8 / 2, half = k % 2, upper = k / 8;
            const float b = element((2 * t + column) * 4 + within, 4 + upper, half);
            sums[0] += element(4 * g + within, 2 * upper, half) * b;
            sums[1] += element(4 * g + within, 2 * upper + 1, half) * b;
        }
        d[column] = sums[0], d[2 + column] = sums[1];
    }
    emulation::leave(meeting);
}

DEVICE u32 transposed(u32 pair) {
    emulation::Meeting& meeting = emulation::meet_warp(FULL_WARP, "movmatrix", &pair, sizeof pair);
    if (meeting.arrived != FULL_WARP) emulation::fail("a matrix without all lanes of the warp");
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    unsigned short halves[2];
    for (int i = 0; i < 2; i++) {
        const int row = 2 * t + i;
        memcpy(&halves[i], meeting.values[row * 4 + g / 2] + g % 2 * 2, 2);
    }
    emulation::leave(meeting);
    memcpy(&pair, halves, sizeof pair);
    return pair;
}

DEVICE u32 multiply_pairs(u32 a, u32 b) {
    T left[2], right[2];
    memcpy(left, &a, sizeof a), memcpy(right, &b, sizeof b);
    for (int i = 0; i < 2; i++) left[i] = from_float(to_float(left[i]) * to_float(right[i]));
    memcpy(&a, left, sizeof a);
    return a;
}
#endif

DEVICE float power_of_2(float x) { return x < -126 ? 0.0f : exp2f(x); }

// Other ranks are other threads of the process.
DEVICE void store_release(u32* address, u32 value) {
    __atomic_store_n(address, value, __ATOMIC_RELEASE);
}
DEVICE u32 load_acquire(const u32* address) {
    static u32 tries;
    emulation::poll();
    if (++tries % 16 == 0) usleep(20);
    return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
// Eight times as fast as time goes: a rank that waits for one that has failed gives up after 15 s.
DEVICE u64 nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 8 * ((u64)now.tv_sec * 1000000000ull + now.tv_nsec);
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void barrier_init(u64* barrier, u32 count = 1) {
    *(emulation::Barrier*)barrier = {0, (unsigned short)count, (unsigned char)count, 0};
}
DEVICE void barriers_ready() {}
DEVICE void barrier_expect(u64* barrier, u32 bytes) {
    emulation::Barrier& own = *(emulation::Barrier*)barrier;
    if (own.count != 1 || own.pending != 1) emulation::fail("arrives at a barrier that is not open");
    own.expected += bytes;
    own.pending--;
    own.end_if_complete();
}
DEVICE void barrier_arrive(u64* barrier) {
    emulation::Barrier& own = *(emulation::Barrier*)barrier;
    own.pending--;
    own.end_if_complete();
}
DEVICE void barrier_wait(u64* barrier, u32 parity) {
    const emulation::Barrier& own = *(emulation::Barrier*)barrier;
    emulation::make_all([=](const emulation::Copy& copy) { return copy.barrier == barrier; });
    for (int tries = 0; own.phase % 2 == parity; tries++) {
        if (tries == 1 << 20) emulation::fail("waits for a barrier that nobody completes");
        emulation::poll();
        emulation::make_all([=](const emulation::Copy& copy) { return copy.barrier == barrier; });
    }
}

struct alignas(64) TensorMap {
    char bytes[128];
};
static_assert(sizeof(emulation::EncodedMap) <= sizeof(TensorMap), "an encoded map");

DEVICE void copy_box(void* target, const TensorMap* map, int c0, int c1, int c2, int c3,
                     u64* barrier) {
    const int at[4] = {c0, c1, c2, c3};
    emulation::begin_box((char*)target, *(const emulation::EncodedMap*)map, at, barrier);
}
DEVICE void copy_box(void* target, const TensorMap* map, int c0, int c1, int c2, int c3,
                     u64* barrier, u64) {
    copy_box(target, map, c0, c1, c2, c3, barrier);
}
DEVICE void copy_bulk(void* target, const void* source, u32 bytes, u64* barrier, u64) {
    if (((size_t)target | (size_t)source | bytes) % 16 || !bytes)
        emulation::fail("a bulk copy is of multiples of 16 bytes");
    emulation::begin({(char*)target, (const char*)source, bytes, barrier, 0, 0, 0});
}
DEVICE u64 evict_first() { return 0; }

DEVICE void copy_async(void* target, const void* source) {
    if (((size_t)target | (size_t)source) % 16) emulation::fail("a copy of 16 bytes not aligned");
    const int self = emulation::current;
    emulation::begin({(char*)target, (const char*)source, 16, nullptr, self,
                      emulation::groups[self], 0});
}
DEVICE void copy_async_commit() { emulation::groups[emulation::current]++; }
template <int PENDING>
DEVICE void copy_async_wait() {
    const int self = emulation::current, done = emulation::groups[self] - PENDING;
    emulation::make_all([=](const emulation::Copy& copy) {
        return !copy.barrier && copy.fiber == self && copy.group < done;
    });
}
