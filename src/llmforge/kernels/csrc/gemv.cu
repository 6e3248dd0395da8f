// out = x weightᵀ for one row of x, as fast as the weights can be read. Each warp computes output
// features by itself: it has their rows of weights, each of which lies in memory in one piece, copied
// into a ring of its own in shared memory. The rings begin to fill while the kernel before still
// runs; x, the same for all warps, is in shared memory once a block. Neighbouring blocks read
// neighbouring rows at the same time.
//   K: elements of a row, a multiple of 8. WARPS. PIECE: the most bytes of one copy, a multiple of
//   512. STAGES: slots of each warp's ring, of a piece each.
//   NORM: x is RMSNorm(x) norm_weight, computed on the way in. BIAS. RESIDUAL: added to the rounded
//   product. GATED: the weights are those of gate | up, out = activation(gate) up.
// The next kernel may start at once, and the L2 cache drops weights before all else: both were measured
// to be faster.
// weight [features, K]. Grid: any number of blocks.
#include "common.cuh"
#include "activation.cuh"

#define THREADS (WARPS * 32)
#define HALVES (GATED ? 2 : 1)
#define ROW_BYTES (K * 2)
#define PARTS ((ROW_BYTES + PIECE - 1) / PIECE)      // copies that bring a row
#define PACKS ((K / 8 + THREADS - 1) / THREADS)      // of 8 elements of x, that a thread loads
#define UNROLL 4
#define MIN_BLOCKS (65536 / (THREADS * 64))          // leaves a thread 64 registers

// A warp's ring of weights. Pieces are copied and used in the same order: of each of its units (an
// output feature) all pieces of the row, and where GATED then those of the row of up.
struct Ring {
    char* slots;
    u64* barriers;
    const char* source;     // of the next copy
    long long to_up, to_next;  // from the end of a gate's row to up's, and of a unit's last to the next
    int rows;               // not yet copied to their end
    u32 part;               // bytes of the row before the next copy
    int slot;               // the next to be used
    u32 parity;
    u64 policy;

    DEVICE void fill(int at) {
        if (!rows) return;
        const u32 bytes = ROW_BYTES % PIECE ? min(PIECE, ROW_BYTES - part) : PIECE;
        if (threadIdx.x % 32 == 0) {
            barrier_expect(barriers + at, bytes);
            copy_bulk(slots + at * PIECE, source, bytes, barriers + at, policy);
        }
        source += bytes;
        part += bytes;
        if (part < ROW_BYTES) return;
        part = 0;
        rows--;
        source += GATED && rows % 2 ? to_up : to_next;
    }
    DEVICE void fill_all() {
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) fill(i);
    }
    DEVICE const uint4* wait() {
        barrier_wait(barriers + slot, parity);
        return (const uint4*)(slots + slot * PIECE) + threadIdx.x % 32;
    }
    DEVICE void next() {
        __syncwarp();  // every lane has read the slot
        fill(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// This thread's packs of a row of K elements.
DEVICE void load_packs(uint4 (&packs)[PACKS], const T* row) {
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int i = p * THREADS + threadIdx.x;
        packs[p] = i < K / 8 ? __ldcg((const uint4*)row + i) : make_uint4(0, 0, 0, 0);
    }
}

// The product of a row of weights and x, on every lane.
DEVICE float row_product(Ring& ring, const uint4* x) {
    float even = 0, odd = 0;
    x += threadIdx.x % 32;
#pragma unroll 1
    for (int part = 0; part < PARTS; part++, x += PIECE / 16) {
        const uint4* weights = ring.wait();
#pragma unroll UNROLL
        for (int i = 0; i < PIECE / 16; i += 32) {
#if ROW_BYTES % PIECE
            if (part * PIECE + (i + threadIdx.x % 32) * 16 >= ROW_BYTES) break;
#endif
            const uint4 a = weights[i], b = x[i];
            const u32 left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                even = fmaf(low_half(left[j]), low_half(right[j]), even);
                odd = fmaf(high_half(left[j]), high_half(right[j]), odd);
            }
        }
        ring.next();
    }
    return warp_sum(even + odd);
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
gemv(T* out, const T* x, const T* weight, const T* bias, const T* residual, const T* norm_weight,
     int features, float eps) {
    extern __shared__ __align__(128) char shared[];  // the rings, then x
    __shared__ u64 barriers[WARPS * STAGES];
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int units = features / HALVES, step = WARPS * gridDim.x;
    const int start = warp * gridDim.x + blockIdx.x;
    uint4* const kept = (uint4*)(shared + WARPS * STAGES * PIECE);
    if (lane < STAGES) barrier_init(barriers + warp * STAGES + lane);
    barriers_ready();
    __syncwarp();
    const int own_units = start < units ? (units - start - 1) / step + 1 : 0;
    const long long to_up = (units - 1) * (long long)ROW_BYTES;
    Ring ring{shared + warp * STAGES * PIECE,
              barriers + warp * STAGES,
              (const char*)weight + start * (size_t)ROW_BYTES,
              to_up,
              (step - 1) * (long long)ROW_BYTES - (GATED ? to_up + ROW_BYTES : 0),
              own_units * HALVES, 0, 0, 0,
              evict_first()};
    ring.fill_all();
#if NORM
    uint4 norm_packs[PACKS];
    load_packs(norm_packs, norm_weight);  // now, while there is time
#endif
    wait_for_previous();
    uint4 packs[PACKS];
    load_packs(packs, x);
#if NORM
    __shared__ float scratch[WARPS];
    float squares = 0;
#pragma unroll
    for (int p = 0; p < PACKS; p++) squares += sum_of_squares(packs[p]);
    squares = warp_sum(squares);
    if (lane == 0) scratch[warp] = squares;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) squares += scratch[w];
    const float scale = rsqrtf(squares / K + eps);
#pragma unroll
    for (int p = 0; p < PACKS; p++) packs[p] = normed(packs[p], norm_packs[p], scale);
#endif
#pragma unroll
    for (int p = 0; p < PACKS; p++) {
        const int i = p * THREADS + threadIdx.x;
        if (i < K / 8) kept[i] = packs[p];
    }
    __syncthreads();
    // In rounds of 32 units, one for each lane to store.
    for (int first = start; first < units; first += 32 * step) {
        const int own = first + lane * step;
        const bool stores = own < units;
        float sum = 0, up = 0, added = 0, sum_bias = 0, up_bias = 0;
#if BIAS
        if (stores) sum_bias = to_float(bias[own]);
        if (GATED && stores) up_bias = to_float(bias[units + own]);
#endif
#if RESIDUAL
        if (stores) added = to_float(__ldcg(residual + own));
#endif
#pragma unroll 1
        for (int i = 0; i < 32 && first + i * step < units; i++) {
#pragma unroll 1
            for (int half = 0; half < HALVES; half++) {
                const float product = row_product(ring, kept);
                if (lane == i) (half ? up : sum) = product;
            }
        }
        if (!stores) continue;
        sum += sum_bias;
#if GATED
        out[own] = from_float(rounded(activation(rounded(sum))) * rounded(up + up_bias));
#else
        out[own] = from_float(RESIDUAL ? rounded(sum) + added : sum);
#endif
    }
}
