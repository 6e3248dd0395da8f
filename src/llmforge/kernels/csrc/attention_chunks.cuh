// Rows of keys, values and queries in chunks of 8 elements, for attention on the tensor cores.
// HEAD_DIM is a multiple of 8.
//
// The product over k does not care in which order k is walked as long as both factors agree, so a
// lane's 8 neighbouring elements of a row, a chunk, serve as the two pairs of two products; the
// dimensions of P V are likewise permuted so that a lane's 8 dimensions of a value are in the same
// place of 8 products.
#pragma once

#define CHUNKS (HEAD_DIM / 8)
#define STEPS ((CHUNKS + 3) / 4)
#define HALVES ((CHUNKS + 7) / 8)
#define LOG2_E 1.4426950408889634f

DEVICE uint4 load_chunk(const T* row, int chunk) {
    return chunk < CHUNKS ? ((const uint4*)row)[chunk] : make_uint4(0, 0, 0, 0);
}

DEVICE u32 word(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
