// Attention of one new token a sequence over the paged cache, with what precedes it: bias, norm and
// rotation of the rows of a merged q|k|v product, and the write of the new key and value.
//   GROUP: query heads a kv head, at most 16. HEAD_DIM: a multiple of 8. BIAS, NORM, ROPE_DIM,
//   BLOCK_SIZE, TABLE_STRIDE, HEADS, KV_HEADS as in qkv.cu. WINDOW: positions attended to, 0 for all.
//   CAP: scores are capped, soft_cap tanh(score / soft_cap). SINKS: each head has one more key, whose
//   score is sinks[head] and whose value is zero. WARPS. STAGES: slots of each warp's ring.
//   JOIN_COST: decode_plan.cuh.
//
// The grid is as large as the GPU, whatever the step: decode_plan.cuh divides the keys. A warp takes
// every WARPS-th unit of 16 keys, through a ring of its own that runs ahead of the arithmetic, over
// the ends of pairs, and of the kernel: only the new token's key and value are not in the cache while
// the kernel before still runs. Blocks that have no keys end without waiting for it: others do.
// Rings are filled by copies of 16 bytes a lane: a row of a kv head has a few hundred bytes, and the
// lanes of a warp issue bulk copies of that size one after another.
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
    // The slot that is filled longest ago, and is the next to be filled.
    DEVICE char* wait() const {
        copy_async_wait<STAGES - 1>();
        __syncwarp();
        return slots + slot * SLOT_BYTES;
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

// The first `heads` of the heads of a run.
DEVICE void fetch(Fetched& fetched, const Step& step, const Run& run, int heads) {
    const size_t sequence = run.sequence;
    const int chunks = heads * CHUNKS, biases = BIAS ? chunks : 0;
#pragma unroll 2
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
        *target = *source;
    }
}

// Leaves the heads of a run in `fetched` as attention wants them, and the new key and value, where
// the run has them, in the cache at position `key`.
DEVICE void prepare(Fetched& fetched, float (&staged)[HEAD_DIM], const Step& step, const Run& run,
                    int key, bool has_new) {
    const int lane = threadIdx.x % 32, heads = GROUP + (has_new ? 2 : 0);
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
                         const Run& run, int kv_len) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, units = units_of(kv_len);
    const T* low = fetched.heads[min(g, GROUP - 1)];
    const T* high = fetched.heads[min(g + 8, GROUP - 1)];
    Rows kept[STEPS];
#pragma unroll
    for (int s = 0; s < STEPS; s++) kept[s] = chunk_of(low, high, s);
    // Beside the sums of long rows there are no registers left for the queries.
    auto query = [&](int s) { return HEAD_DIM > 128 ? chunk_of(low, high, s) : kept[s]; };
    auto scaled = [&](float x) {
#if CAP
        return step.soft_cap * tanhf(x * step.scale / step.soft_cap) * LOG2_E;
#else
        return x * (step.scale * LOG2_E);
#endif
    };
    const int first = WINDOW > 0 ? max(0, kv_len - WINDOW) : 0;
    const int last[2] = {kv_len - 1, kv_len - 1};
    for (int unit = run.begin + threadIdx.x / 32; unit < run.end; unit += WARPS) {
        char* slot = ring.wait();
        if (unit == units - 1)
            add_new(slot, (kv_len - 1) % UNIT, fetched.heads[GROUP], fetched.heads[GROUP + 1]);
        auto chunk_at = [&](const char* base, int row, int chunk) {
            return chunk < CHUNKS ? *(const uint4*)(base + place_of(row, chunk))
                                  : make_uint4(0, 0, 0, 0);
        };
        auto keys = [&](int j, int s) { return chunk_at(slot, 8 * j + g, 4 * s + t); };
        auto values = [&](int j, int h) {
            return chunk_at(slot + UNIT * ROW_BYTES, 2 * t + j % 2 + j / 2 * 8, 8 * h + g);
        };
        const int base = (skipped(kv_len) + unit) * UNIT;
        attend(state, query, keys, values, base, first, kv_len, last, scaled);
        __syncwarp();
        ring.fill();
    }
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

// Joins the warps' `parts` of a run, and with them, where the pair has more than one part, those of
// other blocks, once the last has come.
DEVICE void finish(const float (&parts)[WARPS][GROUP][HEAD_DIM + 2], const Plan& plan,
                   const Step& step, const Run& run, int units) {
    __shared__ int arrived;
    const int place = run.place(plan), from = place / plan.share;  // the first block with a part
    const int count = (place + units - 1) / plan.share - from + 1;
    float* mine = step.partial + (blockIdx.x * 2 + (run.begin == 0)) * PART;
    const int first_head = run.head * GROUP;
    T* out = step.out + ((size_t)run.sequence * HEADS + first_head) * HEAD_DIM;
#pragma unroll 1
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int row = i / HEAD_DIM, d = i % HEAD_DIM;
        const Joined joined = join([&](int w, int e) { return parts[w][row][e]; }, WARPS, d);
        if (count == 1) {
            out[i] = joined.value(step.sinks, first_head + row);
            continue;
        }
        float* part = mine + row * (HEAD_DIM + 2);
        part[d] = joined.sum;
        if (d == 0) part[HEAD_DIM] = joined.largest, part[HEAD_DIM + 1] = joined.total;
    }
    if (count == 1) return;
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
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const int row = i / HEAD_DIM;
        const float* first = step.partial + from * 2 * PART + row * (HEAD_DIM + 2);
        auto part = [&](int p, int e) { return __ldcg(first + (p * 2 + (p == 0)) * PART + e); };
        out[i] = join(part, count, i % HEAD_DIM).value(step.sinks, first_head + row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_attention(T* out, T* key_cache, T* value_cache, const T* q, const T* k, const T* v,
                 const T* bias, const T* q_weight, const T* k_weight, const float* table,
                 const T* sinks, const int* kv_lens, const int* block_table, float* partial,
                 int* counters, int sequences, int q_stride, int k_stride, int v_stride, float eps,
                 float scale, float soft_cap) {
    extern __shared__ __align__(128) char shared[];
    __shared__ float parts[WARPS][GROUP][HEAD_DIM + 2];
    __shared__ Fetched fetched;
    __shared__ float staged[WARPS][HEAD_DIM];
    let_next_start();
    const int warp = threadIdx.x / 32;
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
    const Step step{out,         key_cache, value_cache, q,        k,        v,        bias,
                    q_weight,    k_weight,  table,       sinks,    block_table, partial,
                    counters,    q_stride,  k_stride,    v_stride, eps,      scale,    soft_cap};
    fetch_norms(fetched, step);
    wait_for_previous();
    do {
        const int kv_len = plan.lens[run.sequence], units = units_of(kv_len);
        prepare(fetched, staged[warp], step, run, kv_len - 1, run.end == units);
        State state;
        begin(state);
        attend_units(state, ring, fetched, step, run, kv_len);
        finish_totals(state);
        write_parts(parts[warp], state);
        __syncthreads();
        finish(parts, plan, step, run, units);
    } while (run.next(plan, sequences));
}
