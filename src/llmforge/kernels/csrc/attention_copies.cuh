// What the blocks of wide_attention.cu have in shared memory, and the warp that fills it.
//   HEAD_DIM, GROUP, KV_HEADS, BLOCK_SIZE, TABLE_STRIDE, KEYS and the STAGES as there.
#pragma once
#include "attention_plan.cuh"
#include "ring.cuh"

#define GROUPS 2  // of 4 warps that multiply; of one more a warp copies
#define WARPS (GROUPS * 4)
#define HALVES ((HEAD_DIM + 63) / 64)      // of 64 elements, each with all rows of a tile
#define TILE_BYTES (HALVES * KEYS * 128)   // of keys, or of values
#define QUERY_BYTES (HALVES * 64 * 128)    // of a warpgroup
#define PAGE (BLOCK_SIZE < KEYS ? BLOCK_SIZE : KEYS)  // rows of a copy
#define PAGES (KEYS / PAGE)

// What a block has in shared memory. With the queries is which item they are of, and its kv head.
struct Rings {
    Ring<KEY_STAGES, TILE_BYTES> keys;
    Ring<VALUE_STAGES, TILE_BYTES> values;
    Ring<QUERY_STAGES, GROUPS * QUERY_BYTES> queries;
    int4 (*items)[2];

    DEVICE Rings(char* slots, u64* barriers, int4 (*items)[2])
        : keys{slots, barriers, barriers + KEY_STAGES},
          values{slots + KEY_STAGES * TILE_BYTES, keys.empty + KEY_STAGES,
                 keys.empty + KEY_STAGES + VALUE_STAGES},
          queries{values.slots + VALUE_STAGES * TILE_BYTES, values.empty + VALUE_STAGES,
                  values.empty + VALUE_STAGES + QUERY_STAGES},
          items(items) {}
};

// The items of this block: the plan has those with most keys first, which go to the blocks in turn, to
// and fro, so that all have about the same. Every other block begins with its last, so that while some
// wait for the keys of sequences of one new token, others multiply.
struct Turns {
    const int4* plan;
    int items, round = 0;

    DEVICE explicit Turns(const int4* plan) : plan(plan) { items = __ldcg(&plan->x) * KV_HEADS; }
    DEVICE int rounds() const { return (items + gridDim.x - 1) / gridDim.x; }
    DEVICE bool left() const { return round < rounds(); }
    DEVICE int index() const {
        const int own = blockIdx.x % 2 ? rounds() - 1 - round : round;
        const int place = own % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        return own * gridDim.x + place;
    }
    DEVICE bool mine() const { return index() < items; }
    DEVICE int4 item() const { return __ldcg(plan + 1 + index() / KV_HEADS); }
    DEVICE int head() const { return index() % KV_HEADS; }
};

// Fills the next tile of a ring with the keys or values of pages, of which this lane copies its own.
template <class Tiles>
DEVICE void copy_tile(Tiles& ring, const TensorMap* map, bool wanted, int row, int head) {
    const int lane = threadIdx.x % 32, pages = __popc(__ballot_sync(FULL_WARP, wanted));
    u64* const full = ring.full + ring.slot;
    ring.wait_empty();
    if (lane == 0) barrier_expect(full, pages * PAGE * HALVES * 128);
    __syncwarp();
    if (wanted) {
#pragma unroll
        for (int h = 0; h < HALVES; h++)
            copy_box(ring.tile() + (h * KEYS + lane * PAGE) * 128, map, 64 * h, head, row, 0, full);
    }
    ring.next();
}

DEVICE void copy_queries(Rings& rings, const TensorMap* map, const Item& item, int head) {
    auto& ring = rings.queries;
    u64* const full = ring.full + ring.slot;
    ring.wait_empty();
    __syncwarp();  // none still waits when the barrier's next phase ends
    if (threadIdx.x % 32 == 0) {
        int4* const about = rings.items[ring.slot];
        about[0] = make_int4(item.sequence, item.token, item.tokens, item.position);
        about[1].x = head;
        barrier_expect(full, GROUPS * HALVES * TOKENS * GROUP * 128);
        for (int i = 0; i < GROUPS * HALVES; i++)
            copy_box(ring.tile() + i * 64 * 128, map, i % HALVES * 64, head * GROUP,
                     item.token + i / HALVES * TOKENS, 0, full);
    }
    ring.next();
}

// By one warp: keeps the rings full.
DEVICE void copy_all(Rings rings, const int4* plan, const int* block_table, const TensorMap* q,
                     const TensorMap* keys, const TensorMap* values) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (Turns turns(plan); turns.left(); turns.round++) {
        if (!turns.mine()) continue;
        const Item item(turns.item());
        const int head = turns.head(), end = item.end();
        const int* const blocks = block_table + (size_t)item.sequence * TABLE_STRIDE;
        // Of the tile's page that this lane copies, the row of the cache; or none.
        auto row_of = [&](int tile) {
            const int key = tile * KEYS + lane * PAGE;
            if (lane >= PAGES || tile == end || key >= item.kv_len()) return -1;
            return __ldcg(blocks + key / BLOCK_SIZE) * BLOCK_SIZE + key % BLOCK_SIZE;
        };
        copy_queries(rings, q, item, head);
        int row = row_of(item.begin());
#pragma unroll 1
        for (int tile = item.begin(); tile < end; tile++) {
            const int next_row = row_of(tile + 1);
            copy_tile(rings.keys, keys, row >= 0, row, head);
            copy_tile(rings.values, values, row >= 0, row, head);
            row = next_row;
        }
    }
}
