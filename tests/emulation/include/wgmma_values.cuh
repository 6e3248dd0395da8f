// An emulation of a GPU: what the functions of csrc/wgmma_values.cuh mean.
#pragma once

DEVICE u64 value_factor(u32 address, u32 stride) {
    return (address & 0x3ffff) >> 4 | (u64)(stride >> 4) << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}

// Lanes have of their rows g and g + 8 what `mma` says: the rows are put together now.
DEVICE void begin_product_of(float (&d)[HEAD_DIM / 2], u32 (&a)[KEYS / 4], int step, u64 b) {
    emulated::Product product = {d, HEAD_DIM, true, true, 0, b, {}, true};
    product.group = emulated::products[emulation::current].group;
    emulation::Meeting& meeting =
        emulation::meet_warp(FULL_WARP, "a product of rows", a + 4 * step, 16);
    if (meeting.arrived != FULL_WARP) emulation::fail("a product without all lanes of the warp");
    for (int h = 0; h < 2; h++) {
        for (int k = 0; k < 16; k++) {
            const int from = threadIdx.x % 32 / 4 * 4 + k % 8 / 2, word = k / 8 * 2 + h;
            T x;
            memcpy(&x, meeting.values[from] + 4 * word + k % 2 * 2, sizeof x);
            product.rows[h][k] = to_float(x);
        }
    }
    emulation::leave(meeting);
    emulated::begin(product);
}
template <int N>
DEVICE void sums_ready(u32 (&)[N]) {}

DEVICE void stores_before_products() {}

namespace emulated {
static struct {
    int arrived;
    unsigned phase;
} meetings[16];
}  // namespace emulated
DEVICE void threads_arrive(int barrier, int threads) {
    auto& own = emulated::meetings[barrier];
    if (++own.arrived == threads) own.arrived = 0, own.phase++;
}
DEVICE void threads_meet(int barrier, int threads) {
    auto& own = emulated::meetings[barrier];
    const unsigned phase = own.phase;
    threads_arrive(barrier, threads);
    for (int tries = 0; own.phase == phase; tries++) {
        if (tries == 1 << 20) emulation::fail("waits for threads that do not come");
        emulation::poll();
    }
}

template <int COUNT>
DEVICE void give_registers() {}
template <int COUNT>
DEVICE void take_registers() {}
