// Mixtures of experts for many tokens: (token, choice) pairs are sorted by expert, and each expert
// multiplies its own rows, in tiles of 64 rows.
//   `sort_pairs`: one block. order [pairs]: pairs by expert; tiles [1 + 3 * most]: how many tiles, then
//   of each its expert and its run of `order`. Pairs of experts that are not held are in none.
//   `up_tiles`: activated [pairs, INNER], at the place of each pair in `order`.
//   `down_tiles`: products [pairs, HIDDEN], at each pair itself, rounded.
//   `weigh_pairs`: out[token] = the weighted sum over its choices, in their order.
//   FIRST, COUNT: the experts that are held. COLUMNS of the products that a block of the tile kernels
//   computes; grid: (tiles at most, columns / COLUMNS). Float32 multiplies without the tensor cores.
#include "common.cuh"
#include "activation.cuh"
#include "expert.cuh"

#define ROWS 64
#define DEPTH 32    // elements of the inner dimension at a time
#define STRIDE 40   // of a row of a tile in shared memory: no bank twice
#define THREADS 256 // a warp: 16 rows by half of the columns

extern "C" __global__ void __launch_bounds__(1024)
sort_pairs(int* order, int* tiles, const int* ids, int tokens) {
    __shared__ int counts[COUNT], starts[COUNT], firsts[COUNT];
    let_next_start();
    for (int e = threadIdx.x; e < COUNT; e += blockDim.x) counts[e] = 0;
    __syncthreads();
    wait_for_previous();
    const int pairs = tokens * TOP_K;
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        const int expert = ids[p] - FIRST;
        if (expert >= 0 && expert < COUNT) atomicAdd(&counts[expert], 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        int start = 0, tile = 0;
        for (int e = 0; e < COUNT; e++) {
            starts[e] = start, firsts[e] = tile;
            start += counts[e], tile += (counts[e] + ROWS - 1) / ROWS;
        }
        tiles[0] = tile;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < COUNT; e += blockDim.x) {
        for (int row = 0, tile = firsts[e]; row < counts[e]; row += ROWS, tile++) {
            tiles[1 + 3 * tile] = e;
            tiles[2 + 3 * tile] = starts[e] + row;
            tiles[3 + 3 * tile] = min(ROWS, counts[e] - row);
        }
    }
    __syncthreads();
    // Rows of a tile are computed alike, so their order within an expert changes nothing.
    for (int p = threadIdx.x; p < pairs; p += blockDim.x) {
        const int expert = ids[p] - FIRST;
        if (expert >= 0 && expert < COUNT) order[atomicAdd(&starts[expert], 1)] = p;
    }
}

struct TileOf {
    int expert, start, rows;
};
DEVICE bool tile_of(const int* tiles, TileOf& tile) {
    if ((int)blockIdx.x >= tiles[0]) return false;
    const int* entry = tiles + 1 + 3 * blockIdx.x;
    tile = {entry[0], entry[1], entry[2]};
    return true;
}

// A tile's products, 4 columns (2 x n8 with two rows) a lane for each of NB blocks of 8 columns:
// rows g and g + 8 of the warp's 16, columns 2t and 2t + 1 of each block.
template <int NB>
struct Sums {
    float v[NB][4];
};

// `row_of(r)` and `column_of(c)` give the row's and the column's SIZE elements in global memory; a warp
// multiplies 16 of 64 rows by NB * 8 of NB * 16 columns.
template <int SIZE, int NB, class RowOf, class ColumnOf>
DEVICE void multiply(Sums<NB>& sums, RowOf row_of, ColumnOf column_of) {
    __shared__ alignas(16) T left[ROWS][STRIDE], right[NB * 16][STRIDE];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int row = warp % 4 * 16, column = warp / 4 * NB * 8;
    for (int k = 0; k < SIZE; k += DEPTH) {
        __syncthreads();
        for (int i = threadIdx.x; i < (ROWS + NB * 16) * (DEPTH / WIDTH); i += THREADS) {
            const int line = i / (DEPTH / WIDTH), at = i % (DEPTH / WIDTH) * WIDTH;
            const T* source = line < ROWS ? row_of(line) : column_of(line - ROWS);
            T* target = line < ROWS ? left[line] : right[line - ROWS];
            Pack<WIDTH> value;
#pragma unroll
            for (int j = 0; j < WIDTH; j++) value.v[j] = from_float(0.0f);
            if (source && k + at < SIZE) value = *(const Pack<WIDTH>*)(source + k + at);
            *(Pack<WIDTH>*)(target + at) = value;
        }
        __syncthreads();
#if defined(MMA_TYPE)
#pragma unroll
        for (int s = 0; s < DEPTH; s += 16) {
            u32 a[4];
#pragma unroll
            for (int i = 0; i < 4; i++)
                a[i] = *(const u32*)&left[row + g + i % 2 * 8][s + 2 * t + i / 2 * 8];
#pragma unroll
            for (int n = 0; n < NB; n++) {
                const T* b = &right[column + n * 8 + g][s + 2 * t];
                mma(sums.v[n], a[0], a[1], a[2], a[3], *(const u32*)b, *(const u32*)(b + 8));
            }
        }
#else
        for (int s = 0; s < DEPTH; s++) {
#pragma unroll
            for (int n = 0; n < NB; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++)
                    sums.v[n][i] += left[row + g + i / 2 * 8][s] *
                                    right[column + n * 8 + 2 * t + i % 2][s];
            }
        }
#endif
    }
}

// Calls `store(row of the tile, column of the block, index into Sums)` for each of the lane's results.
template <int NB, class Store>
DEVICE void each_result(Store store) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int n = 0; n < NB; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++)
            store(warp % 4 * 16 + g + i / 2 * 8, warp / 4 * NB * 8 + n * 8 + 2 * t + i % 2, n, i);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
up_tiles(T* activated, const T* x, const int* order, const int* tiles, const T* gate_up,
         const T* bias, int x_stride, float alpha, float limit) {
    let_next_start();
    wait_for_previous();
    TileOf tile;
    if (!tile_of(tiles, tile)) return;
    const int first = blockIdx.y * COLUMNS;
    const T* weights = gate_up + (size_t)tile.expert * 2 * INNER * HIDDEN;
    // Of each 16 columns that a pair of warps has, 8 are gates and 8 the ups to them; so a lane's
    // blocks n and n + 1 are a gate and its up.
    auto row_of = [&](int r) -> const T* {
        if (r >= tile.rows) return nullptr;
        return x + (size_t)(order[tile.start + r] / TOP_K) * x_stride;
    };
    auto column_of = [&](int c) -> const T* {
        const int inner = first + c / 16 * 8 + c % 8;
        if (inner >= INNER) return nullptr;
        return weights + ((size_t)inner + (c / 8 % 2 ? INNER : 0)) * HIDDEN;
    };
    constexpr int NB = COLUMNS / 8;
    Sums<NB> sums = {};
    multiply<HIDDEN, NB>(sums, row_of, column_of);
    each_result<NB>([&](int r, int c, int n, int i) {
        const int inner = first + c / 16 * 8 + c % 8;
        if (n % 2 || r >= tile.rows || inner >= INNER) return;
        float gate = sums.v[n][i], up = sums.v[n + 1 < NB ? n + 1 : n][i];
#if UP_BIAS
        const size_t at = (size_t)tile.expert * 2 * INNER + inner;
        gate += to_float(bias[at]), up += to_float(bias[at + INNER]);
#endif
        activated[(size_t)(tile.start + r) * INNER + inner] =
            expert_activation(rounded(gate), rounded(up), alpha, limit);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
down_tiles(T* products, const T* activated, const int* order, const int* tiles, const T* down,
           const T* bias) {
    let_next_start();
    wait_for_previous();
    TileOf tile;
    if (!tile_of(tiles, tile)) return;
    const int first = blockIdx.y * COLUMNS;
    auto row_of = [&](int r) -> const T* {
        return r < tile.rows ? activated + (size_t)(tile.start + r) * INNER : nullptr;
    };
    auto column_of = [&](int c) -> const T* {
        if (first + c >= HIDDEN) return nullptr;
        return down + ((size_t)tile.expert * HIDDEN + first + c) * INNER;
    };
    constexpr int NB = COLUMNS / 16;
    Sums<NB> sums = {};
    multiply<INNER, NB>(sums, row_of, column_of);
    each_result<NB>([&](int r, int c, int n, int i) {
        if (r >= tile.rows || first + c >= HIDDEN) return;
        float product = sums.v[n][i];
#if DOWN_BIAS
        product += to_float(bias[(size_t)tile.expert * HIDDEN + first + c]);
#endif
        products[(size_t)order[tile.start + r] * HIDDEN + first + c] = from_float(product);
    });
}

extern "C" __global__ void __launch_bounds__(256)
weigh_pairs(T* out, const T* products, const int* ids, const float* weights) {
    let_next_start();
    const size_t token = blockIdx.x;
    const int column = blockIdx.y * 256 + threadIdx.x;
    wait_for_previous();
    if (column >= HIDDEN) return;
    float total = 0;
    for (int choice = 0; choice < TOP_K; choice++) {
        const size_t pair = token * TOP_K + choice;
        const int expert = ids[pair] - FIRST;
        if (expert < 0 || expert >= COUNT) continue;
        total += weights[pair] * to_float(products[pair * HIDDEN + column]);
    }
    out[token * HIDDEN + column] = from_float(total);
}
