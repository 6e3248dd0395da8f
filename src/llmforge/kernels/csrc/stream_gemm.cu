// out = x weightᵀ for at most 8 rows of x, as fast as the weights can be read: each is read once, by
// the tensor copy engine into rings of shared memory that run ahead of the arithmetic, and of the
// kernel: the first of them are under way while the kernel before still runs.
//
// A block computes tiles of 16 output features. K is divided among the warps, and among SPLIT
// blocks; a warp keeps its part of x in registers for all tiles, as the second factor of
// mma.m16n8k16 (the 8 columns are the rows of x). The last of SPLIT blocks to finish adds their sums,
// always in the same order.
//   K: elements of a row. SPLIT. WARPS. CHUNK: elements of each of a tile's rows that one copy
//   brings, a multiple of 64 that divides K / SPLIT / WARPS. STAGES: slots of each warp's ring.
//   NORM: x is RMSNorm(x) norm_weight, computed on the way in (SPLIT must be 1).
//   BIAS. RESIDUAL: added to the rounded product. GATED: the weights are those of gate | up, out =
//   activation(gate) up.
// x [rows, K]; `weight` maps [features, K], see launch.py; out and residual have row stride
// out_stride. partial: [SPLIT, tiles, 128] float32; counters: one int a group of SPLIT blocks, zero
// before and after. Grid: any number of blocks; one a multiprocessor fills it.
#include "common.cuh"
#include "activation.cuh"

#define SLICE (K / SPLIT / WARPS)
#define CHUNKS (SLICE / CHUNK)
#define BLOCKS (CHUNK / 64)  // of 16 rows of 64 elements: 128 bytes, swizzled
#define STAGE_BYTES (16 * CHUNK * 2)
#define THREADS (WARPS * 32)

// A warp's ring of weights: slots are filled in the order in which they are used.
struct Ring {
    char* slots;
    u64* barriers;
    const TensorMap* weight;
    int first;  // this warp's first block of columns
    int tiles, step;
    int tile, chunk;  // the next to be copied
    int slot;
    u32 parity;

    DEVICE void fill(int at) {
        if (tile >= tiles) return;
        if (threadIdx.x % 32 == 0) {
            barrier_expect(barriers + at, STAGE_BYTES);
            copy_box(slots + at * STAGE_BYTES, weight, 0, tile * (GATED ? 8 : 16), 0,
                     first + chunk * BLOCKS, barriers + at);
        }
        if (++chunk == CHUNKS) chunk = 0, tile += step;
    }
    DEVICE const char* wait() {
        barrier_wait(barriers + slot, parity);
        return slots + slot * STAGE_BYTES;
    }
    DEVICE void next() {
        __syncwarp();  // every lane has read the slot
        fill(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

#if NORM
// Out of line, once: unrolled over all of x they are more code than the rest, and the first pass
// through a kernel's code costs the more time the longer it is.
__noinline__ __device__ float squares_of(uint4 x) { return sum_of_squares(x); }
__noinline__ __device__ uint4 normed_by(uint4 x, const T* weights, float scale) {
    return normed(x, *(const uint4*)weights, scale);
}
#endif

// This lane's elements of x, in the layout of the second factor: row g, of every 64 elements the 16
// from 16 t on. (The order of k is free as long as both factors agree; this one makes the lanes'
// reads of the swizzled weights fall into different banks.) `norm_weight` is in shared memory.
DEVICE void load_x(uint4 (&x)[SLICE / 32], const T* rows, const T* norm_weight, int count,
                   int first, float eps) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const T* row = rows + (size_t)g * K + first + t * 16;
#pragma unroll
    for (int i = 0; i < SLICE / 32; i++)
        x[i] = g < count ? *(const uint4*)(row + i / 2 * 64 + i % 2 * 8) : make_uint4(0, 0, 0, 0);
#if NORM
    __shared__ float sums[WARPS][8];
    float squares = 0;
#pragma unroll
    for (int i = 0; i < SLICE / 32; i++) squares += squares_of(x[i]);
    squares += __shfl_xor_sync(FULL_WARP, squares, 1);
    squares += __shfl_xor_sync(FULL_WARP, squares, 2);
    if (t == 0) sums[threadIdx.x / 32][g] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) squares += sums[w][g];
    const float scale = rsqrtf(squares / K + eps);
#pragma unroll
    for (int i = 0; i < SLICE / 32; i++)
        x[i] = normed_by(x[i], norm_weight + first + t * 16 + i / 2 * 64 + i % 2 * 8, scale);
#endif
}

struct Output {
    T* out;
    const T* bias;
    const T* residual;
    int rows, features, stride;

    // Stores element i of a tile's [16 features, 8 rows], given the sums at i and, where GATED, of
    // the up feature that belongs to it.
    DEVICE void store(int tile, int i, float sum, float up) const {
        const int r = i / 8, row = i % 8;
        if (row >= rows) return;
#if GATED
        const int feature = tile * 8 + r;
#if BIAS
        sum += to_float(bias[feature]);
        up += to_float(bias[features / 2 + feature]);
#endif
        const float value = rounded(activation(rounded(sum))) * rounded(up);
#else
        const int feature = tile * 16 + r;
        if (feature >= features) return;
#if BIAS
        sum += to_float(bias[feature]);
#endif
        float value = sum;
#if RESIDUAL
        value = rounded(value) + to_float(residual[(size_t)row * stride + feature]);
#endif
#endif
        out[(size_t)row * stride + feature] = from_float(value);
    }
};

#define OUTPUTS (GATED ? 64 : 128)  // elements of a tile that are stored

extern "C" __global__ void __launch_bounds__(THREADS, 2)
stream_gemm(T* out, const T* x, const __grid_constant__ TensorMap weight, const T* bias,
            const T* residual, const T* norm_weight, float* partial, int* counters, int rows,
            int features, int out_stride, float eps) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[WARPS * STAGES];
    __shared__ float sums[2][WARPS][128];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int groups = gridDim.x / SPLIT, group = blockIdx.x / SPLIT, part = blockIdx.x % SPLIT;
    const int tiles = group >= groups ? 0 : GATED ? features / 16 : (features + 15) / 16;
    const int first = part * (K / SPLIT) + warp * SLICE;
    if (lane < STAGES) barrier_init(barriers + warp * STAGES + lane);
    barriers_ready();
    __syncwarp();
    // The swizzle pattern starts anew every 1024 bytes of shared memory.
    char* slots = unaligned + (-shared_address(unaligned) & 1023);
    Ring ring{slots + warp * STAGES * STAGE_BYTES, barriers + warp * STAGES, &weight, first / 64,
              tiles, groups, group, 0, 0, 0};
    for (int i = 0; i < STAGES; i++) ring.fill(i);
#if NORM
    // Fetched now, while there is time: loads behind the wait would queue behind the next kernel's
    // copies.
    __shared__ __align__(16) T norm_weights[K];
    for (int i = threadIdx.x; i < K / 8; i += THREADS)
        ((uint4*)norm_weights)[i] = __ldg((const uint4*)norm_weight + i);
    norm_weight = norm_weights;
#endif
    wait_for_previous();
    uint4 kept[SLICE / 32];
    load_x(kept, x, norm_weight, rows, first, eps);
    const Output output{out, bias, residual, rows, features, out_stride};
    int buffer = 0;
    for (int tile = group; tile < tiles; tile += groups) {
        float acc[4][4] = {};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const char* low = ring.wait() + g * 128;
#pragma unroll
            for (int s = 0; s < 2 * BLOCKS; s++) {
                const char* at = low + s / 2 * 2048 + ((2 * t + s % 2) ^ g) * 16;
                const uint4 a = *(const uint4*)at, b = *(const uint4*)(at + 1024);
                const uint4 v = kept[c * 2 * BLOCKS + s];
                mma(acc[s % 2 * 2], a.x, b.x, a.y, b.y, v.x, v.y);
                mma(acc[s % 2 * 2 + 1], a.z, b.z, a.w, b.w, v.z, v.w);
            }
            ring.next();
        }
        float* mine = sums[buffer][warp];
#pragma unroll
        for (int i = 0; i < 4; i++)
            mine[(g + i / 2 * 8) * 8 + 2 * t + i % 2] =
                acc[0][i] + acc[1][i] + acc[2][i] + acc[3][i];
        __syncthreads();
        for (int i = threadIdx.x; i < (SPLIT > 1 ? 128 : OUTPUTS); i += THREADS) {
            float sum = 0, up = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                sum += sums[buffer][w][i];
                if (GATED && SPLIT == 1) up += sums[buffer][w][i + 64];
            }
#if SPLIT > 1
            if (i % 8 < rows) __stcg(partial + ((size_t)part * tiles + tile) * 128 + i, sum);
#else
            output.store(tile, i, sum, up);
#endif
        }
        buffer ^= 1;  // the sums just read are written again only after the next barrier
    }
#if SPLIT > 1
    __shared__ int arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && tiles) {
        arrived = atomicAdd(counters + group, 1);
        if (arrived == SPLIT - 1) counters[group] = 0;
    }
    __syncthreads();
    if (!tiles || arrived != SPLIT - 1) return;
    __threadfence();
    const int own = (tiles - group + groups - 1) / groups;
#pragma unroll 4
    for (int i = threadIdx.x; i < own * (OUTPUTS / 8) * rows; i += THREADS) {
        const int tile = group + i / (OUTPUTS / 8 * rows) * groups;
        const int at = i / rows % (OUTPUTS / 8) * 8 + i % rows;
        float sum = 0, up = 0;
#pragma unroll
        for (int p = 0; p < SPLIT; p++) {
            const float* sums_of_part = partial + ((size_t)p * tiles + tile) * 128;
            sum += __ldcg(sums_of_part + at);
            if (GATED) up += __ldcg(sums_of_part + at + 64);
        }
        output.store(tile, at, sum, up);
    }
#endif
}
