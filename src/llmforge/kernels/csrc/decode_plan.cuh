// How a grid of blocks divides the keys of a decode step's sequences: decode_plan.cu chooses, once a
// step, and decode_attention.cu goes by it in every layer.
//
// Keys are counted in units of 16. What is divided is a row of pairs (sequence, kv head), each of
// which takes the places of its sequence's units and of `pad` more, together rounded up to a
// multiple of `quantum`; every block has the next `share` places of the row.
//   WINDOW, KV_HEADS, WARPS: as decode_attention.cu has them.
#pragma once

#define UNIT 16
// Of a block, int32: 0 sequence, or -1 where the block has no keys; 1 head; 2 first unit; 3 length of
// the sequence; 4 what it has of its share from that unit on; 5 quantum; 6 pad; 7 share; 8 and
// following: for each warp the cache's block in which its first unit of that pair is.
#define PLAN_INTS (8 + (WARPS + 3) / 4 * 4)

DEVICE int up(int x, int y) { return (x + y - 1) / y; }
// Units that lie wholly before the window of a sequence's last token.
DEVICE int skipped(int kv_len) { return WINDOW > 0 ? max(0, kv_len - WINDOW) / UNIT : 0; }
DEVICE int units_of(int kv_len) { return up(kv_len, UNIT) - skipped(kv_len); }

struct Division {
    int quantum, pad, share;

    DEVICE int length(int units) const { return up(units + pad, quantum) * quantum; }
};

// A block's part of one pair: units [begin, end) of a kv head of a sequence, and then `rest` places
// of the block's share.
struct Run {
    int sequence, head, begin, end, kv_len, next_len, rest;

    // The pair's place in the row.
    DEVICE int place(const Division& division) const {
        return (blockIdx.x + 1) * division.share - rest - division.length(units_of(kv_len));
    }

    // Of this pair, what lies in the next `share` places from `begin` on.
    DEVICE void take(const Division& division, int share) {
        const int units = units_of(kv_len);
        end = min(units, begin + share);
        rest = share - (division.length(units) - begin);
    }
    // The length of the next sequence: asked for long before it is used.
    DEVICE void look_ahead(const int* kv_lens, int sequences) {
        next_len = __ldcg(kv_lens + min(sequence + 1, sequences - 1));
    }
    // The block's next run. False where there is none.
    DEVICE bool next(const Division& division, const int* kv_lens, int sequences) {
        if (rest <= 0) return false;
        if (++head == KV_HEADS) {
            head = 0;
            if (++sequence == sequences) return false;
            kv_len = next_len;
            look_ahead(kv_lens, sequences);
        }
        begin = 0;
        take(division, rest);
        return true;
    }
};
