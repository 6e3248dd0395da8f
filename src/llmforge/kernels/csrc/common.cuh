// What every kernel shares: the element type T (chosen by -D DTYPE_BFLOAT16, DTYPE_FLOAT16 or
// DTYPE_FLOAT32), vector loads and reductions.
#pragma once

#if defined(DTYPE_BFLOAT16)
#include <cuda_bf16.h>
typedef __nv_bfloat16 T;
__device__ __forceinline__ float to_float(T x) { return __bfloat162float(x); }
__device__ __forceinline__ T from_float(float x) { return __float2bfloat16_rn(x); }
#define MMA_TYPE "bf16"
#elif defined(DTYPE_FLOAT16)
#include <cuda_fp16.h>
typedef __half T;
__device__ __forceinline__ float to_float(T x) { return __half2float(x); }
__device__ __forceinline__ T from_float(float x) { return __float2half_rn(x); }
#define MMA_TYPE "f16"
#elif defined(DTYPE_FLOAT32)
typedef float T;
__device__ __forceinline__ float to_float(T x) { return x; }
__device__ __forceinline__ T from_float(float x) { return x; }
#else
#error "define DTYPE_BFLOAT16, DTYPE_FLOAT16 or DTYPE_FLOAT32"
#endif

typedef unsigned int u32;
typedef unsigned long long u64;

#define FULL_WARP 0xffffffffu
#define INFINITY __int_as_float(0x7f800000)
#define DEVICE __device__ __forceinline__

#include "ptx.cuh"

// W neighbouring elements, moved by one load or store.
template <int W>
struct alignas(sizeof(T) * W) Pack {
    T v[W];
};

// x as it is after being stored as T.
DEVICE float rounded(float x) { return to_float(from_float(x)); }

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL_WARP, x, offset);
    return x;
}

// The sum over the block, on every thread. `scratch` has one float a warp.
DEVICE float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    const int warps = blockDim.x / 32;
    if (warps == 1) return x;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0;
    for (int i = 0; i < warps; i++) total += scratch[i];
    return total;
}

// The sequence that a packed token belongs to: the last i with query_starts[i] <= token.
DEVICE int sequence_of(const int* query_starts, int sequences, int token) {
    int low = 0, high = sequences - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (query_starts[middle] <= token) low = middle;
        else high = middle - 1;
    }
    return low;
}

#if defined(MMA_TYPE)
// Two floats rounded to T, the first in the low half.
DEVICE u32 packed(float low, float high) {
    Pack<2> pair{{from_float(low), from_float(high)}};
    return *reinterpret_cast<u32*>(&pair);
}
DEVICE float low_half(u32 x) { return to_float(reinterpret_cast<Pack<2>*>(&x)->v[0]); }
DEVICE float high_half(u32 x) { return to_float(reinterpret_cast<Pack<2>*>(&x)->v[1]); }

// Of 8 neighbouring elements: the sum of their squares, and RMSNorm by a scale and weights.
DEVICE float sum_of_squares(uint4 x) {
    float sum = 0;
    const u32 words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float low = low_half(words[j]), high = high_half(words[j]);
        sum += low * low + high * high;
    }
    return sum;
}
DEVICE uint4 normed(uint4 x, uint4 w, float scale) {
    auto pair = [scale](u32 value, u32 weight) {
        return packed(rounded(low_half(value) * scale) * low_half(weight),
                      rounded(high_half(value) * scale) * high_half(weight));
    };
    return make_uint4(pair(x.x, w.x), pair(x.y, w.y), pair(x.z, w.z), pair(x.w, w.w));
}
#endif
