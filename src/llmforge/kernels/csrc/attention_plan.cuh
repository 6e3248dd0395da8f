// The items of work that wide_attention.cu divides among its blocks: attention_plan.cu lists them, once
// a step.
//   GROUP, WINDOW, KEYS: as wide_attention.cu has them.
#pragma once

#define TOKENS (64 / GROUP)  // of a warpgroup: their query heads of a kv head are its rows
#define ITEM_TOKENS (2 * TOKENS)

// Neighbouring new tokens of a sequence.
struct Item {
    int sequence;
    int token;     // the first, of the step's
    int tokens;    // from that one to the end of the sequence
    int position;  // of the first

    DEVICE Item(int sequence, int token, int tokens, int position, int most = ITEM_TOKENS)
        : sequence(sequence), token(token), tokens(tokens), position(position), most(most) {}
    DEVICE explicit Item(int4 x) : Item(x.x, x.y, x.z, x.w) {}

    // Those that it has.
    DEVICE int count() const { return min(tokens, most); }
    // At most so many of its tokens, from one on.
    DEVICE Item from(int first, int many) const {
        return Item(sequence, token + first, tokens - first, position + first, many);
    }
    DEVICE int kv_len() const { return position + tokens; }
    // The tiles of keys that its tokens see.
    DEVICE int begin() const { return WINDOW > 0 ? max(0, position - WINDOW + 1) / KEYS : 0; }
    DEVICE int end() const { return (position + count() + KEYS - 1) / KEYS; }

private:
    int most;
};
