// The experts of each token, all in float32. `router_logits`: x weightᵀ + bias, [tokens, EXPERTS]; a
// warp computes one expert for TOKENS tokens. Grid: (tokens / TOKENS, EXPERTS / WARPS).
// `choose`: ids and weights [tokens, TOP_K] from them, a warp a token; see model/ops.py, route.
//   SIGMOID: the scores, else softmax over all experts. GROUPS, KEPT_GROUPS, GROUP_TOP; NORMALIZE.
//   BIAS, CORRECTION: whether there is one. Grid: tokens / WARPS.
#include "common.cuh"

#define PER_LANE ((EXPERTS + 31) / 32)

extern "C" __global__ void __launch_bounds__(WARPS * 32)
router_logits(float* logits, const T* x, const T* weight, const T* bias, int tokens, int x_stride) {
    let_next_start();
    const int lane = threadIdx.x % 32, expert = blockIdx.y * WARPS + threadIdx.x / 32;
    const int first = blockIdx.x * TOKENS;
    wait_for_previous();
    if (expert >= EXPERTS) return;
    float sum[TOKENS] = {};
    for (int i = lane; i < HIDDEN; i += 32) {
        const float w = to_float(weight[(size_t)expert * HIDDEN + i]);
#pragma unroll
        for (int t = 0; t < TOKENS; t++)
            sum[t] += w * to_float(x[(size_t)min(first + t, tokens - 1) * x_stride + i]);
    }
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float total = warp_sum(sum[t]);
#if BIAS
        total += to_float(bias[expert]);
#endif
        if (lane == 0 && first + t < tokens) logits[(size_t)(first + t) * EXPERTS + expert] = total;
    }
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1)
        x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, offset));
    return x;
}

// The largest of the warp's values and, of equal ones, the lowest index; -1 where all are -infinity.
DEVICE int warp_best(float& value, int index) {
#pragma unroll
    for (int offset = 16; offset; offset >>= 1) {
        const float other = __shfl_xor_sync(FULL_WARP, value, offset);
        const int other_index = __shfl_xor_sync(FULL_WARP, index, offset);
        const bool better =
            other > value || (other == value && (u32)other_index < (u32)index);
        if (better) value = other, index = other_index;
    }
    return index;
}

// The same over those experts e of `choice` (expert k * 32 + lane at k) with low <= e < high.
DEVICE int best_of(const float (&choice)[PER_LANE], int low, int high, float& value) {
    int index = -1;
    value = -INFINITY;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const int expert = k * 32 + threadIdx.x % 32;
        if (expert >= low && expert < high && choice[k] > value) value = choice[k], index = expert;
    }
    return warp_best(value, index);
}

DEVICE void drop(float (&choice)[PER_LANE], int expert) {
#pragma unroll
    for (int k = 0; k < PER_LANE; k++)
        if (k * 32 + threadIdx.x % 32 == expert) choice[k] = -INFINITY;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32)
choose(int* ids, float* weights, const float* logits, const float* correction, int tokens,
       float scale) {
    let_next_start();
    const int lane = threadIdx.x % 32, token = blockIdx.x * WARPS + threadIdx.x / 32;
    wait_for_previous();
    if (token >= tokens) return;
    float score[PER_LANE], choice[PER_LANE], largest = -INFINITY, total = 0;
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const int expert = k * 32 + lane;
        score[k] = expert < EXPERTS ? logits[(size_t)token * EXPERTS + expert] : -INFINITY;
        largest = fmaxf(largest, score[k]);
    }
    largest = warp_max(largest);
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
#if SIGMOID
        score[k] = 1.0f / (1.0f + expf(-score[k]));
#else
        score[k] = expf(score[k] - largest);
        total += score[k];
#endif
    }
#if !SIGMOID
    total = warp_sum(total);
#endif
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const int expert = k * 32 + lane;
#if !SIGMOID
        score[k] /= total;
#endif
        choice[k] = expert < EXPERTS ? score[k] : -INFINITY;
#if CORRECTION
        if (expert < EXPERTS) choice[k] += correction[expert];
#endif
    }
#if GROUPS > 1
    // Lane g gets the value of group g; the kept ones' lanes then say so.
    const int size = EXPERTS / GROUPS;
    float value_of_group = -INFINITY;
    for (int g = 0; g < GROUPS; g++) {
        float rest[PER_LANE], sum = 0;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++) rest[k] = choice[k];
        for (int i = 0; i < GROUP_TOP; i++) {
            float value;
            const int best = best_of(rest, g * size, (g + 1) * size, value);
            drop(rest, best);
            sum += value;
        }
        if (lane == g) value_of_group = sum;
    }
    u32 kept = 0;
    for (int i = 0; i < KEPT_GROUPS; i++) {
        const bool open = lane < GROUPS && !(kept >> lane & 1);
        float value = open ? value_of_group : -INFINITY;
        kept |= 1u << (warp_best(value, open ? lane : -1) & 31);
    }
#pragma unroll
    for (int k = 0; k < PER_LANE; k++) {
        const int expert = k * 32 + lane;
        if (expert < EXPERTS && !(kept >> (expert / size) & 1)) choice[k] = -INFINITY;
    }
#endif
    float chosen = 0, sum = 0;  // lane i has the weight of the i-th expert
    for (int i = 0; i < TOP_K; i++) {
        float value;
        const int best = max(best_of(choice, 0, EXPERTS, value), 0);
        drop(choice, best);
        float weight = 0;
#pragma unroll
        for (int k = 0; k < PER_LANE; k++)
            if (k == best / 32) weight = score[k];
        weight = __shfl_sync(FULL_WARP, weight, best % 32);
        sum += weight;
        if (lane == i) chosen = weight, ids[(size_t)token * TOP_K + i] = best;
    }
#if NORMALIZE
    chosen /= sum + 1e-20f;
#endif
    if (lane < TOP_K) weights[(size_t)token * TOP_K + lane] = chosen * scale;
}
