// Attention of a step's tokens to the paged cache, on the tensor cores of compute capability 9.0, by
// warpgroups: for prompts and parts of prompts, and for the sequences of one new token among them.
//
// A block takes the items of a plan (attention_plan.cu) in turn, an item being neighbouring tokens of a
// sequence with all query heads of one kv head. Their rows (token, then head) are 64 of each of two
// warpgroups; with so many rows it does not matter which heads they are of, and few tokens with many
// heads fill them too. One more warp has the copy engine bring the queries and, through two rings that
// run ahead over the ends of items, tiles of keys and values, a page of the cache a copy. The products
// are q kᵀ, from shared memory, and weights values, of which the weights stay in the registers in which
// the first product leaves the scores. The next tile's q kᵀ is begun before this one's weights are
// multiplied, and its scores are weighted meanwhile.
//   HEAD_DIM: a multiple of 16, at most 256. GROUP: query heads a kv head, at most 64. HEADS,
//   KV_HEADS, BLOCK_SIZE, TABLE_STRIDE as in qkv.cu; BLOCK_SIZE is a multiple of 8 that divides KEYS,
//   or that KEYS divides. WINDOW: positions attended to, 0 for all. CAP: scores are capped, soft_cap
//   tanh(score / soft_cap). KEYS: of a tile, a multiple of 16. KEY_STAGES, VALUE_STAGES: tiles of
//   each ring. QUERY_STAGES: items whose queries are there at once.
// q is a map of [tokens, HEADS, HEAD_DIM], keys and values of [slots, KV_HEADS, HEAD_DIM], see
// launch.py. Grid: one block a multiprocessor.
#include "common.cuh"
#include "attention_copies.cuh"
#define COLUMNS KEYS
#include "wgmma.cuh"
#include "wgmma_values.cuh"

#define THREADS (WARPS * 32 + 128)
#define LOG2_E 1.4426950408889634f

// A warpgroup's rows. A lane has of its warp's 16 rows two, g and g + 8 (g = lane / 4), and of each 8
// columns two; what it has of a product's 8 columns are four neighbours here.
struct Part {
    float sums[HEAD_DIM / 2];
    float largest[2], total[2];
};

DEVICE void begin(Part& part) {
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; i++) part.sums[i] = 0;
    part.largest[0] = part.largest[1] = -INFINITY;
    part.total[0] = part.total[1] = 0;
}

// scores = q kᵀ, begun.
DEVICE void begin_scores(float (&scores)[KEYS / 2], u64 q, u64 k) {
#pragma unroll
    for (int s = 0; s < HEAD_DIM / 16; s++)  // 16 elements, 32 bytes, at a time
        begin_product(scores, q + s / 4 * (64 * 8) + s % 4 * 2, k + s / 4 * (KEYS * 8) + s % 4 * 2,
                      s > 0);
}

// sums += weights values, begun.
DEVICE void begin_sums(float (&sums)[HEAD_DIM / 2], u32 (&weights)[KEYS / 4], u64 values) {
#pragma unroll
    for (int s = 0; s < KEYS / 16; s++)
        begin_product_of(sums, weights, s, values + s * (16 * 8));
}

// The scores of keys that a row does not see become minus infinity. last: the rows' own positions.
DEVICE void hide(float (&scores)[KEYS / 2], int base, const int (&last)[2]) {
    const int first = base + threadIdx.x % 4 * 2;
#pragma unroll
    for (int i = 0; i < KEYS / 2; i++) {
        const int key = first + i / 4 * 8 + i % 2, own = last[i / 2 % 2];
        const bool visible = key <= own && (WINDOW == 0 || key > own - WINDOW);
        if (!visible) scores[i] = -INFINITY;
    }
}

#if CAP
DEVICE float capped(float x, float scale, float soft_cap) {
    const float e = power_of_2(x * (scale / soft_cap * 2 * LOG2_E));
    return soft_cap * LOG2_E * (1 - __fdividef(2, 1 + e));
}
#endif

// Scores become weights. keep: what the sums so far then count with. factor: a score times this is the
// exponent of 2.
DEVICE void weigh(float (&scores)[KEYS / 2], Part& part, float (&keep)[2], float factor) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float bound = part.largest[i];
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++)
            bound = fmaxf(bound, fmaxf(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]));
        bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, 1));
        bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, 2));
        // Within a window a row may see no key of the first tiles.
        const float shift = WINDOW > 0 && bound == -INFINITY ? 0.0f : bound * factor;
        keep[i] = power_of_2(part.largest[i] * factor - shift);
        part.largest[i] = bound;
        float added = 0;
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float& x = scores[4 * j + 2 * i + e];
                x = power_of_2(x * factor - shift);
                added += x;
            }
        }
        part.total[i] = part.total[i] * keep[i] + added;
    }
}

DEVICE void pack(u32 (&weights)[KEYS / 4], const float (&scores)[KEYS / 2]) {
#pragma unroll
    for (int i = 0; i < KEYS / 4; i++) weights[i] = packed(scores[2 * i], scores[2 * i + 1]);
}

// Zeros in place of the values behind a sequence's last: what is there may be no number, which a
// weight of zero does not take away.
DEVICE void clear(char* tile, int from) {
    const int thread = threadIdx.x % 128;
#pragma unroll 1
    for (int i = from * 8 + thread; i < KEYS * 8; i += 128) {
#pragma unroll
        for (int h = 0; h < HALVES; h++)
            *(uint4*)(tile + h * KEYS * 128 + i * 16) = make_uint4(0, 0, 0, 0);
    }
    stores_before_products();
    threads_meet(1 + threadIdx.x / 128, 128);
}

// What a lane has of four blocks of 8 columns, a word of each, to all words of one of them.
DEVICE uint4 block_of_four(u32 (&words)[4]) {
    const bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    auto trade = [&](u32& low, u32& high, bool higher, int bit) {
        const u32 came = __shfl_xor_sync(FULL_WARP, higher ? low : high, bit);
        if (higher) low = came;
        else high = came;
    };
    trade(words[0], words[2], upper, 2), trade(words[1], words[3], upper, 2);
    trade(words[0], words[1], odd, 1), trade(words[2], words[3], odd, 1);
    return make_uint4(words[0], words[1], words[2], words[3]);
}

// Stores the rows of a warpgroup. rows: where this lane's two are, or null.
DEVICE void store(Part& part, T* const (&rows)[2]) {
    const int t = threadIdx.x % 4;
    const int blocks = HEAD_DIM / 8, together = blocks / 4 * 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        float total = part.total[i];
        total += __shfl_xor_sync(FULL_WARP, total, 1);
        total += __shfl_xor_sync(FULL_WARP, total, 2);
        const float scale = 1.0f / total;
        auto pair = [&](int block) {
            const float* own = part.sums + 4 * block + 2 * i;
            return packed(own[0] * scale, own[1] * scale);
        };
#pragma unroll
        for (int b = 0; b < together; b += 4) {
            u32 words[4] = {pair(b), pair(b + 1), pair(b + 2), pair(b + 3)};
            const uint4 block = block_of_four(words);
            if (rows[i]) *(uint4*)(rows[i] + (b + t) * 8) = block;
        }
#pragma unroll
        for (int b = together; b < blocks; b++)
            if (rows[i]) *(u32*)(rows[i] + b * 8 + t * 2) = pair(b);
    }
}

struct Scale {
    float scale, soft_cap;

    // Of scores as `ready` leaves them.
    DEVICE float factor() const { return CAP ? 1.0f : scale * LOG2_E; }
    DEVICE void ready(float (&scores)[KEYS / 2]) const {
#if CAP
#pragma unroll
        for (int i = 0; i < KEYS / 2; i++) scores[i] = capped(scores[i], scale, soft_cap);
#endif
    }
};

// The warpgroups begin products by turns, a turn a tile, so that one multiplies while the other weighs.
DEVICE void take_turn() { threads_meet(3 + threadIdx.x / 128, GROUPS * 128); }
DEVICE void give_turn() { threads_arrive(4 - threadIdx.x / 128, GROUPS * 128); }

// What a warpgroup does for an item of which it has tokens.
struct Attending {
    Item own;  // the warpgroup's tokens
    int last[2];
    Scale scale;
    u64 q;

    DEVICE void weigh_tile(float (&scores)[KEYS / 2], Part& part, float (&keep)[2], int tile) const {
        const int base = tile * KEYS;
        scale.ready(scores);
        // Of the first token the last key, of the last one the first.
        const bool late = base + KEYS - 1 > own.position;
        const bool early = WINDOW > 0 && base <= own.position + own.count() - 1 - WINDOW;
        if (late || early) hide(scores, base, last);
        weigh(scores, part, keep, scale.factor());
    }
    DEVICE void attend(Part& part, Rings& rings) const {
        auto& keys = rings.keys;
        auto& values = rings.values;
        float scores[KEYS / 2], keep[2];
        u32 weights[KEYS / 4];
        int tile = own.begin();
        const int end = own.end();
        begin(part);
        keys.wait_full();
        take_turn();
        products_begin();
        begin_scores(scores, q, factor(shared_address(keys.tile())));
        products_commit();
        give_turn();
        products_wait<0>();
        keys.release();
        sums_ready(scores);
        weigh_tile(scores, part, keep, tile);
        pack(weights, scores);
#pragma unroll 1
        for (tile++; tile < end; tile++) {
            values.wait_full();
            keys.wait_full();
            take_turn();
            sums_ready(scores), sums_ready(part.sums), sums_ready(weights);
            products_begin();
            begin_scores(scores, q, factor(shared_address(keys.tile())));
            products_commit();
            begin_sums(part.sums, weights, value_factor(shared_address(values.tile()), KEYS * 128));
            products_commit();
            give_turn();
            products_wait<1>();
            keys.release();
            sums_ready(scores);
            weigh_tile(scores, part, keep, tile);
            products_wait<0>();
            values.release();
            sums_ready(part.sums);
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) part.sums[i] *= keep[i / 2 % 2];
            pack(weights, scores);
        }
        rings.queries.release();
        values.wait_full();
        if (end * KEYS > own.kv_len()) clear(values.tile(), own.kv_len() - (end - 1) * KEYS);
        sums_ready(part.sums), sums_ready(weights);
        products_begin();
        begin_sums(part.sums, weights, value_factor(shared_address(values.tile()), KEYS * 128));
        products_commit();
        products_wait<0>();
        values.release();
        sums_ready(part.sums);
    }
};

// Tiles that another warpgroup has and this one not.
DEVICE void pass(Rings& rings, int tiles) {
#pragma unroll 1
    for (int i = 0; i < tiles; i++) {
        take_turn();
        give_turn();
        rings.keys.wait_full();
        rings.keys.release();
        rings.values.wait_full();
        rings.values.release();
    }
}

// By a warpgroup.
DEVICE void attend_all(Rings rings, const int4* plan, T* out, Scale scale) {
    const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
    const int row = threadIdx.x / 32 % 4 * 16 + lane / 4;
    auto& queries = rings.queries;
    if (group == 1) give_turn();
#pragma unroll 1
    for (Turns turns(plan); turns.left(); turns.round++) {
        if (!turns.mine()) continue;
        queries.wait_full();
        const int4* const about = rings.items[queries.slot];
        const Item item(about[0]);
        const int head = about[1].x * GROUP;
        const Item own = item.from(group * TOKENS, TOKENS);
        if (own.tokens <= 0) {
            queries.release();
            pass(rings, item.end() - item.begin());
            continue;
        }
        pass(rings, own.begin() - item.begin());
        Attending attending{own, {}, scale,
                            factor(shared_address(queries.tile()) + group * QUERY_BYTES)};
        T* rows[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = (row + 8 * i) / GROUP;
            attending.last[i] = own.position + min(at, own.count() - 1);
            rows[i] = at < own.count()
                          ? out + ((size_t)(own.token + at) * HEADS + head + (row + 8 * i) % GROUP) *
                                      HEAD_DIM
                          : nullptr;
        }
        Part part;
        attending.attend(part, rings);
        pass(rings, item.end() - own.end());
        store(part, rows);
    }
    if (group == 0) take_turn();  // so that as many are taken as given
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
wide_attention(T* out, const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap keys,
               const __grid_constant__ TensorMap values, const int* plan, const int* block_table,
               float scale, float soft_cap) {
    extern __shared__ char unaligned[];
    __shared__ u64 barriers[2 * (KEY_STAGES + VALUE_STAGES + QUERY_STAGES)];
    __shared__ int4 items[QUERY_STAGES][2];
    let_next_start();
    // The swizzle pattern starts anew every 1024 bytes of shared memory.
    const Rings rings(unaligned + (-shared_address(unaligned) & 1023), barriers, items);
    if (threadIdx.x == 0)
        rings.keys.init(WARPS), rings.values.init(WARPS), rings.queries.init(WARPS);
    barriers_ready();
    __syncthreads();
    wait_for_previous();
    // Registers a lane: all have 168 at first.
    if (threadIdx.x / 32 >= WARPS) {
        give_registers<40>();
        if (threadIdx.x / 32 == WARPS)
            copy_all(rings, (const int4*)plan, block_table, &q, &keys, &values);
    } else {
        take_registers<232>();
        attend_all(rings, (const int4*)plan, out, {scale, soft_cap});
    }
}
