// out = x weightᵀ for up to ROWS rows of x, on the tensor cores of compute capability 9.0, for so few
// rows that reading the weights is what takes time. A block computes tiles of COLUMNS output features
// of all rows, over K or a part of it: a warp has the copy engine bring 64 RUN elements of each of the
// tile's rows of weights, and of x, into the slots of a ring in shared memory, and a warpgroup for each
// 64 rows of x multiplies them. The copies of weights run ahead over tiles and begin while the kernel
// before still runs.
//   K: elements of a row. ROWS: a multiple of 64. COLUMNS: a multiple of 16. SPLIT: parts of K, of
//   whole 64 RUN elements each, which the blocks divide like tiles; of the warps that have the sums of the
//   same rows and features, the last to finish adds, always in the same order. STAGES: slots. CLUSTER:
//   blocks that compute neighbouring tiles at the same time: each fetches its share of x for all.
//   BIAS. RESIDUAL: added to the rounded product. GATED: the weights are those of gate | up, a tile has
//   COLUMNS / 2 rows of each, out = activation(gate) up.
// x [rows, K] and weight [features, K] are maps, see launch.py. out and residual have row stride
// out_stride. partial: [tiles, SPLIT, ROWS, COLUMNS] float32; counters: an int for each warp and tile,
// zero before and after. Grid: a multiple of CLUSTER; not more than SPLIT * (tiles to a multiple of
// CLUSTER).
#include "common.cuh"
#include "activation.cuh"
#include "wgmma.cuh"

#define WARPS (ROWS / 16)  // that multiply; one more copies
#define THREADS (WARPS * 32 + 32)
#define CHUNKS (K / SPLIT / (64 * RUN))
#define WEIGHT_BYTES (RUN * COLUMNS * 128)
#define SLOT (WEIGHT_BYTES + RUN * ROWS * 128)
#define SHARE (ROWS / CLUSTER)  // rows of x that a block fetches
#define BLOCKS (COLUMNS / 8)    // of 8 features, of which a lane has 2 of 2 rows: four sums
#define OUTPUTS (GATED ? COLUMNS / 2 : COLUMNS)  // features of a tile that are stored

// What a block computes: for each of its rounds a tile and a part of K.
struct Work {
    int items;  // of the cluster: tiles side by side, and a part
    int item;

    DEVICE Work(int features) {
        const int tiles = (features + COLUMNS - 1) / COLUMNS;
        items = (tiles + CLUSTER - 1) / CLUSTER * SPLIT;
        item = blockIdx.x / CLUSTER;
    }
    DEVICE bool left() const { return item < items; }
    DEVICE void next() { item += gridDim.x / CLUSTER; }
    DEVICE int tile() const { return item / SPLIT * CLUSTER + blockIdx.x % CLUSTER; }
    DEVICE int part() const { return item % SPLIT; }
};

// Slots in the order in which they are filled and used. `full` ends a phase when all bytes have come,
// `empty` when all warps of all blocks of the cluster have read what was there.
struct Ring {
    char* slots;
    u64* full;
    u64* empty;
    int slot = 0;
    u32 parity = 0;

    DEVICE char* weights() const { return slots + slot * SLOT; }
    DEVICE char* x() const { return weights() + WEIGHT_BYTES; }
    DEVICE void next() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// What is to be copied next, and where to.
struct Copies {
    Ring ring;
    Work work;
    int chunk = 0;  // of the part

    // In a slot, 8 rows of weights lie together, of each 64 elements after the other.
    DEVICE void weights(const TensorMap* map, u64 policy) const {
        const int lane = threadIdx.x % 32;
        if (lane == 0) barrier_expect(ring.full + ring.slot, SLOT);
        __syncwarp();
        char* const to = ring.weights();
#if RUN == 1
        if (lane == 0)
            copy_box(to, map, 0, work.tile() * OUTPUTS, 0, column(), ring.full + ring.slot, policy);
#else
        for (int i = lane; i < BLOCKS; i += 32) {
            const int half = i / (OUTPUTS / 8), row = work.tile() * OUTPUTS + i % (OUTPUTS / 8) * 8;
            copy_box(to + i * RUN * 1024, map, 0, row, half, column(), ring.full + ring.slot, policy);
        }
#endif
    }
    // Of x all rows' 64 elements lie together.
    DEVICE void x(const TensorMap* map) const {
        const int lane = threadIdx.x % 32, first = blockIdx.x % CLUSTER * SHARE;
        char* const to = ring.x() + (lane * ROWS + first) * 128;
        if (lane >= RUN) return;
#if CLUSTER > 1
        copy_box_to_all(to, map, 0, first, 0, column() + lane, ring.full + ring.slot);
#else
        copy_box(to, map, 0, first, 0, column() + lane, ring.full + ring.slot);
#endif
    }
    DEVICE int column() const { return (work.part() * CHUNKS + chunk) * RUN; }
    DEVICE void next() {
        ring.next();
        if (++chunk == CHUNKS) chunk = 0, work.next();
    }
};

// By a warp: fills the ring, with x from when it is there.
DEVICE void copy_all(Copies ahead, const TensorMap* weight, const TensorMap* x) {
    const u64 policy = evict_first();
    Copies behind = ahead;
    int early = 0;
#pragma unroll 1
    for (; early < STAGES && ahead.work.left(); early++, ahead.next()) ahead.weights(weight, policy);
    wait_for_previous();
#pragma unroll 1
    for (; early; early--, behind.next()) behind.x(x);
#pragma unroll 1
    for (; ahead.work.left(); ahead.next()) {
        barrier_wait(ahead.ring.empty + ahead.ring.slot, ahead.ring.parity ^ 1);
        ahead.weights(weight, policy);
        ahead.x(x);
    }
}

// This warp has read a slot.
DEVICE void release(u64* empty) {
    const int lane = threadIdx.x % 32;
#if CLUSTER > 1
    if (lane < CLUSTER) barrier_arrive_at(empty, lane);
#else
    if (lane == 0) barrier_arrive(empty);
#endif
}

// A tile's sums of this warpgroup's 64 rows over a part of K.
DEVICE void multiply(float (&sums)[COLUMNS / 2], Ring& ring) {
    const u32 rows = threadIdx.x / 128 * (64 * 128);
    int before = -1;  // the slot whose products are still under way
#pragma unroll 1
    for (int c = 0; c < CHUNKS; c++) {
        barrier_wait(ring.full + ring.slot, ring.parity);
        const u32 x = shared_address(ring.x()) + rows, weights = shared_address(ring.weights());
        products_begin();
#pragma unroll
        for (int i = 0; i < 4 * RUN; i++) {  // 16 elements at a time
            const u64 a = factor(x + i / 4 * (ROWS * 128) + i % 4 * 32, 1024);
            const u64 b = factor(weights + i / 4 * 1024 + i % 4 * 32, RUN * 1024);
            begin_product(sums, a, b, c + i > 0);
        }
        products_commit();
        products_wait<1>();
        if (before >= 0) release(ring.empty + before);
        before = ring.slot;
        ring.next();
    }
    products_wait<0>();
    release(ring.empty + before);
    sums_ready(sums);
}

#if SPLIT > 1
// Adds the sums of all parts of K, in the last of the warps that have them to come here. Returns
// whether this is the one.
DEVICE bool add_parts(float (&sums)[COLUMNS / 2], float* partial, int* counters, int tile,
                      int part) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* const of_tile = (float4*)partial + (size_t)tile * SPLIT * BLOCKS * (WARPS * 32);
    auto place = [&](int of_part, int block) {
        return of_tile + (of_part * BLOCKS + block) * (WARPS * 32) + threadIdx.x;
    };
#pragma unroll
    for (int j = 0; j < BLOCKS; j++)
        __stcg(place(part, j),
               make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]));
    __threadfence();
    __syncwarp();
    int arrived = 0;
    if (lane == 0) {
        int* const counter = counters + tile * WARPS + warp;
        arrived = atomicAdd(counter, 1);
        if (arrived == SPLIT - 1) *counter = 0;
    }
    if (__shfl_sync(FULL_WARP, arrived, 0) != SPLIT - 1) return false;
    __threadfence();
#pragma unroll
    for (int j = 0; j < BLOCKS; j++) {
        float4 parts[SPLIT];
#pragma unroll
        for (int p = 0; p < SPLIT; p++) parts[p] = __ldcg(place(p, j));
#pragma unroll
        for (int i = 0; i < 4; i++) sums[4 * j + i] = 0;
#pragma unroll
        for (int p = 0; p < SPLIT; p++) {
            sums[4 * j] += parts[p].x, sums[4 * j + 1] += parts[p].y;
            sums[4 * j + 2] += parts[p].z, sums[4 * j + 3] += parts[p].w;
        }
    }
    return true;
}
#endif

struct Output {
    T* out;
    const T* bias;
    const T* residual;
    int rows, features, stride;  // of the output

    // Stores the sums of two rows, 8 apart, and of two neighbouring features of each 8 of a tile.
    DEVICE void store(const float (&sums)[COLUMNS / 2], int tile) const {
        const int lane = threadIdx.x % 32;
        const int row = threadIdx.x / 32 * 16 + lane / 4;
        const int first = tile * OUTPUTS + lane % 4 * 2;
#if RESIDUAL
        u32 residuals[BLOCKS][2];  // all asked for before any is used
#pragma unroll
        for (int j = 0; j < BLOCKS; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                if (row + 8 * h < rows && first + 8 * j < features)
                    residuals[j][h] = __ldcg((const u32*)(residual + at(row + 8 * h, first + 8 * j)));
#endif
#pragma unroll
        for (int j = 0; j < OUTPUTS / 8; j++) {
            const int feature = first + 8 * j;
            if (feature >= features) return;
#if BIAS
            const float2 biases = {to_float(bias[feature]), to_float(bias[feature + 1])};
            const T* const of_up = bias + features + feature;
            const float2 up_biases = {to_float(of_up[0]), to_float(of_up[1])};
#else
            const float2 biases = {0, 0}, up_biases = {0, 0};
#endif
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (row + 8 * h >= rows) continue;
                float low = sums[4 * j + 2 * h] + biases.x;
                float high = sums[4 * j + 2 * h + 1] + biases.y;
#if GATED
                const int up = 4 * (j + OUTPUTS / 8) + 2 * h;
                low = rounded(activation(rounded(low))) * rounded(sums[up] + up_biases.x);
                high = rounded(activation(rounded(high))) * rounded(sums[up + 1] + up_biases.y);
#endif
#if RESIDUAL
                low = rounded(low) + low_half(residuals[j][h]);
                high = rounded(high) + high_half(residuals[j][h]);
#endif
                *(u32*)(out + at(row + 8 * h, feature)) = packed(low, high);
            }
        }
    }
    DEVICE size_t at(int row, int feature) const { return (size_t)row * stride + feature; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
wide_gemm(T* out, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
          const T* bias, const T* residual, float* partial, int* counters, int rows, int features,
          int out_stride) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES];
    let_next_start();
    // The swizzle pattern starts anew every 1024 bytes of shared memory.
    char* const slots = unaligned + (-shared_address(unaligned) & 1023);
    Ring ring{slots, barriers, barriers + STAGES};
    if (threadIdx.x < STAGES) {
        barrier_init(ring.full + threadIdx.x);
        barrier_init(ring.empty + threadIdx.x, WARPS * CLUSTER);
    }
    barriers_ready();
    __syncthreads();
#if CLUSTER > 1
    cluster_sync();
#endif
    if (threadIdx.x / 32 == WARPS) {
        copy_all({ring, Work(features)}, &weight, &x);
    } else {
        wait_for_previous();
        const Output output{out, bias, residual, rows, GATED ? features / 2 : features, out_stride};
        for (Work work(features); work.left(); work.next()) {
            float sums[COLUMNS / 2];
            multiply(sums, ring);
#if SPLIT > 1
            if (!add_parts(sums, partial, counters, work.tile(), work.part())) continue;
#endif
            output.store(sums, work.tile());
        }
    }
#if CLUSTER > 1
    cluster_sync();  // the others arrive at barriers of this block until they have ended
#endif
}
