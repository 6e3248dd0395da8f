// out = x weightᵀ for up to ROWS rows of x, on the tensor cores of compute capability 9.0, for so few
// rows that reading the weights is what takes time. A block computes tiles of COLUMNS output features
// of all rows, over K or a part of it. A warp has the copy engine bring 64 elements of each of the
// tile's rows of weights, and of x, into the slots of a ring in shared memory, and a warpgroup for each
// 64 rows of x multiplies them. The copies run ahead over tiles, and those of weights begin while the
// kernel before still runs. (With a ring for x alone that of the weights would run further ahead; but
// the engine copies in order, and then x comes late: a tenth slower.)
//   K: elements of a row. ROWS: a multiple of 8. COLUMNS: a multiple of 16. SPLIT: parts of K, of whole
//   64 elements each, which the blocks divide like tiles; of the warps that have the sums of the same
//   rows and features, the last to finish adds, always in the same order. STAGES: slots.
//   BIAS. RESIDUAL: added to the rounded product. GATED: the weights are those of gate | up, a tile has
//   COLUMNS / 2 rows of each, out = activation(gate) up.
//   An RMSNorm between two products is in both, for it divides sums. WEIGHS, in the first: weighed =
//   out times the norm's weights is stored too, and the sum of the squares of each row's part of a tile.
//   NORM, in the second, whose x is `weighed`: how many such sums a row has. A warp that has no other
//   work adds them, always in the same order, while others multiply.
// x [rows, K] and weight [features, K] are maps, see launch.py. out, residual and weighed have row
// stride out_stride; output features are a multiple of 4. squares: [tiles, 64 GROUPS] float32 of this
// product, x_squares those of the one that gave x. partial: [tiles, SPLIT, 64 GROUPS, COLUMNS] float32;
// counters: an int for each warp and tile, zero before and after. Grid: any number of blocks up to
// SPLIT * tiles.
#include "common.cuh"
#include "activation.cuh"
#include "ring.cuh"
#include "wgmma.cuh"

#define GROUPS ((ROWS + 63) / 64)  // of 4 warps that multiply
#define WARPS (GROUPS * 4)
#define COPIES WARPS       // the number of the warp that copies
#define SCALES (WARPS + 1)  // of that which says what NORM multiplies by
#define THREADS ((NORM ? WARPS + 2 : WARPS + 1) * 32)
#define CHUNKS (K / SPLIT / 64)
// Of a slot. A group has 64 rows, and multiplies what lies behind those of x too, to forget it: of the
// next slot, and behind the last of memory that is there for this.
#define SLOT ((COLUMNS + ROWS) * 128)
#define CHAINS (COLUMNS <= 64 && GROUPS <= 2 ? 2 : 1)
#define BLOCKS (COLUMNS / 8)  // of 8 features, of which a lane has 2 of 2 rows: four sums
// Of 16 features, for which a thread asks at once for what is added: with less beside, the sums fit the
// registers that more warps leave.
#define TOGETHER (GROUPS > 2 ? 1 : 8)
#define OUTPUTS (GATED ? COLUMNS / 2 : COLUMNS)  // features of a tile that are stored

typedef Ring<STAGES, SLOT> Slots;  // each of weights, then x
DEVICE char* x_of(const Slots& slots) { return slots.tile() + COLUMNS * 128; }

// What a block computes: in each of its rounds a tile and a part of K.
struct Work {
    int items, item;

    DEVICE Work(int features) {
        items = (features + COLUMNS - 1) / COLUMNS * SPLIT;
        item = blockIdx.x;
    }
    DEVICE bool left() const { return item < items; }
    DEVICE void next() { item += gridDim.x; }
    DEVICE int tile() const { return item / SPLIT; }
    DEVICE int part() const { return item % SPLIT; }
};

// What is to be copied next, and where to.
struct Copies {
    Slots ring;
    Work work;
    int chunk = 0;  // of the part

    DEVICE void weights(const TensorMap* map, u64 policy) const {
        barrier_expect(ring.full + ring.slot, SLOT);
        copy_box(ring.tile(), map, 0, work.tile() * OUTPUTS, 0, column(), ring.full + ring.slot,
                 policy);
    }
    DEVICE void x(const TensorMap* map) const {
        copy_box(x_of(ring), map, 0, 0, 0, column(), ring.full + ring.slot);
    }
    DEVICE int column() const { return work.part() * CHUNKS + chunk; }
    DEVICE void next() {
        ring.next();
        if (++chunk == CHUNKS) chunk = 0, work.next();
    }
};

// By one thread: keeps the ring full, of x from when it is there.
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
        ahead.ring.wait_empty();
        ahead.weights(weight, policy);
        ahead.x(x);
    }
}

// A tile's sums of this warpgroup's 64 rows over a part of K. Those of small tiles are in two parts: a
// product need not wait for the one before.
DEVICE void multiply(float (&total)[COLUMNS / 2], Slots& ring) {
    float sums[CHAINS][COLUMNS / 2];
    const u32 rows = threadIdx.x / 128 * (64 * 128);
    const bool releases = threadIdx.x % 32 == 0;
    u64* before = nullptr;  // of the slot whose products are under way
#pragma unroll 1
    for (int c = 0; c < CHUNKS; c++) {
        ring.wait_full();
        const u64 a = factor(shared_address(x_of(ring)) + rows);
        const u64 b = factor(shared_address(ring.tile()));
        products_begin();
#pragma unroll
        for (int k = 0; k < 4; k++)  // 16 elements, 32 bytes, at a time
            begin_product(sums[k % CHAINS], a + 2 * k, b + 2 * k, c > 0 || k >= CHAINS);
        products_commit();
        products_wait<1>();
        if (releases && c > 0) barrier_arrive(before);
        before = ring.empty + ring.slot;
        ring.next();
    }
    products_wait<0>();
    if (releases) barrier_arrive(before);
#pragma unroll
    for (int chain = 0; chain < CHAINS; chain++) sums_ready(sums[chain]);
#pragma unroll
    for (int i = 0; i < COLUMNS / 2; i++)
        total[i] = CHAINS > 1 ? sums[0][i] + sums[CHAINS - 1][i] : sums[0][i];
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
        for (int p = 0; p < SPLIT; p++)
            if (p != part) parts[p] = __ldcg(place(p, j));
        const float4 own =
            make_float4(sums[4 * j], sums[4 * j + 1], sums[4 * j + 2], sums[4 * j + 3]);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[4 * j + i] = 0;
#pragma unroll
        for (int p = 0; p < SPLIT; p++) {
            if (p == part) parts[p] = own;
            sums[4 * j] += parts[p].x, sums[4 * j + 1] += parts[p].y;
            sums[4 * j + 2] += parts[p].z, sums[4 * j + 3] += parts[p].w;
        }
    }
    return true;
}
#endif

// Of two blocks of 8 features a lane has the words low and high, of features 2 (lane % 4) on of each;
// then of block lane / 2 % 2 those of features 4 (lane % 2) on.
DEVICE void trade(u32& low, u32& high) {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    const u32 from_far = __shfl_xor_sync(FULL_WARP, upper ? low : high, 2);
    if (upper) low = from_far;
    else high = from_far;
    const u32 from_near = __shfl_xor_sync(FULL_WARP, odd ? low : high, 1);
    if (odd) low = from_near;
    else high = from_near;
}
DEVICE u32 add_pairs(u32 a, u32 b) {
    return packed(low_half(a) + low_half(b), high_half(a) + high_half(b));
}
DEVICE float sum_of_pairs(u32 x) {  // of their squares
    return low_half(x) * low_half(x) + high_half(x) * high_half(x);
}

#if NORM
// By a warp: what the sums of each row of x are to be multiplied by.
DEVICE void find_scales(float* scales, const float* squares, float eps) {
#pragma unroll 1
    for (int row = threadIdx.x % 32 * 4; row < GROUPS * 64; row += 128) {
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 8
        for (int tile = 0; tile < NORM; tile++) {
            const float4 part = __ldcg((const float4*)(squares + tile * GROUPS * 64 + row));
            sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
        }
        *(float4*)(scales + row) =
            make_float4(rsqrtf(sum.x / K + eps), rsqrtf(sum.y / K + eps),
                        rsqrtf(sum.z / K + eps), rsqrtf(sum.w / K + eps));
    }
}
#endif

struct Output {
    T* out;
    const T* bias;
    const T* residual;
    T* weighed;
    const T* weights;  // of the norm of the output
    float* squares;
    int rows, features, stride;  // of the output
    // Of a tile's weights of the norm, those of 4 features of each 128: fetched before the sums are
    // there, traded when they are.
    struct Norm {
        uint2 weights[WEIGHS ? (COLUMNS + 127) / 128 : 1];
    };

    DEVICE Norm norm_of(int tile) const {
        Norm norm;
        const int first = threadIdx.x % 32 * 4;
#pragma unroll
        for (int i = 0; WEIGHS && i < (COLUMNS + 127) / 128; i++)
            if (first + 128 * i < COLUMNS && tile * COLUMNS + first + 128 * i < features)
                norm.weights[i] =
                    __ldg((const uint2*)(weights + tile * COLUMNS + first + 128 * i));
        return norm;
    }

    // This lane's two features of the 8 from `block` on, of its first row or of that 8 rows later.
    DEVICE u32 values(const float (&sums)[COLUMNS / 2], int tile, int block, int later,
                      float scale) const {
        const float* own = sums + 4 * block + 2 * later;
        float2 value = make_float2(own[0] * scale, own[1] * scale);
#if BIAS
        const int feature = tile * OUTPUTS + 8 * block + threadIdx.x % 4 * 2;
        const bool inside = feature < features;
        if (inside) value.x += to_float(bias[feature]), value.y += to_float(bias[feature + 1]);
#endif
#if GATED
        float2 up = make_float2(own[OUTPUTS / 2] * scale, own[OUTPUTS / 2 + 1] * scale);
#if BIAS
        const T* const of_up = bias + features + feature;
        if (inside) up.x += to_float(of_up[0]), up.y += to_float(of_up[1]);
#endif
        value.x = rounded(activation(rounded(value.x))) * rounded(up.x);
        value.y = rounded(activation(rounded(value.y))) * rounded(up.y);
#endif
        return packed(value.x, value.y);
    }
    // Stores what a warp has of a tile, 32 bytes of a row together. scales: of all rows, NORM.
    DEVICE void store(const float (&sums)[COLUMNS / 2], int tile, const float* scales,
                      const Norm& norm) const {
        const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
        const int first = tile * OUTPUTS + lane / 2 % 2 * 8 + lane % 2 * 4;
        const float scale[2] = {NORM ? scales[row] : 1, NORM ? scales[row + 8] : 1};
#if WEIGHS
        float squares_of[2] = {};
#endif
#pragma unroll
        for (int from = 0; from < OUTPUTS / 16; from += TOGETHER) {
            const int to = min(from + TOGETHER, OUTPUTS / 16);
#if RESIDUAL
            uint2 residuals[TOGETHER][2];  // all asked for before any is used
#pragma unroll
            for (int j = from; j < to; j++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    if (row + 8 * h < rows && first + 16 * j < features)
                        residuals[j - from][h] =
                            __ldcg((const uint2*)(residual + at(row + 8 * h, first + 16 * j)));
#endif
#pragma unroll
            for (int j = from; j < to; j++) {
#if WEIGHS
                const uint2 held = norm.weights[j / 8];
                const uint2 by =
                    make_uint2(__shfl_sync(FULL_WARP, held.x, j % 8 * 4 + lane % 4),
                               __shfl_sync(FULL_WARP, held.y, j % 8 * 4 + lane % 4));
#endif
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 low = values(sums, tile, 2 * j, h, scale[h]);
                    u32 high = values(sums, tile, 2 * j + 1, h, scale[h]);
                    trade(low, high);
                    if (row + 8 * h >= rows || first + 16 * j >= features) continue;
#if RESIDUAL
                    const uint2 other = residuals[j - from][h];
                    low = add_pairs(low, other.x), high = add_pairs(high, other.y);
#endif
                    const size_t place = at(row + 8 * h, first + 16 * j);
                    *(uint2*)(out + place) = make_uint2(low, high);
#if WEIGHS
                    squares_of[h] += sum_of_pairs(low) + sum_of_pairs(high);
                    *(uint2*)(weighed + place) =
                        make_uint2(multiply_pairs(low, by.x), multiply_pairs(high, by.y));
#endif
                }
            }
        }
#if OUTPUTS % 16
        // The last 8 features, which have nothing to trade for.
        const int last = tile * OUTPUTS + OUTPUTS / 16 * 16 + lane % 4 * 2;
#pragma unroll
        for (int h = 0; h < 2; h++)
            if (row + 8 * h < rows && last < features)
                *(u32*)(out + at(row + 8 * h, last)) =
                    values(sums, tile, OUTPUTS / 8 - 1, h, scale[h]);
#endif
#if WEIGHS
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float sum = squares_of[h];
            sum += __shfl_xor_sync(FULL_WARP, sum, 1);
            sum += __shfl_xor_sync(FULL_WARP, sum, 2);
            if (lane % 4 == 0) squares[tile * GROUPS * 64 + row + 8 * h] = sum;
        }
#endif
    }
    DEVICE size_t at(int row, int feature) const { return (size_t)row * stride + feature; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_gemm(T* out, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap weight,
          const T* bias, const T* residual, T* weighed, const T* norm_weight, float* squares,
          const float* x_squares, float* partial, int* counters, int rows, int features,
          int out_stride, float eps) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * STAGES + 1];
    __shared__ __align__(16) float scales[NORM ? GROUPS * 64 : 1];
    let_next_start();
    // The swizzle pattern starts anew every 1024 bytes of shared memory.
    Slots ring{unaligned + (-shared_address(unaligned) & 1023), barriers, barriers + STAGES};
    u64* const scaled = barriers + 2 * STAGES;
    if (threadIdx.x < STAGES) {
        barrier_init(ring.full + threadIdx.x);
        barrier_init(ring.empty + threadIdx.x, WARPS);
    }
    if (NORM && threadIdx.x == 0) barrier_init(scaled);
    barriers_ready();
    __syncthreads();
    Work work(features);
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == COPIES * 32) copy_all({ring, work}, &weight, &x);
    else wait_for_previous();
#if NORM
    if (warp == SCALES) {
        find_scales(scales, x_squares, eps);
        arrive(scaled);
    }
#endif
    if (warp >= WARPS) return;
    const Output output{out,     bias, residual, weighed, norm_weight,
                        squares, rows, GATED ? features / 2 : features, out_stride};
#pragma unroll 1
    for (; work.left(); work.next()) {
        const Output::Norm norm = output.norm_of(work.tile());
        float sums[COLUMNS / 2];
        multiply(sums, ring);
#if SPLIT > 1
        if (!add_parts(sums, partial, counters, work.tile(), work.part())) continue;
#endif
        if (NORM) barrier_wait(scaled, 0);
        output.store(sums, work.tile(), scales, norm);
    }
}
