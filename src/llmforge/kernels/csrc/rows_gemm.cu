// out = x weightᵀ for at most 8 rows of x, as fast as the weights can be read. Weights come in tiles of
// 8 rows, a piece of each at a time, into a ring in shared memory that the warps of a block fill and use
// together; it begins to fill while the kernel before still runs. A warp multiplies its part of every
// piece by the same columns of x, which it keeps in registers for all tiles, as the second factor of
// mma.m16n8k16 (the 8 columns are the rows of x). Neighbouring blocks read neighbouring rows at the same
// time.
//   K: elements of a row. SPLIT: blocks that share K, each with a multiple of 256 elements. PIECE: the
//   most bytes of a row that one copy brings, a multiple of 512. STAGES: slots of the ring.
//   NORM: x is RMSNorm(x) norm_weight: x is multiplied by the weights, and the sums by what all squares
//   of x give. BIAS. RESIDUAL: added to the rounded product. GATED: the weights are those of gate | up,
//   out = activation(gate) up; a tile has 4 rows of each.
// x [rows, K]; weight [features, K]; out and residual have row stride out_stride. partial: float32
// [SPLIT, features, 8], and behind it the squares [SPLIT, 8]; counters: one int a group of SPLIT blocks,
// zero before and after. Grid: any number of blocks from SPLIT on; one a multiprocessor fills it.
#include "common.cuh"
#include "activation.cuh"

#define WARPS 8
#define THREADS (WARPS * 32)
#define HALVES (GATED ? 2 : 1)
#define TILE (8 / HALVES)               // output features
#define COLUMNS (K / SPLIT)             // of a block
#define PACKS (COLUMNS / (32 * WARPS))  // of 8 elements, that a lane keeps of x
#define PIECES ((COLUMNS * 2 + PIECE - 1) / PIECE)
#define LAST_PIECE (COLUMNS * 2 - (PIECES - 1) * PIECE)  // bytes
// Of rows in a slot: a lane's reads of 16 bytes are of row lane / 4, those of 8 neighbouring lanes of
// two rows, which fall into different banks.
#define PITCH ((PIECE + 127) / 128 * 128 + 64)
#define SLOT (8 * PITCH)
#define SUMS 64  // of a tile: 8 rows of weights by 8 rows of x

// Which output features a group of blocks computes, in rounds: a tile in each, dealt to the groups in
// turn, and in the last what is then left, in parts as equal as can be.
struct Share {
    int groups, group, whole, last_first, last_count;

    DEVICE Share(u32 features, u32 groups, u32 group) : groups(groups), group(group) {
        whole = features / (TILE * groups);
        const u32 dealt = whole * TILE * groups, left = features - dealt;
        last_first = dealt + left * group / groups;
        last_count = dealt + left * (group + 1) / groups - last_first;
    }
    DEVICE int rounds() const { return whole + (last_count > 0); }
    DEVICE int first(int round) const {
        return round < whole ? (round * groups + group) * TILE : last_first;
    }
    DEVICE int count(int round) const { return round < whole ? TILE : last_count; }
};

// The block's ring of weights. Slots are filled in the order in which they are used: of each tile all
// pieces of its rows. Every warp copies one of the rows.
struct Ring {
    char* slots;
    u64* barriers;
    const char* weights;  // this block's columns
    const Share& share;
    int units;  // output features
    u64 policy;
    int slot = 0;  // the next to be used
    u32 parity = 0;
    // The next to be copied: of this warp's row, if the tile has it.
    int round = 0, piece = 0;
    const char* source;

    DEVICE void begin_tile() {
        const int warp = threadIdx.x / 32;
        const int row = warp / TILE * units + share.first(round) + warp % TILE;
        source = weights + (size_t)row * K * 2;
    }
    DEVICE void fill(int at) {
        if (round == share.rounds()) return;
        const int warp = threadIdx.x / 32, count = share.count(round);
        const u32 bytes = piece < PIECES - 1 ? PIECE : LAST_PIECE;
        if (threadIdx.x == 0) barrier_expect(barriers + at, count * HALVES * bytes);
        if (threadIdx.x % 32 == 0 && warp % TILE < count)
            copy_bulk(slots + at * SLOT + warp * PITCH, source, bytes, barriers + at, policy);
        source += bytes;
        if (++piece < PIECES) return;
        piece = 0;
        round++;
        begin_tile();
    }
    DEVICE void fill_all() {
        begin_tile();
#pragma unroll 1
        for (int i = 0; i < STAGES; i++) fill(i);
    }
    DEVICE const char* wait() {
        barrier_wait(barriers + slot, parity);
        return slots + slot * SLOT;
    }
    DEVICE void next() {
        __syncthreads();  // every warp has read the slot
        fill(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// The first of this lane's columns in pack i: warps share every piece evenly, and lane t of 4 has of
// every 32 columns the 8 from 8 t on. (The order of k is free as long as both factors agree.)
DEVICE int column_of(int i) {
    const int piece = i / (PIECE / 512), within = i % (PIECE / 512);
    const int bytes = piece < PIECES - 1 ? PIECE : LAST_PIECE;
    return piece * (PIECE / 2) + threadIdx.x / 32 * (bytes / 16) + within * 32 + threadIdx.x % 4 * 8;
}

// This lane's part of x: of row lane / 4.
DEVICE void load_x(uint4 (&x)[PACKS], const T* columns, int count) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < PACKS; i++) x[i] = make_uint4(0, 0, 0, 0);
    if (g >= count) return;
#pragma unroll
    for (int i = 0; i < PACKS; i++)
        x[i] = __ldcg((const uint4*)(columns + (size_t)g * K + column_of(i)));
}

// Multiplies 8 rows of a and 8 of x, of which lanes hold what load_x says, into the sums' first half
// (even words) and second (odd words). The rows that the tensor cores see are, up to the 8th, the even
// words of a row, and then the odd ones: so a is as it came from memory. In each half, the other rows'
// sums mean nothing.
struct Sums {
    float even[4] = {}, odd[4] = {};

    DEVICE void add(uint4 a, uint4 x) {
        mma(even, a.x, a.y, a.z, a.w, x.x, x.z);
        mma(odd, a.x, a.y, a.z, a.w, x.y, x.w);
    }
    // Those of row lane / 4, in columns 2 (lane % 4) and the next.
    DEVICE float2 pair() const { return make_float2(even[0] + odd[2], even[1] + odd[3]); }
};

// The norm's part before the sums: x times its weights, those of the block's columns. Pack by pack, so
// that the first tile does not wait for all of x. The squares of x are the diagonal of x xᵀ.
DEVICE void weigh(uint4& x, Sums& squares, const T* weights, int pack) {
    squares.add(x, x);
    const uint4 w = *(const uint4*)(weights + column_of(pack));
    x = make_uint4(multiply_pairs(x.x, w.x), multiply_pairs(x.y, w.y), multiply_pairs(x.z, w.z),
                   multiply_pairs(x.w, w.w));
}

// The sums of this warp's columns for the tile that comes next, [8 rows of weights, 8 rows of x]. With
// the first, x is normed, and the squares of the warp's columns go to `squares`. Returns when all warps'
// sums are there.
DEVICE void multiply(Ring& ring, uint4 (&x)[PACKS], bool first, const T* norm_weights, float* sums,
                     float* squares) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Sums products, of_squares;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int bytes = p < PIECES - 1 ? PIECE : LAST_PIECE, packs = bytes / 512;
        if (NORM && first) {
#pragma unroll
            for (int s = 0; s < packs; s++)
                weigh(x[p * (PIECE / 512) + s], of_squares, norm_weights, p * (PIECE / 512) + s);
        }
        const char* own = ring.wait() + g * PITCH + warp * (bytes / 8) + t * 16;
#pragma unroll
        for (int s = 0; s < packs; s++)
            products.add(*(const uint4*)(own + s * 64), x[p * (PIECE / 512) + s]);
        ring.next();
    }
    // Behind the barrier of the last piece nobody reads the sums of the tile before any more, nor the
    // norm's weights, which were in their place.
    *(float2*)(sums + warp * SUMS + g * 8 + 2 * t) = products.pair();
    if (NORM && first && t == g / 2) {
        const float2 pair = of_squares.pair();
        squares[warp * 8 + g] = g % 2 ? pair.y : pair.x;
    }
    __syncthreads();
}

struct Output {
    T* out;
    const T* bias;
    const T* residual;
    int units, stride;
    // What is added to an output's sums. (Not as floats: whoever loads them does not wait for them.)
    struct Terms {
        T bias, up_bias, residual;
    };

    DEVICE Terms terms(int row, int feature) const {
        Terms terms;
        if (BIAS) terms.bias = bias[feature];
        if (BIAS && GATED) terms.up_bias = bias[units + feature];
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

// Of what each warp has left, the sum.
DEVICE float sum_of_warps(const float* of_warps, int stride) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += of_warps[w * stride];
    return sum;
}

#if SPLIT > 1
// Adds the sums of all blocks of a group, always in the same order, in the last of them to come here.
DEVICE void add_parts(const Share& share, const Output& output, const float* partial, int* counter,
                      int rows, float eps) {
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
    const int features = output.units * HALVES, first_row = threadIdx.x % 2 * 4;
    auto four_rows = [=](size_t of) {
        return __ldcg((const float4*)(partial + of * 8 + first_row));
    };
    float scales[4] = {1, 1, 1, 1};
#if NORM
    float squares[4] = {};
#pragma unroll
    for (int p = 0; p < SPLIT; p++) {
        const float4 part = four_rows((size_t)SPLIT * features + p);
        squares[0] += part.x, squares[1] += part.y, squares[2] += part.z, squares[3] += part.w;
    }
#pragma unroll
    for (int r = 0; r < 4; r++) scales[r] = rsqrtf(squares[r] / K + eps);
#endif
    // 4 rows of a feature at a time.
#pragma unroll 1
    for (int i = threadIdx.x; i < share.rounds() * TILE * 2; i += THREADS) {
        const int round = i / (TILE * 2), within = i / 2 % TILE;
        if (within >= share.count(round)) continue;
        const int feature = share.first(round) + within;
        Output::Terms terms[4];  // asked for beside the parts
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (first_row + r < rows) terms[r] = output.terms(first_row + r, feature);
        float sums[HALVES][4] = {};
#pragma unroll
        for (int p = 0; p < SPLIT * HALVES; p++) {
            const float4 part = four_rows((size_t)p * output.units + feature);
            const float values[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
            for (int r = 0; r < 4; r++) sums[p % HALVES][r] += values[r];
        }
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (first_row + r < rows)
                output.store(first_row + r, feature, sums[0][r] * scales[r],
                             sums[HALVES - 1][r] * scales[r], terms[r]);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 2)
rows_gemm(T* out, const T* x, const T* weight, const T* bias, const T* residual,
          const T* norm_weight, float* partial, int* counters, int rows, int features,
          int out_stride, float eps) {
    extern __shared__ __align__(128) char shared[];  // the ring, then the warps' sums of a tile
    __shared__ u64 barriers[STAGES];
    __shared__ float squares[WARPS * 8];
    let_next_start();
    const int units = features / HALVES, group = blockIdx.x / SPLIT, part = blockIdx.x % SPLIT;
    if (gridDim.x / SPLIT <= group) return;
    const Share share(units, gridDim.x / SPLIT, group);
    if (share.rounds() == 0) return;
    if (threadIdx.x < STAGES) barrier_init(barriers + threadIdx.x);
    barriers_ready();
    __syncthreads();
    const int begin = part * COLUMNS;
    Ring ring{shared, barriers, (const char*)(weight + begin), share, units, evict_first()};
    ring.fill_all();
    // Before there are sums, the norm's weights are there, fetched while there is time.
    float* const sums = (float*)(shared + STAGES * SLOT);
#if NORM
#pragma unroll
    for (int i = threadIdx.x; i < COLUMNS / 8; i += THREADS)
        ((uint4*)sums)[i] = __ldg((const uint4*)(norm_weight + begin) + i);
    __syncthreads();
#endif
    wait_for_previous();
    uint4 kept[PACKS];
    load_x(kept, x + begin, rows);
    const Output output{out, bias, residual, units, out_stride};
    // Of each tile, this thread's output, and its sums where it has one.
    const int row = threadIdx.x % 8, within = threadIdx.x / 8;
    float scale = 1;
    for (int round = 0; round < share.rounds(); round++) {
        const int feature = share.first(round) + within;
        const bool stores = row < rows && within < share.count(round);
        Output::Terms terms;
        if (SPLIT == 1 && stores) terms = output.terms(row, feature);  // long before it is used
        multiply(ring, kept, round == 0, (const T*)sums, sums, squares);
        if (!stores) continue;
        if (NORM && SPLIT == 1 && round == 0)
            scale = rsqrtf(sum_of_warps(squares + row, 8) / K + eps);
        float of_halves[HALVES];
#pragma unroll
        for (int half = 0; half < HALVES; half++) {
            of_halves[half] = sum_of_warps(sums + half * 8 * TILE + threadIdx.x, SUMS);
            if (SPLIT > 1)
                __stcg(partial + ((size_t)(part * HALVES + half) * units + feature) * 8 + row,
                       of_halves[half]);
        }
        if (SPLIT == 1)
            output.store(row, feature, of_halves[0] * scale, of_halves[HALVES - 1] * scale, terms);
    }
#if SPLIT > 1
    // Every group writes the same squares.
    if (NORM && threadIdx.x < 8)
        __stcg(partial + (size_t)(SPLIT * features + part) * 8 + threadIdx.x,
               sum_of_warps(squares + threadIdx.x, 8));
    add_parts(share, output, partial, counters + group, rows, eps);
#endif
}
