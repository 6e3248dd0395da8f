// out = x weightᵀ for at most 8 rows of x, as fast as the weights can be read. K is divided among the
// warps of a block, and among SPLIT blocks. A warp keeps its part of x in registers for all output
// features, as the second factor of mma.m16n8k16 (the 8 columns are the rows of x), and has its columns
// of the weights copied into a ring of its own in shared memory, a piece of each of 8 rows at a time.
// The rings begin to fill while the kernel before still runs.
// Neighbouring blocks read neighbouring rows at the same time.
//   K: elements of a row. SPLIT. WARPS. PIECE: the most bytes of a row that one copy brings, a multiple
//   of 128; K / SPLIT / WARPS is a multiple of 64. STAGES: slots of each warp's ring, of 8 pieces each.
//   AREA: bytes of shared memory a warp has beside its ring, see below.
//   NORM: x is RMSNorm(x) norm_weight, computed on the way in (SPLIT must be 1). BIAS. RESIDUAL: added
//   to the rounded product. GATED: the weights are those of gate | up, out = activation(gate) up.
//   EARLY, EVICT_FIRST, RELEASE: as in gemv.cu.
// x [rows, K]; weight [features, K]; out and residual have row stride out_stride. partial: [SPLIT,
// features, 8] float32; counters: one int a group of SPLIT blocks, zero before and after. Grid: any number
// of blocks from SPLIT on; one a multiprocessor fills it.
#include "common.cuh"
#include "activation.cuh"

#define THREADS (WARPS * 32)
#define HALVES (GATED ? 2 : 1)
#define SLICE (K / SPLIT / WARPS)  // elements of a row that a warp multiplies
#define PACKS (SLICE / 32)         // of 8 of them that a lane keeps of x
#define PIECES ((SLICE * 2 + PIECE - 1) / PIECE)
#define LAST_PIECE (SLICE * 2 - (PIECES - 1) * PIECE)  // bytes
// Of rows in a slot. 16 bytes more than a multiple of 128: of a lane's two reads of 16 bytes from each
// 128 of row lane / 4, from 32 (lane % 4) on, those of 8 neighbouring lanes fall into different banks.
#define PITCH (PIECE + 16)
#define SLOT (8 * PITCH)
#define OUTPUTS 64  // of 8 rows of weights, by 8 rows of x

// Which output features a group of blocks computes, in rounds: 8 in each, dealt to the groups in turn,
// and in the last what is then left, in parts as equal as can be.
struct Share {
    int groups, group, whole, last_first, last_count;

    DEVICE Share(u32 features, u32 groups, u32 group) : groups(groups), group(group) {
        whole = features / (8 * groups);
        const u32 dealt = whole * 8 * groups, left = features - dealt;
        last_first = dealt + left * group / groups;
        last_count = dealt + left * (group + 1) / groups - last_first;
    }
    DEVICE int rounds() const { return whole + (last_count > 0); }
    DEVICE int first(int round) const {
        return round < whole ? (round * groups + group) * 8 : last_first;
    }
    DEVICE int count(int round) const { return round < whole ? 8 : last_count; }
};

// A warp's ring of weights. Slots are filled in the order in which they are used: of each round all
// pieces of the rows, and where GATED then those of the rows of up.
struct Ring {
    char* slots;
    u64* barriers;
    const char* source;  // this warp's columns of the first row
    const Share& share;
    int features;  // of the output
    u64 policy;
    int rounds;
    int round = 0, half = 0, piece = 0;  // the next to be copied
    int slot = 0;                        // the next to be used
    u32 parity = 0;

    DEVICE void fill(int at) {
        if (round == rounds) {
#if RELEASE == 2
            let_next_start();
#endif
            return;
        }
        const int lane = threadIdx.x % 32, count = share.count(round);
        const u32 bytes = piece < PIECES - 1 ? PIECE : LAST_PIECE;
        if (lane == 0) barrier_expect(barriers + at, count * bytes);
        __syncwarp();
        if (lane < count) {
            const size_t row = half * features + share.first(round) + lane;
            copy_bulk(slots + at * SLOT + lane * PITCH, source + row * (K * 2) + piece * PIECE,
                      bytes, barriers + at, policy);
        }
        if (++piece < PIECES) return;
        piece = 0;
        if (++half < HALVES) return;
        half = 0;
        round++;
    }
    DEVICE void fill_all() {
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) fill(i);
    }
    DEVICE const char* wait() {
        barrier_wait(barriers + slot, parity);
        return slots + slot * SLOT;
    }
    DEVICE void next() {
        __syncwarp();  // every lane has read the slot
        fill(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// This lane's part of x: of row g = lane / 4, of every 64 elements from `first` on the 16 from 16 t on,
// t = lane % 4. (The order of k is free as long as both factors agree.)
DEVICE void load_x(uint4 (&x)[PACKS], const T* rows, int count, int first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const T* row = rows + (size_t)g * K + first + t * 16;
#pragma unroll
    for (int i = 0; i < PACKS; i++) x[i] = make_uint4(0, 0, 0, 0);
    if (g >= count) return;
#pragma unroll
    for (int i = 0; i < PACKS; i++) x[i] = __ldcg((const uint4*)(row + i / 2 * 64 + i % 2 * 8));
}

// Multiplies 8 rows of a and 8 of x, of which lanes hold what load_x says, into the sums' first half
// (even words) and second (odd words). The rows that the tensor cores see are, up to the 8th, the even
// words of a row, and then the odd ones: so a is as it came from memory. In each half, the other rows'
// sums mean nothing.
DEVICE void multiply_packs(float (&even)[4], float (&odd)[4], uint4 a, uint4 x) {
    mma(even, a.x, a.y, a.z, a.w, x.x, x.z);
    mma(odd, a.x, a.y, a.z, a.w, x.y, x.w);
}

#if NORM
// As `normed` of common.cuh, in less code and with conversions of pairs, of which a multiprocessor does
// more in a cycle. Out of line, once for all.
__noinline__ __device__ uint4 normed_by(uint4 x, const T* weights, float scale) {
    const uint4 w = *(const uint4*)weights;
    auto pair = [scale](u32 value, u32 weight) {
        return multiply_pairs(packed(low_half(value) * scale, high_half(value) * scale), weight);
    };
    return make_uint4(pair(x.x, w.x), pair(x.y, w.y), pair(x.z, w.z), pair(x.w, w.w));
}

// x after RMSNorm. The squares' sums are the diagonal of x xᵀ, which the tensor cores give in little
// code: the first pass through a kernel's code costs the more time the longer it is. `weights`: those
// of this warp's elements.
DEVICE void norm_x(uint4 (&x)[PACKS], const T* weights, float eps) {
    __shared__ float sums[WARPS][8];
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int i = 0; i < PACKS; i++) multiply_packs(even, odd, x[i], x[i]);
    if (t == g / 2) sums[threadIdx.x / 32][g] = g % 2 ? even[1] + odd[3] : even[0] + odd[2];
    __syncthreads();
    float squares = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) squares += sums[w][g];
    const float scale = rsqrtf(squares / K + eps);
#pragma unroll
    for (int i = 0; i < PACKS; i++)
        x[i] = normed_by(x[i], weights + t * 16 + i / 2 * 64 + i % 2 * 8, scale);
}
#endif

// The sums of this warp's part of K for the 8 rows of weights that come next, [8 features, 8 rows of x].
DEVICE void multiply(Ring& ring, const uint4 (&x)[PACKS], float* sums) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    float even[4] = {}, odd[4] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const char* low = ring.wait() + g * PITCH + t * 32;
#pragma unroll
        for (int s = 0; s < (p < PIECES - 1 ? PIECE : LAST_PIECE) / 64; s++) {
            const uint4 w = *(const uint4*)(low + s / 2 * 128 + s % 2 * 16);
            multiply_packs(even, odd, w, x[p * (PIECE / 64) + s]);
        }
        ring.next();
    }
    *(float2*)(sums + g * 8 + 2 * t) = make_float2(even[0] + odd[2], even[1] + odd[3]);
}

struct Output {
    T* out;
    const T* bias;
    const T* residual;
    int features, stride;
    // What is added to an output's sums. (Not as floats: whoever loads them does not wait for them.)
    struct Terms {
        T bias, up_bias, residual;
    };

    DEVICE Terms terms(int row, int feature) const {
        Terms terms;
        if (BIAS) terms.bias = bias[feature];
        if (BIAS && GATED) terms.up_bias = bias[features + feature];
        if (RESIDUAL) terms.residual = residual[(size_t)row * stride + feature];
        return terms;
    }
    DEVICE void store(int row, int feature, float sum, float up, Terms terms) const {
        if (BIAS) sum += to_float(terms.bias);
        if (BIAS && GATED) up += to_float(terms.up_bias);
        float value = sum;
        if (GATED) value = rounded(activation(rounded(sum))) * rounded(up);
        if (RESIDUAL) value = rounded(sum) + to_float(terms.residual);
        out[(size_t)row * stride + feature] = from_float(value);
    }
};

#if SPLIT > 1
// Adds the sums of all blocks of a group, always in the same order, in the last of them to come here.
DEVICE void add_parts(const Share& share, const Output& output, const float* partial, int* counter,
                      int rows) {
    __shared__ int arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1);
        if (arrived == SPLIT - 1) *counter = 0;
    }
    __syncthreads();
    if (arrived != SPLIT - 1) return;
    __threadfence();
    // 4 rows of a feature at a time.
#pragma unroll 1
    for (int i = threadIdx.x; i < share.rounds() * (OUTPUTS / 4); i += THREADS) {
        const int round = i / (OUTPUTS / 4), within = i / 2 % 8, first_row = i % 2 * 4;
        if (within >= share.count(round)) continue;
        const int feature = share.first(round) + within;
        float sums[HALVES][4] = {};
#pragma unroll
        for (int p = 0; p < SPLIT * HALVES; p++) {
            const size_t at = ((size_t)p * output.features + feature) * 8 + first_row;
            const float4 part = __ldcg((const float4*)(partial + at));
            const float values[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
            for (int r = 0; r < 4; r++) sums[p % HALVES][r] += values[r];
        }
        Output::Terms terms[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (first_row + r < rows) terms[r] = output.terms(first_row + r, feature);
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (first_row + r < rows)
                output.store(first_row + r, feature, sums[0][r], sums[HALVES - 1][r], terms[r]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
rows_gemm(T* out, const T* x, const T* weight, const T* bias, const T* residual,
          const T* norm_weight, float* partial, int* counters, int rows, int features,
          int out_stride, float eps) {
    extern __shared__ __align__(128) char shared[];  // the rings, then the warps' areas
    __shared__ u64 barriers[WARPS * STAGES];
#if RELEASE == 0
    let_next_start();
#endif
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int units = features / HALVES, group = blockIdx.x / SPLIT, part = blockIdx.x % SPLIT;
    const int first = part * (K / SPLIT) + warp * SLICE;
    if (gridDim.x / SPLIT <= group) return;
    const Share share(units, gridDim.x / SPLIT, group);
    if (lane < STAGES) barrier_init(barriers + warp * STAGES + lane);
    barriers_ready();
    __syncwarp();
    Ring ring{shared + warp * STAGES * SLOT, barriers + warp * STAGES,
              (const char*)(weight + first), share, units,
              EVICT_FIRST ? evict_first() : evict_normal(), share.rounds()};
#if EARLY
    ring.fill_all();
#endif
    // A warp's area holds its norm weights, fetched while there is time, and once x is normed its sums
    // of two rounds.
    char* const areas = shared + WARPS * STAGES * SLOT;
#if NORM
    uint4* const norm_weights = (uint4*)(areas + warp * AREA);
#pragma unroll
    for (int i = 0; i < SLICE / 8; i += 32)
        if (i + lane < SLICE / 8)
            norm_weights[i + lane] = __ldg((const uint4*)(norm_weight + first) + i + lane);
    __syncwarp();
#endif
    wait_for_previous();
#if !EARLY
    ring.fill_all();
#endif
    uint4 kept[PACKS];
    load_x(kept, x, rows, first);
#if NORM
    norm_x(kept, (const T*)norm_weights, eps);
    __syncwarp();  // every lane has read the weights
#endif
#if RELEASE == 1
    let_next_start();
#endif
    const Output output{out, bias, residual, units, out_stride};
    const int row = threadIdx.x % 8, within = threadIdx.x / 8;
    int buffer = 0;
    for (int round = 0; round < share.rounds(); round++) {
        const int feature = share.first(round) + within;
        const bool stores = row < rows && within < share.count(round);
        Output::Terms terms;
        if (SPLIT == 1 && stores) terms = output.terms(row, feature);  // long before it is used
#pragma unroll 1
        for (int half = 0; half < HALVES; half++)
            multiply(ring, kept,
                     (float*)(areas + warp * AREA) + (buffer * HALVES + half) * OUTPUTS);
        __syncthreads();
        if (stores) {
            float sums[HALVES] = {};
#pragma unroll
            for (int w = 0; w < WARPS; w++) {
                const float* of_warp = (const float*)(areas + w * AREA) + buffer * HALVES * OUTPUTS;
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    sums[half] += of_warp[half * OUTPUTS + threadIdx.x];
            }
#if SPLIT > 1
#pragma unroll
            for (int half = 0; half < HALVES; half++)
                __stcg(partial + ((size_t)(part * HALVES + half) * units + feature) * 8 + row,
                       sums[half]);
#else
            output.store(row, feature, sums[0], sums[HALVES - 1], terms);
#endif
        }
        buffer ^= 1;  // the sums just read are written again only after the next barrier
    }
#if SPLIT > 1
    add_parts(share, output, partial, counters + group, rows);
#endif
}
