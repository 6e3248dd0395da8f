// Tiles in shared memory that one warp has copied there and others read.
#pragma once

// By all lanes of a warp: it arrives.
DEVICE void arrive(u64* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
}

// Tiles in the order in which they are copied and used. `full` ends a phase when all bytes have come,
// `empty` when all warps have read them.
template <int SLOTS, int BYTES>
struct Ring {
    char* slots;
    u64* full;
    u64* empty;
    int slot = 0;
    u32 parity = 0;

    DEVICE char* tile() const { return slots + slot * BYTES; }
    DEVICE void next() {
        if (++slot == SLOTS) slot = 0, parity ^= 1;
    }
    DEVICE void wait_empty() const { barrier_wait(empty + slot, parity ^ 1); }
    DEVICE void wait_full() const { barrier_wait(full + slot, parity); }
    // All lanes of this warp have read the tile.
    DEVICE void release() {
        arrive(empty + slot);
        next();
    }
    // By one thread. warps: that read.
    DEVICE void init(int warps) const {
        for (int s = 0; s < SLOTS; s++) barrier_init(full + s), barrier_init(empty + s, warps);
    }
};
