// Attention of one new token a sequence over the paged cache, with what precedes it: bias, norm and
// rotation of the rows of a merged q|k|v product, and the write of the new key and value.
//   GROUP: query heads a kv head, at most 16. HEAD_DIM: a multiple of 8. BIAS, NORM, ROPE_DIM,
//   BLOCK_SIZE, TABLE_STRIDE, HEADS, KV_HEADS as in qkv.cu. WINDOW: positions attended to, 0 for all.
//   CAP: scores are capped, soft_cap tanh(score / soft_cap). SINKS: each head has one more key, whose
//   score is sinks[head] and whose value is zero. WARPS. STAGES: slots of each warp's ring.
//
// The grid is as large as the GPU, whatever the step: decode_plan.cuh divides the keys. A warp takes
// every WARPS-th unit of 16 keys, through a ring of its own that runs ahead of the arithmetic, over
// the ends of pairs, and of the kernel: only the new token's key and value are not in the cache while
// the kernel before still runs. Rings are filled by copies of 16 bytes a lane: rows of a kv head
// are of a few hundred bytes, and bulk copies of such a size leave one lane after another.
//
// 4.4 TB/s at about 1 us from request to arrival are 4.4 MB under way, 33 KB a multiprocessor; two
// blocks with rings of 64 KB have between half of 128 KB and all of it under way.
//
// q, k, v: [sequences, heads * HEAD_DIM] with row strides. table: rope's cosines and sines.
// partial: [blocks, 2, GROUP, HEAD_DIM + 2] float32, in which a block has up to two parts of pairs: of
// one that begins before it (0), and of one that ends behind it (1). counters: one a block, zero
// before and after. Dynamic shared memory: the rings, then 2 sequences + 1 int32.
#include "common.cuh"
#include "qkv.cuh"
#define ROWS GROUP
#include "attention_tile.cuh"
#include "decode_plan.cuh"

#define ROW_BYTES ((CHUNKS + 7) / 8 * 128)
#define SLOT_BYTES (2 * UNIT * ROW_BYTES)  // keys, then values
#define PART (GROUP * (HEAD_DIM + 2))

// Where a chunk of a slot's row lies: such that eight lanes which read 16 bytes each, of keys or of
// values as `attend` wants them, find them in different banks.
DEVICE int place_of(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ (row & 6) ^ (row & 1) << 2) * 16;
}

// A warp's ring: slots are filled in the order in which they are used.
struct Ring {
    const Plan& plan;
    const T *key_cache, *value_cache;
    const int* block_table;
    char* slots;
    int sequences;
    Run run;
    int unit;   // the next to be copied
    int block;  // where that is cached, looked up one copy ahead
    int slot;

    // To this warp's first unit from here on, into the next runs where this one has no more.
    DEVICE void settle() {
        while (unit >= run.end) {
            if (!run.next(plan, sequences)) return;
            unit = run.begin + threadIdx.x / 32;
        }
        if (BLOCK_SIZE % UNIT == 0) block = block_of(first_key());
    }
    DEVICE int first_key() const { return (skipped(plan.lens[run.sequence]) + unit) * UNIT; }
    DEVICE int block_of(int key) const {
        return __ldcg(block_table + (size_t)run.sequence * TABLE_STRIDE + key / BLOCK_SIZE);
    }
    DEVICE const T* row_at(const T* cache, int block, int key) const {
        const size_t row = (size_t)block * BLOCK_SIZE + key % BLOCK_SIZE;
        return cache + (row * KV_HEADS + run.head) * HEAD_DIM;
    }
    // Copies the next unit but for the new token and what would come behind it.
    DEVICE void fill() {
        if (unit < run.end) {
            const int lane = threadIdx.x % 32, first = first_key();
            const int count = plan.lens[run.sequence] - 1 - first;
            char* target = slots + slot * SLOT_BYTES;
            const T* keys = row_at(key_cache, block, first);
            const T* values = row_at(value_cache, block, first);
#pragma unroll
            for (int i = 0; i < UNIT * CHUNKS; i += 32) {
                const bool even = 32 % CHUNKS == 0;  // each lane has one chunk, of several rows
                const int row = even ? lane / CHUNKS + i / CHUNKS : (lane + i) / CHUNKS;
                const int chunk = even ? lane % CHUNKS : (lane + i) % CHUNKS;
                if (row >= min(count, UNIT)) continue;
                if (BLOCK_SIZE % UNIT) {
                    const int at = block_of(first + row);
                    keys = row_at(key_cache, at, first + row) - row * KV_HEADS * HEAD_DIM;
                    values = row_at(value_cache, at, first + row) - row * KV_HEADS * HEAD_DIM;
                }
                const int offset = row * KV_HEADS * HEAD_DIM + chunk * 8;
                copy_async(target + place_of(row, chunk), keys + offset);
                copy_async(target + UNIT * ROW_BYTES + place_of(row, chunk), values + offset);
            }
            unit += WARPS;
            settle();
        }
        copy_async_commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
};

// Puts the new key and value into the slot of a sequence's last unit, and zeros for the values
// behind them, which count with weight zero but must be numbers.
DEVICE void add_new(char* slot, int row, const T* key, const T* value) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < (UNIT - row) * CHUNKS; i += 32) {
        const int behind = i / CHUNKS, chunk = i % CHUNKS, place = place_of(row + behind, chunk);
        uint4* target = (uint4*)(slot + UNIT * ROW_BYTES + place);
        *target = behind ? make_uint4(0, 0, 0, 0) : load_chunk(value, chunk);
        if (!behind) *(uint4*)(slot + place) = load_chunk(key, chunk);
    }
    __syncwarp();
}

// What a warp has of each row, behind `finish_totals`: weighted sum, largest score, total weight.
DEVICE void write_parts(float (*parts)[HEAD_DIM + 2], const State& state) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < USED; i++) {
        const int row = g + 8 * i;
        if (row >= GROUP) continue;
        float* part = parts[row];
#pragma unroll
        for (int p = 0; p < HALVES * 8; p++) {
            const int d = p / 8 * 64 + 16 * t + p % 8;
            if (d < HEAD_DIM) part[d] = state.sum[p][2 * i];
            if (d + 8 < HEAD_DIM) part[d + 8] = state.sum[p][2 * i + 1];
        }
        if (t == 0) part[HEAD_DIM] = state.largest[i], part[HEAD_DIM + 1] = state.total[i];
    }
}

struct Joined {
    float sum, largest, total;

    // As T, with the sink of the head.
    DEVICE T value(const T* sinks, int head) const {
#if SINKS
        const float sink = to_float(sinks[head]) * LOG2_E, bound = fmaxf(largest, sink);
        const float keep = exp2f(largest - bound);
        return from_float(sum * keep / (total * keep + exp2f(sink - bound)));
#else
        return from_float(sum / total);
#endif
    }
};

// Dimension d of a row, from `count` parts: `part(i, e)` is element e of the i-th. One of them at
// least has a key in it.
template <class Part>
DEVICE Joined join(Part part, int count, int d) {
    Joined joined{0, -INFINITY, 0};
#pragma unroll 4
    for (int i = 0; i < count; i++) joined.largest = fmaxf(joined.largest, part(i, HEAD_DIM));
    const float shift = joined.largest == -INFINITY ? 0.0f : joined.largest;
    for (int i = 0; i < count; i++) {
        const float weight = exp2f(part(i, HEAD_DIM) - shift);
        joined.sum += weight * part(i, d);
        joined.total += weight * part(i, HEAD_DIM + 1);
    }
    return joined;
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_attention(T* out, T* key_cache, T* value_cache, const T* q, const T* k, const T* v,
                 const T* bias, const T* q_weight, const T* k_weight, const float* table,
                 const T* sinks, const int* kv_lens, const int* block_table, float* partial,
                 int* counters, int sequences, int q_stride, int k_stride, int v_stride, float eps,
                 float scale, float soft_cap) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float parts[WARPS][GROUP][HEAD_DIM + 2];
    __shared__ __align__(16) T rows[GROUP + 2][HEAD_DIM];  // queries, the new key and value
    __shared__ float staged[WARPS][HEAD_DIM];
    __shared__ int arrived;
    let_next_start();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    int* lens = (int*)(shared + WARPS * STAGES * SLOT_BYTES);
    const Plan plan = make_plan(lens, lens + sequences, kv_lens, sequences);
    Run run;
    if (!first_run(plan, sequences, run)) return;
    char* slots = shared + warp * STAGES * SLOT_BYTES;
    Ring ring{plan, key_cache, value_cache, block_table, slots, sequences,
              run,  run.begin + warp,       0,           0};
    ring.settle();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) ring.fill();
    wait_for_previous();
    do {
        const size_t sequence = run.sequence;
        const int kv_len = plan.lens[sequence], units = units_of(kv_len);
        const int first = WINDOW > 0 ? max(0, kv_len - WINDOW) : 0;
        const bool has_new = run.end == units;
#pragma unroll 1
        for (int row = warp; row < GROUP + (has_new ? 2 : 0); row += WARPS) {
            const bool is_q = row < GROUP, is_v = row == GROUP + 1;
            const int head = is_q   ? run.head * GROUP + row
                             : is_v ? HEADS + KV_HEADS + run.head
                                    : HEADS + run.head;
            const T* source = is_q   ? q + sequence * q_stride + head * HEAD_DIM
                              : is_v ? v + sequence * v_stride + run.head * HEAD_DIM
                                     : k + sequence * k_stride + run.head * HEAD_DIM;
            load_head(staged[warp], lane, source, bias, head * HEAD_DIM, !is_v,
                      is_q ? q_weight : k_weight, eps);
            store_head(rows[row], staged[warp], lane, table, sequence, is_v ? 0 : ROPE_DIM);
            __syncwarp();  // the row is complete, and the next may be staged
            if (is_q) continue;
            const int key = kv_len - 1;
            const int block = block_table[sequence * TABLE_STRIDE + key / BLOCK_SIZE];
            const size_t slot = (size_t)block * BLOCK_SIZE + key % BLOCK_SIZE;
            T* target = (is_v ? value_cache : key_cache) + (slot * KV_HEADS + run.head) * HEAD_DIM;
            for (int i = lane; i < CHUNKS; i += 32) ((uint4*)target)[i] = load_chunk(rows[row], i);
        }
        __syncthreads();
        State state;
        begin(state);
        const T *low = rows[min(g, GROUP - 1)], *high = rows[min(g + 8, GROUP - 1)];
        Rows kept[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; s++) kept[s] = chunk_of(low, high, s);
        // Beside the sums of long rows there are no registers left for the queries.
        auto query = [&](int s) { return HEAD_DIM > 128 ? chunk_of(low, high, s) : kept[s]; };
        const int last[2] = {kv_len - 1, kv_len - 1};
        for (int unit = run.begin + warp; unit < run.end; unit += WARPS) {
            copy_async_wait<STAGES - 1>();
            __syncwarp();
            char* slot = slots + ring.slot * SLOT_BYTES;  // the next to be filled is the oldest
            if (unit == units - 1) add_new(slot, (kv_len - 1) % UNIT, rows[GROUP], rows[GROUP + 1]);
            auto chunk_at = [&](const char* base, int row, int chunk) {
                return chunk < CHUNKS ? *(const uint4*)(base + place_of(row, chunk))
                                      : make_uint4(0, 0, 0, 0);
            };
            attend(
                state, query, [&](int j, int s) { return chunk_at(slot, 8 * j + g, 4 * s + t); },
                [&](int j, int h) {
                    return chunk_at(slot + UNIT * ROW_BYTES, 2 * t + j % 2 + j / 2 * 8, 8 * h + g);
                },
                (skipped(kv_len) + unit) * UNIT, first, kv_len, last,
                [&](float x) {
#if CAP
                    return soft_cap * tanhf(x * scale / soft_cap) * LOG2_E;
#else
                    return x * (scale * LOG2_E);
#endif
                });
            __syncwarp();
            ring.fill();
        }
        finish_totals(state);
        write_parts(parts[warp], state);
        __syncthreads();
        // Blocks that have a part of the pair.
        const int place = run.place(plan);
        const int from = place / plan.share, count = (place + units - 1) / plan.share - from + 1;
        float* mine = partial + (blockIdx.x * 2 + (run.begin == 0)) * PART;
        T* out_rows = out + (sequence * HEADS + run.head * GROUP) * HEAD_DIM;
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
            const int row = i / HEAD_DIM, d = i % HEAD_DIM;
            const Joined joined = join([&](int w, int e) { return parts[w][row][e]; }, WARPS, d);
            if (count == 1) {
                out_rows[i] = joined.value(sinks, run.head * GROUP + row);
                continue;
            }
            float* part = mine + row * (HEAD_DIM + 2);
            part[d] = joined.sum;
            if (d == 0) part[HEAD_DIM] = joined.largest, part[HEAD_DIM + 1] = joined.total;
        }
        if (count == 1) continue;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            arrived = atomicAdd(counters + from, 1);
            if (arrived == count - 1) counters[from] = 0;
        }
        __syncthreads();
        if (arrived != count - 1) continue;
        __threadfence();
#pragma unroll 1
        for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
            const float* first_of = partial + from * 2 * PART + i / HEAD_DIM * (HEAD_DIM + 2);
            auto part = [&](int p, int e) {
                return __ldcg(first_of + (p * 2 + (p == 0)) * PART + e);
            };
            const Joined joined = join(part, count, i % HEAD_DIM);
            out_rows[i] = joined.value(sinks, run.head * GROUP + i / HEAD_DIM);
        }
    } while (run.next(plan, sequences));
}
