// out = x weightᵀ for at most 32 rows of x, as fast as the weights can be read. Weights come in tiles of
// 16 rows, the first factor of mma.m16n8k16, by a ring in shared memory that a block's warps fill and use
// together; it begins to fill while the kernel before still runs. The second factor is x, in registers:
// each warp keeps a part of K for all tiles. Where registers do not hold all columns of a block, it goes
// through its tiles once for every COLUMNS of them, a phase, and sums wait in `partial` for the next.
// Neighbouring blocks read neighbouring rows at the same time.
//   K: elements of a row. EIGHTS: rows of x, in eights. SPLIT: blocks that share K; the last of a group
//   to finish adds. PHASES, COLUMNS: K = SPLIT PHASES COLUMNS, of which COLUMNS is a multiple of 256.
//   PIECE: the most bytes of a row that one copy brings, a multiple of 512. STAGES: slots of the ring.
//   NORM: x is RMSNorm(x) norm_weight: x is multiplied by the weights on the way in, sums by what the
//   squares of x give when they are complete. BIAS. RESIDUAL: added to the rounded product. GATED: the
//   weights are those of gate | up, out = activation(gate) up; a tile has 8 rows of each.
// x [rows, K]; weight [features, K]; out and residual have row stride out_stride. partial: float32
// [SPLIT, features, 8 EIGHTS], and behind it the squares [SPLIT, 8 EIGHTS]; counters: one int a group of
// SPLIT blocks, zero before and after. Grid: any number of blocks from SPLIT on; one a multiprocessor
// fills it.
#include "common.cuh"
#include "activation.cuh"

#define WARPS 8
#define THREADS (WARPS * 32)
#define HALVES (GATED ? 2 : 1)
#define TILE (TILE_ROWS / HALVES)  // output features
#define ROWS (8 * EIGHTS)
#define PACKS (COLUMNS / (32 * WARPS))  // of 8 elements, that a lane keeps of a row of x
#define TEAM_COLUMNS (COLUMNS / WARPS * TEAM)
#define PIECES ((TEAM_COLUMNS * 2 + PIECE - 1) / PIECE)
#define LAST_PIECE (TEAM_COLUMNS * 2 - (PIECES - 1) * PIECE)  // bytes
#define PIECE_PACKS (PIECE / (64 * TEAM))
#define COPIED (TILE_ROWS / TEAM)  // rows of a tile, that each warp of a team copies
// Of rows in a slot: of a lane's reads of 16 bytes, in row lane / 4, those of 8 neighbouring lanes are of
// two rows and fall into different banks.
#define PITCH ((PIECE + 127) / 128 * 128 + 64)
#define SLOT (TILE_ROWS * PITCH)
#define SUMS (TILE_ROWS * ROWS)  // of a tile
#define OUTPUTS (SUMS / HALVES)
#define OWN ((OUTPUTS + THREADS - 1) / THREADS)  // outputs of a tile that a thread finishes

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

// Returns when all threads of a team of warps have come.
DEVICE void meet_team() {
#if TEAM == 1
    __syncwarp();
#elif TEAM == WARPS
    __syncthreads();
#else
    meet_some(1 + threadIdx.x / (32 * TEAM), 32 * TEAM);
#endif
}

// The block's ring of weights. Slots are filled in the order in which they are used: in each phase of
// each tile all pieces of its rows. Of a tile's rows every warp copies two, by a lane each.
struct Ring {
    char* slots;
    u64* barriers;
    const char* weights;  // this block's columns
    const Share& share;
    int units;  // output features
    u64 policy;
    int slot = 0;  // the next to be used
    u32 parity = 0;
    // The next to be copied: of this lane's row, if it has one.
    int phase = 0, round = 0, piece = 0;
    const char* source;
    int tile_rows;
    bool copies;

    DEVICE static int row() { return threadIdx.x / 32 % TEAM * COPIED + threadIdx.x % 32; }
    DEVICE void begin_tile() {
        const int within = row() % TILE, count = share.count(round);
        const int first = row() / TILE * units + share.first(round) + within;
        tile_rows = count * HALVES;
        copies = threadIdx.x % 32 < COPIED && within < count;
        source = weights + ((size_t)first * K + phase * COLUMNS) * 2;
    }
    DEVICE void fill(int at) {
        if (phase == PHASES) return;
        const u32 bytes = piece < PIECES - 1 ? PIECE : LAST_PIECE;
        if (threadIdx.x % (32 * TEAM) == 0) barrier_expect(barriers + at, tile_rows * bytes);
        if (copies)
            copy_bulk(slots + at * SLOT + row() * PITCH, source, bytes, barriers + at, policy);
        source += bytes;
        if (++piece < PIECES) return;
        piece = 0;
        if (++round == share.rounds()) round = 0, phase++;
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
        meet_team();  // every thread has read the slot
        fill(slot);
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

// The first column of a phase that pack i of this warp is of: warps share every piece evenly, and lane t
// of 4 has of every 32 columns the 8 from 8 t on. (The order of k is free as long as both factors agree.)
DEVICE int column_of(int i) {
    const int piece = i / PIECE_PACKS, within = i % PIECE_PACKS, warp = threadIdx.x / 32;
    const int bytes = piece < PIECES - 1 ? PIECE : LAST_PIECE;
    return warp / TEAM * TEAM_COLUMNS + piece * (PIECE / 2) + warp % TEAM * (bytes / 2 / TEAM) +
           within * 32 + threadIdx.x % 4 * 8;
}

// This lane's part of x: of rows g, g + 8... , g = lane / 4.
DEVICE void load_x(uint4 (&x)[EIGHTS][PACKS], const T* columns, int count) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++)
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            x[n][i] = make_uint4(0, 0, 0, 0);
            if (n * 8 + g < count)
                x[n][i] = __ldcg((const uint4*)(columns + (size_t)(n * 8 + g) * K + column_of(i)));
        }
}

#if NORM
DEVICE void load_norm(uint4* kept, const T* weights) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; i += THREADS)
        if (i + threadIdx.x < COLUMNS / 8)
            kept[i + threadIdx.x] = __ldg((const uint4*)weights + i + threadIdx.x);
}

// Multiplies x by the norm's weights, and adds its squares to this warp's. Their sums are the diagonal of
// x xᵀ, which the tensor cores give in little code: the first pass through a kernel's code costs the more
// time the longer it is.
DEVICE void weigh_x(uint4 (&x)[EIGHTS][PACKS], const T* weights, float* squares, bool first) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
        float products[4] = {};
#pragma unroll
        for (int i = 0; i < PACKS; i++) {
            mma(products, x[n][i].x, 0, x[n][i].y, 0, x[n][i].x, x[n][i].y);
            mma(products, x[n][i].z, 0, x[n][i].w, 0, x[n][i].z, x[n][i].w);
        }
        if (t == g / 2)
            squares[n * 8 + g] =
                (first ? 0 : squares[n * 8 + g]) + (g % 2 ? products[1] : products[0]);
    }
#pragma unroll
    for (int i = 0; i < PACKS; i++) {
        const uint4 w = *(const uint4*)(weights + column_of(i));
#pragma unroll
        for (int n = 0; n < EIGHTS; n++)
            x[n][i] = make_uint4(multiply_pairs(x[n][i].x, w.x), multiply_pairs(x[n][i].y, w.y),
                                 multiply_pairs(x[n][i].z, w.z), multiply_pairs(x[n][i].w, w.w));
    }
}
#endif

// The sums of this warp's part of the columns for the tile that comes next: [EIGHTS, 16 rows of weights,
// 8 rows of x]. Returns when those of all warps are there.
DEVICE void multiply(Ring& ring, const uint4 (&x)[EIGHTS][PACKS], float* sums) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#if TILE_ROWS == 16
    float d[EIGHTS][4] = {};
#else
    float even[EIGHTS][4] = {}, odd[EIGHTS][4] = {};
#endif
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        const int bytes = p < PIECES - 1 ? PIECE : LAST_PIECE;
        const char* own = ring.wait() + g * PITCH + warp % TEAM * (bytes / TEAM) + t * 16;
#pragma unroll
        for (int s = 0; s < bytes / (64 * TEAM); s++) {
            const uint4 low = *(const uint4*)(own + s * 64);
#if TILE_ROWS == 16
            const uint4 high = *(const uint4*)(own + s * 64 + 8 * PITCH);
#endif
#pragma unroll
            for (int n = 0; n < EIGHTS; n++) {
                const uint4 b = x[n][p * PIECE_PACKS + s];
#if TILE_ROWS == 16
                mma(d[n], low.x, high.x, low.y, high.y, b.x, b.y);
                mma(d[n], low.z, high.z, low.w, high.w, b.z, b.w);
#else
                mma(even[n], low.x, low.y, low.z, low.w, b.x, b.z);
                mma(odd[n], low.x, low.y, low.z, low.w, b.y, b.w);
#endif
            }
        }
        ring.next();
    }
    float* const of_warp = sums + warp * SUMS + g * 8 + 2 * t;
#pragma unroll
    for (int n = 0; n < EIGHTS; n++) {
#if TILE_ROWS == 16
        *(float2*)(of_warp + n * 128) = make_float2(d[n][0], d[n][1]);
        *(float2*)(of_warp + n * 128 + 64) = make_float2(d[n][2], d[n][3]);
#else
        *(float2*)(of_warp + n * 64) =
            make_float2(even[n][0] + odd[n][2], even[n][1] + odd[n][3]);
#endif
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

#if SPLIT > 1
// Adds the sums of all blocks of a group, always in the same order, in the last of them to come here.
DEVICE void add_parts(const Share& share, const Output& output, const float* partial, int* counter,
                      int rows, float eps) {
    __shared__ int arrived;
    __shared__ float scales[ROWS];
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1);
        if (arrived == SPLIT - 1) *counter = 0;
    }
    __syncthreads();
    if (arrived != SPLIT - 1) return;
    __threadfence();
    const size_t features = (size_t)output.units * HALVES;
#if NORM
    if (threadIdx.x < ROWS) {
        float squares = 0;
#pragma unroll
        for (int p = 0; p < SPLIT; p++)
            squares += __ldcg(partial + (SPLIT * features + p) * ROWS + threadIdx.x);
        scales[threadIdx.x] = rsqrtf(squares / K + eps);
    }
    __syncthreads();
#endif
    // 4 rows of a feature at a time.
    constexpr int FOURS = ROWS / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < share.rounds() * TILE * FOURS; i += THREADS) {
        const int round = i / (TILE * FOURS), within = i / FOURS % TILE, first_row = i % FOURS * 4;
        if (within >= share.count(round) || first_row >= rows) continue;
        const int feature = share.first(round) + within;
        float sums[HALVES][4] = {};
#pragma unroll
        for (int half = 0; half < HALVES; half++)
#pragma unroll 4
            for (int p = 0; p < SPLIT; p++) {
                const size_t of = p * features + half * output.units + feature;
                const float4 part = __ldcg((const float4*)(partial + of * ROWS + first_row));
                const float values[4] = {part.x, part.y, part.z, part.w};
#pragma unroll
                for (int r = 0; r < 4; r++) sums[half][r] += values[r];
            }
        Output::Terms terms[4];
#pragma unroll
        for (int r = 0; r < 4; r++)
            if (first_row + r < rows) terms[r] = output.terms(first_row + r, feature);
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const float scale = NORM ? scales[first_row + r] : 1;
            if (first_row + r < rows)
                output.store(first_row + r, feature, sums[0][r] * scale, sums[HALVES - 1][r] * scale,
                             terms[r]);
        }
    }
}
#endif

// Those outputs of every tile that a thread finishes: it adds the warps' sums.
struct Owned {
    float* partial;  // of this block's columns
    const float* sums;
    const float* squares;
    const Output& output;
    int rows;
    float eps;
    float scales[OWN];
    Output::Terms terms[OWN];
    float before[OWN][HALVES];  // the sums of earlier phases

    DEVICE static int place(int i) { return i * THREADS + threadIdx.x; }
    DEVICE static int row(int i) { return place(i) / (8 * TILE) * 8 + place(i) % 8; }
    DEVICE static int within(int i) { return place(i) / 8 % TILE; }
    DEVICE bool stores(int i, int count) const {
        return place(i) < OUTPUTS && row(i) < rows && within(i) < count;
    }
    DEVICE float* waiting(int i, int first, int half) const {
        const size_t feature = half * output.units + first + within(i);
        return partial + feature * ROWS + row(i);
    }
    // Loads what is added to a tile's sums, long before it is used.
    DEVICE void prepare(int phase, int first, int count) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!stores(i, count)) continue;
            if (SPLIT == 1 && phase == PHASES - 1)
                terms[i] = output.terms(row(i), first + within(i));
            if (phase > 0)
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    before[i][half] = __ldcg(waiting(i, first, half));
        }
    }
    // What rows of x are divided by, once all squares are there.
    DEVICE void set_scales() {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!stores(i, TILE)) continue;
            float sum = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) sum += squares[w * ROWS + row(i)];
            scales[i] = rsqrtf(sum / K + eps);
        }
    }
    DEVICE void finish(int phase, int first, int count) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            if (!stores(i, count)) continue;
            const float* of_warps = sums + row(i) / 8 * (8 * TILE_ROWS) + within(i) * 8 + row(i) % 8;
            float sum[HALVES];
#pragma unroll
            for (int half = 0; half < HALVES; half++) {
                sum[half] = phase > 0 ? before[i][half] : 0;
#pragma unroll
                for (int w = 0; w < WARPS; w++) sum[half] += of_warps[w * SUMS + half * 8 * TILE];
            }
            if (SPLIT > 1 || phase < PHASES - 1) {
#pragma unroll
                for (int half = 0; half < HALVES; half++)
                    __stcg(waiting(i, first, half), sum[half]);
                continue;
            }
            const float scale = NORM ? scales[i] : 1;
            output.store(row(i), first + within(i), sum[0] * scale, sum[HALVES - 1] * scale,
                         terms[i]);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
rows_gemm(T* out, const T* x, const T* weight, const T* bias, const T* residual,
          const T* norm_weight, float* partial, int* counters, int rows, int features,
          int out_stride, float eps) {
    extern __shared__ __align__(128) char shared[];  // the ring, then the warps' sums of a tile
    __shared__ u64 barriers[WARPS / TEAM * STAGES];
    __shared__ float squares[WARPS * ROWS];
    let_next_start();
    const int units = features / HALVES, group = blockIdx.x / SPLIT, part = blockIdx.x % SPLIT;
    if (gridDim.x / SPLIT <= group) return;
    const Share share(units, gridDim.x / SPLIT, group);
    if (share.rounds() == 0) return;
    if (threadIdx.x < WARPS / TEAM * STAGES) barrier_init(barriers + threadIdx.x);
    barriers_ready();
    __syncthreads();
    const int begin = part * (K / SPLIT), team = threadIdx.x / (32 * TEAM);
    Ring ring{shared + team * STAGES * SLOT, barriers + team * STAGES,
              (const char*)(weight + begin + team * TEAM_COLUMNS), share, units, evict_first()};
    ring.fill_all();
    // Before each phase, the sums' place is that of the norm's weights.
    float* const sums = (float*)(shared + WARPS / TEAM * STAGES * SLOT);
#if NORM
    load_norm((uint4*)sums, norm_weight + begin);  // now, while there is time
#endif
    wait_for_previous();
    const Output output{out, bias, residual, units, out_stride};
    Owned owned{partial + (size_t)part * features * ROWS, sums, squares, output, rows, eps};
    uint4 kept[EIGHTS][PACKS];
    int buffer = 0;
#pragma unroll 1
    for (int phase = 0; phase < PHASES; phase++) {
        load_x(kept, x + begin + phase * COLUMNS, rows);
#if NORM
        if (phase > 0) {
            __syncthreads();  // the last tile's sums have been read
            load_norm((uint4*)sums, norm_weight + begin + phase * COLUMNS);
        }
        __syncthreads();
        weigh_x(kept, (const T*)sums, squares + threadIdx.x / 32 * ROWS, phase == 0);
        __syncthreads();  // the weights have been read, all squares are there
        if (SPLIT == 1 && phase == PHASES - 1) owned.set_scales();
#endif
#pragma unroll 1
        for (int round = 0; round < share.rounds(); round++) {
            const int first = share.first(round), count = share.count(round);
            owned.prepare(phase, first, count);
            owned.sums = sums + buffer * WARPS * SUMS;
            multiply(ring, kept, sums + buffer * WARPS * SUMS);
            owned.finish(phase, first, count);
            if (BUFFERS == 1) __syncthreads();  // the next tile's sums come to the same place
            else buffer ^= 1;  // sums just read are written again only after the next barrier
        }
    }
#if SPLIT > 1
#if NORM
    if (threadIdx.x < ROWS) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += squares[w * ROWS + threadIdx.x];
        // Every group writes the same.
        __stcg(partial + (size_t)(SPLIT * features + part) * ROWS + threadIdx.x, sum);
    }
#endif
    add_parts(share, output, partial, counters + group, rows, eps);
#endif
}
