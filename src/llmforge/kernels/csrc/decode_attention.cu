// Attention of one new token a sequence over the paged cache, with what precedes it: bias, norm and
// rotation of the rows of a merged q|k|v product, and the write of the new key and value.
//   GROUP: query heads a kv head, at most 16. HEAD_DIM: a multiple of 8. BIAS, NORM, ROPE_DIM,
//   BLOCK_SIZE, TABLE_STRIDE, HEADS, KV_HEADS as in qkv.cu. WINDOW: positions attended to, 0 for all.
//   CAP: scores are capped, soft_cap tanh(score / soft_cap). SINKS: each head has one more key, whose
//   score is sinks[head] and whose value is zero. WARPS of a block, BLOCKS of a multiprocessor.
//   STAGES: slots of each warp's ring, for the keys or the values of 16 positions each.
//
// The grid is as large as the GPU, whatever the step: the plan (decode_plan.cuh) divides the keys. A
// warp takes every WARPS-th unit of 16 keys of its block's part of a pair, through a ring of its own
// that runs ahead of the arithmetic, over the ends of pairs, and of the kernel: only the new token's
// key and value are not in the cache while the kernel before still runs. Where there are as many
// pairs as warps, blocks of one warp each have a pair to themselves, and nobody meets anybody.
// Blocks that have no keys end without waiting for the kernel before: others do.
// Rings are filled by copies of 16 bytes a lane: a row of a kv head has a few hundred bytes, and the
// lanes of a warp issue bulk copies of that size one after another.
//
// 4.4 TB/s at about 1 us from request to arrival are 4.4 MB under way, 33 KB a multiprocessor: half
// of what rings of 64 KB hold. Blocks of 8 warps are those of steps of few sequences, which share
// multiprocessors with the blocks of the products before and behind: these want the rest of the
// shared memory, for their own rings, and half of the registers.
//
// q, k, v: [sequences, heads * HEAD_DIM] with row strides. table: rope's cosines and sines.
// partial: [blocks, 2, GROUP, PART_ROW] float32, in which a block has up to two parts of pairs: of
// one that begins before it (0), and of one that ends behind it (1). counters: one a block, zero
// before and after. Dynamic shared memory: the rings.
#include "common.cuh"
#include "qkv.cuh"
#if GROUP > 8
#define ROWS GROUP
#include "attention_tile.cuh"
typedef Rows QueryChunk;
#define query_chunk chunk_of
#else
#include "attention_columns.cuh"
#endif
#include "decode_join.cuh"
#include "decode_plan.cuh"

#define THREADS (WARPS * 32)
#define ROW_BYTES ((CHUNKS + 7) / 8 * 128)
#define SLOT_BYTES (UNIT * ROW_BYTES)
#define PART (GROUP * PART_ROW)
// Iterations of a copy's loop in line: beside the sums of long rows there are few registers left.
#define COPIES (HEAD_DIM > 128 ? 1 : 16)
// So are there beside the products' blocks. Queries stay in registers elsewhere.
#define MIN_BLOCKS (WARPS == 8 ? 2 : BLOCKS)
#define KEEP_QUERIES (HEAD_DIM <= 128 && WARPS < 8)

// Where a chunk of a slot's row lies: such that eight lanes which read 16 bytes each, of keys or of
// values as `attend` wants them, find them in different banks.
DEVICE int place_of(int row, int chunk) {
    return row * ROW_BYTES + (chunk ^ (row & 6) ^ (row & 1) << 2) * 16;
}

// A warp's ring: slots are filled in the order in which they are used.
struct Ring {
    const T *key_cache, *value_cache;
    const int *kv_lens, *block_table;
    char* slots;
    int sequences;
    Division division;
    Run run;
    int unit;   // the next to be copied
    int block;  // where that is cached, looked up one copy ahead
    int slot;

    // To this warp's first unit from here on, into the next runs where this one has no more.
    DEVICE void settle() {
        while (unit >= run.end) {
            if (!run.next(division, kv_lens, sequences)) return;
            unit = run.begin + threadIdx.x / 32;
        }
        if (BLOCK_SIZE % UNIT == 0) block = block_of(first_key());
    }
    DEVICE int first_key() const { return (skipped(run.kv_len) + unit) * UNIT; }
    DEVICE int block_of(int key) const {
        return __ldcg(block_table + (size_t)run.sequence * TABLE_STRIDE + key / BLOCK_SIZE);
    }
    DEVICE const T* row_at(const T* cache, int block, int key) const {
        const size_t row = (size_t)block * BLOCK_SIZE + key % BLOCK_SIZE;
        return cache + (row * KV_HEADS + run.head) * HEAD_DIM;
    }
    // The slot that is filled longest ago, and is the next to be filled.
    DEVICE char* wait() const {
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        return slots + slot * SLOT_BYTES;
    }
    // Copies the keys of the next unit, or then its values: all but those of the new token, and of
    // what would come behind it.
    DEVICE void fill(bool values) {
        if (unit < run.end) {
            const int lane = threadIdx.x % 32, first = first_key();
            const int count = run.kv_len - 1 - first;
            char* target = slots + slot * SLOT_BYTES;
            const T* cache = values ? value_cache : key_cache;
            const T* rows = row_at(cache, block, first);
#pragma unroll COPIES
            for (int i = 0; i < UNIT * CHUNKS; i += 32) {
                const bool even = 32 % CHUNKS == 0;  // each lane has one chunk, of several rows
                const int row = even ? lane / CHUNKS + i / CHUNKS : (lane + i) / CHUNKS;
                const int chunk = even ? lane % CHUNKS : (lane + i) % CHUNKS;
                if (row >= min(count, UNIT)) continue;
                if (BLOCK_SIZE % UNIT) {
                    const int at = block_of(first + row);
                    rows = row_at(cache, at, first + row) - row * KV_HEADS * HEAD_DIM;
                }
                copy_async(target + place_of(row, chunk),
                           rows + row * KV_HEADS * HEAD_DIM + chunk * 8);
            }
            if (values) {
                unit += WARPS;
                settle();
            }
        }
        copy_async_commit();
        slot = slot + 1 == STAGES ? 0 : slot + 1;
    }
};

// Puts a row of the new token into the slot of a sequence's last unit.
DEVICE void add_row(char* slot, int row, const T* added) {
    const int lane = threadIdx.x % 32;
    if (lane < CHUNKS) *(uint4*)(slot + place_of(row, lane)) = load_chunk(added, lane);
}

// The same for values, and zeros for those behind it, which count with weight zero but must be
// numbers.
DEVICE void add_values(char* slot, int row, const T* added) {
    add_row(slot, row, added);
#pragma unroll 1
    for (int i = threadIdx.x % 32 + CHUNKS; i < (UNIT - row) * CHUNKS; i += 32)
        *(uint4*)(slot + place_of(row + i / CHUNKS, i % CHUNKS)) = make_uint4(0, 0, 0, 0);
    __syncwarp();
}

// The kernel's arguments that belong together.
struct Step {
    T *out, *key_cache, *value_cache;
    const T *q, *k, *v, *bias, *q_weight, *k_weight;
    const float* table;
    const T* sinks;
    const int* block_table;
    float* partial;
    int* counters;
    int q_stride, k_stride, v_stride;
    float eps, scale, soft_cap;
};

// What the heads of a run are made of, fetched by all threads at once: what waits for memory is one
// load of each.
struct alignas(16) Fetched {
    T heads[GROUP + 2][HEAD_DIM];  // the queries of a kv head, its new key and value
    T bias[BIAS ? GROUP + 2 : 1][HEAD_DIM];
    T norms[NORM ? 2 : 1][HEAD_DIM];
    float angles[ROPE_DIM ? ROPE_DIM : 4];
};

DEVICE void fetch_norms(Fetched& fetched, const Step& step) {
#if NORM
    for (int i = threadIdx.x; i < 2 * CHUNKS; i += THREADS) {
        const T* weight = i < CHUNKS ? step.q_weight : step.k_weight;
        ((uint4*)fetched.norms)[i] = load_chunk(weight, i % CHUNKS);
    }
#endif
}

#define FETCHES (WARPS > 2 ? 1 : 4 / WARPS)  // of a thread at once

// The first `heads` of the heads of a run.
DEVICE void fetch(Fetched& fetched, const Step& step, const Run& run, int heads) {
    const size_t sequence = run.sequence;
    const int chunks = heads * CHUNKS, biases = BIAS ? chunks : 0;
#pragma unroll FETCHES
    for (int i = threadIdx.x; i < chunks + biases + ROPE_DIM / 4; i += THREADS) {
        const int of = i < chunks ? i : i - chunks, row = of / CHUNKS, chunk = of % CHUNKS;
        const int head = row < GROUP ? run.head * GROUP + row : run.head;
        const uint4* source;
        uint4* target;
        if (i < chunks) {
            const T* rows = row < GROUP    ? step.q + sequence * step.q_stride
                            : row == GROUP ? step.k + sequence * step.k_stride
                                           : step.v + sequence * step.v_stride;
            source = (const uint4*)(rows + head * HEAD_DIM) + chunk;
            target = (uint4*)fetched.heads[row] + chunk;
        } else if (i < chunks + biases) {
            const int behind = row < GROUP ? 0 : row == GROUP ? HEADS : HEADS + KV_HEADS;
            source = (const uint4*)(step.bias + (behind + head) * HEAD_DIM) + chunk;
            target = (uint4*)fetched.bias[row] + chunk;
        } else {
            source = (const uint4*)(step.table + sequence * ROPE_DIM) + (of - biases);
            target = (uint4*)fetched.angles + (of - biases);
        }
        *target = __ldcg(source);
    }
}

// Leaves the heads of a run in `fetched` as attention wants them, and the new key and value, where
// the run has them, in the cache.
DEVICE void prepare(Fetched& fetched, float (&staged)[HEAD_DIM], const Step& step, const Run& run) {
    const int lane = threadIdx.x % 32, key = run.kv_len - 1;
    const int heads = GROUP + (run.end == units_of(run.kv_len) ? 2 : 0);
    const int* blocks = step.block_table + (size_t)run.sequence * TABLE_STRIDE;
    const int block = __ldcg(blocks + key / BLOCK_SIZE);  // now: beside the other loads
    fetch(fetched, step, run, heads);
    __syncthreads();
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < heads; row += WARPS) {
        const bool is_q = row < GROUP, is_v = row == GROUP + 1;
        T(&head)[HEAD_DIM] = fetched.heads[row];
        load_head(staged, lane, head, fetched.bias[0], row * HEAD_DIM, !is_v,
                  fetched.norms[NORM && !is_q], step.eps);
        store_head(head, staged, lane, fetched.angles, 0, is_v ? 0 : ROPE_DIM);
        __syncwarp();  // the head is complete, and the next may be staged
        if (is_q) continue;
        const size_t slot = (size_t)block * BLOCK_SIZE + key % BLOCK_SIZE;
        T* cache = is_v ? step.value_cache : step.key_cache;
        uint4* target = (uint4*)(cache + (slot * KV_HEADS + run.head) * HEAD_DIM);
        for (int i = lane; i < CHUNKS; i += 32) target[i] = load_chunk(head, i);
    }
    __syncthreads();
}

// Attends to this warp's units of a run.
DEVICE void attend_units(State& state, Ring& ring, const Fetched& fetched, const Step& step,
                         const Run& run) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int kv_len = run.kv_len, units = units_of(kv_len);
    const T* low = fetched.heads[min(g, GROUP - 1)];
    const T* high = fetched.heads[min(g + 8, GROUP - 1)];
    QueryChunk kept[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) kept[s] = query_chunk(low, high, s);
    auto query = [&](int s) { return KEEP_QUERIES ? kept[s] : query_chunk(low, high, s); };
    auto scaled = [&](float x) {
#if CAP
        return step.soft_cap * tanhf(x * step.scale / step.soft_cap) * LOG2_E;
#else
        return x * (step.scale * LOG2_E);
#endif
    };
    const int first = WINDOW > 0 ? max(0, kv_len - WINDOW) : 0;
    for (int unit = run.begin + threadIdx.x / 32; unit < run.end; unit += WARPS) {
        char* slot = ring.wait();
        const bool is_last = unit == units - 1;
        const int row = (kv_len - 1) % UNIT;  // of the new token, in the last
        if (is_last) {
            add_row(slot, row, fetched.heads[GROUP]);
            __syncwarp();
        }
        auto chunk_at = [&](int row, int chunk) {
            return chunk < CHUNKS ? *(const uint4*)(slot + place_of(row, chunk))
                                  : make_uint4(0, 0, 0, 0);
        };
        auto keys = [&](int j, int s) { return chunk_at(8 * j + g, 4 * s + t); };
        auto values = [&](int j, int h) {
            return chunk_at(2 * t + j % 2 + j / 2 * 8, 8 * h + g);
        };
        auto between = [&] {
            __syncwarp();
            ring.fill(STAGES % 2);
            slot = ring.wait();
            if (is_last) add_values(slot, row, fetched.heads[GROUP + 1]);
        };
        const int base = (skipped(kv_len) + unit) * UNIT;
        attend(state, query, keys, values, base, first, kv_len, scaled, between);
        __syncwarp();
        ring.fill(STAGES % 2 == 0);
    }
}

// What a warp has of each row, behind `finish_totals`.
DEVICE void write_parts(float (*parts)[PART_ROW], const State& state) {
    auto store = [&](int row, int d, const float4& x) {
        if (row < GROUP) *(float4*)(parts[row] + d) = x;
    };
    each_sum(state, store, [&](int row, float largest, float total) {
        if (row < GROUP) parts[row][HEAD_DIM] = largest, parts[row][HEAD_DIM + 1] = total;
    });
}

// Joins the warps' `parts` of a run, and with them, where the pair has more than one part, those of
// other blocks, once the last has come.
DEVICE void finish(const float (&parts)[WARPS][GROUP][PART_ROW], const Division& division,
                   const Step& step, const Run& run) {
    __shared__ int arrived;
    const int warp = threadIdx.x / 32, units = units_of(run.kv_len), head = run.head * GROUP;
    const bool whole = run.begin == 0 && run.end == units;
    float* mine = step.partial + (blockIdx.x * 2 + (run.begin == 0)) * PART;
    T* out = step.out + ((size_t)run.sequence * HEADS + head) * HEAD_DIM;
#pragma unroll 1
    for (int row = warp; row < GROUP; row += WARPS) {
        auto part = [&](int w, int e) { return *(const float4*)&parts[w][row][e]; };
        const Joined joined = join<WARPS>(part, WARPS);
        if (whole) joined.store(out + row * HEAD_DIM, step.sinks, head + row);
        else joined.store_part(mine + row * PART_ROW);
    }
    if (whole) return;
    const int place = run.place(division);
    const int from = place / division.share;  // the first block that has a part
    const int count = (place + units - 1) / division.share - from + 1;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(step.counters + from, 1);
        if (arrived == count - 1) step.counters[from] = 0;
    }
    __syncthreads();
    if (arrived != count - 1) return;
    __threadfence();
#pragma unroll 1
    for (int row = warp; row < GROUP; row += WARPS) {
        const float* first = step.partial + from * 2 * PART + row * PART_ROW;
        auto part = [&](int p, int e) {
            return __ldcg((const float4*)(first + (p * 2 + (p == 0)) * PART + e));
        };
        join<8>(part, count).store(out + row * HEAD_DIM, step.sinks, head + row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
decode_attention(T* out, T* key_cache, T* value_cache, const T* q, const T* k, const T* v,
                 const T* bias, const T* q_weight, const T* k_weight, const float* table,
                 const T* sinks, const int* kv_lens, const int* block_table, const int* plan,
                 float* partial, int* counters, int sequences, int q_stride, int k_stride,
                 int v_stride, float eps, float scale, float soft_cap) {
    extern __shared__ __align__(128) char shared[];
    __shared__ __align__(16) float parts[WARPS][GROUP][PART_ROW];
    __shared__ Fetched fetched;
    __shared__ float staged[WARPS][HEAD_DIM];
    let_next_start();
    const int warp = threadIdx.x / 32;
    const int* own = plan + blockIdx.x * PLAN_INTS;
    const int4 where = __ldcg((const int4*)own), how = __ldcg((const int4*)own + 1);
    const int block = __ldcg(own + 8 + warp);
    if (where.x < 0) return;
    const Division division{how.y, how.z, how.w};
    Run run{where.x, where.y, where.z, 0, where.w, 0, 0};
    run.take(division, how.x);
    run.look_ahead(kv_lens, sequences);
    char* slots = shared + warp * STAGES * SLOT_BYTES;
    Ring ring{key_cache, value_cache, kv_lens, block_table,      slots, sequences,
              division,  run,         run.begin + warp, block, 0};
    if (ring.unit >= run.end) ring.settle();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) ring.fill(i % 2);
    const Step step{out,         key_cache, value_cache, q,        k,        v,        bias,
                    q_weight,    k_weight,  table,       sinks,    block_table, partial,
                    counters,    q_stride,  k_stride,    v_stride, eps,      scale,    soft_cap};
    fetch_norms(fetched, step);
    wait_for_previous();
    do {
        prepare(fetched, staged[warp], step, run);
        State state;
        begin(state);
        attend_units(state, ring, fetched, step, run);
        finish_totals(state);
        write_parts(parts[warp], state);
        __syncthreads();
        finish(parts, division, step, run);
    } while (run.next(division, kv_lens, sequences));
}
