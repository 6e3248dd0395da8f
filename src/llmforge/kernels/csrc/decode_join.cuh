// Parts of attention's rows joined, for decode_attention.cu: HEAD_DIM, SINKS as there. Of each row a
// part has PART_ROW floats: the weighted sum of its keys, the largest score, the total weight.
#pragma once

#define PART_ROW (HEAD_DIM + 4)  // rows begin at multiples of 16 bytes
#define QUADS ((HEAD_DIM / 4 + 31) / 32)  // of four elements of a row, that a lane has

// A row of a pair: its weighted sum, of which a lane has four elements from 4 (lane + 32 q) on.
struct Joined {
    float4 sum[QUADS];
    float largest, total;

    DEVICE void add(int q, float weight, const float4& x) {
        sum[q].x += weight * x.x, sum[q].y += weight * x.y;
        sum[q].z += weight * x.z, sum[q].w += weight * x.w;
    }
    // Calls `store(d, x)` for each four elements x of the row, from d on, as `by` of them.
    template <class Store>
    DEVICE void each(float by, Store store) const {
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            const int d = 4 * (threadIdx.x % 32 + 32 * q);
            const float4 x = sum[q];
            if (d < HEAD_DIM) store(d, make_float4(x.x * by, x.y * by, x.z * by, x.w * by));
        }
    }
    // The result, with the sink of the head.
    DEVICE void store(T* out, const T* sinks, int head) const {
        float by = 1 / total;
#if SINKS
        const float sink = to_float(sinks[head]) * LOG2_E, bound = fmaxf(largest, sink);
        const float keep = exp2f(largest - bound);
        by = keep / (total * keep + exp2f(sink - bound));
#endif
        each(by, [&](int d, const float4& x) {
            *(uint2*)(out + d) = make_uint2(packed(x.x, x.y), packed(x.z, x.w));
        });
    }
    DEVICE void store_part(float* part) const {
        each(1, [&](int d, const float4& x) { *(float4*)(part + d) = x; });
        if (threadIdx.x % 32 == 0)
            *(float4*)(part + HEAD_DIM) = make_float4(largest, total, 0, 0);
    }
};

// A row of `count` parts, by a warp: `part(i, e)` are the elements from e on of the i-th. One of them
// at least has a key in it. UNROLL: parts that are fetched at once.
template <int UNROLL, class Part>
DEVICE Joined join(Part part, int count) {
    const int lane = threadIdx.x % 32;
    Joined joined = {};
    joined.largest = -INFINITY;
#pragma unroll 1
    for (int base = 0; base < count; base += 32) {
        float4 own = make_float4(-INFINITY, 0, 0, 0);
        if (base + lane < count) own = part(base + lane, HEAD_DIM);
        float bound = fmaxf(joined.largest, own.x);
#pragma unroll
        for (int offset = 16; offset; offset >>= 1)
            bound = fmaxf(bound, __shfl_xor_sync(FULL_WARP, bound, offset));
        const float shift = bound == -INFINITY ? 0.0f : bound;
        const float keep = exp2f(joined.largest - shift), weight = exp2f(own.x - shift);
        joined.largest = bound;
        joined.total = joined.total * keep + warp_sum(weight * own.y);
#pragma unroll
        for (int q = 0; q < QUADS; q++) {
            float4& sum = joined.sum[q];
            sum.x *= keep, sum.y *= keep, sum.z *= keep, sum.w *= keep;
        }
#pragma unroll UNROLL
        for (int i = base; i < min(count, base + 32); i++) {
            const float by = __shfl_sync(FULL_WARP, weight, i - base);
#pragma unroll
            for (int q = 0; q < QUADS; q++) {
                const int d = 4 * (lane + 32 * q);
                if (d < HEAD_DIM) joined.add(q, by, part(i, d));
            }
        }
    }
    return joined;
}
