// An emulation of a GPU: CUDA's functions of warps and blocks, and atomics.
#pragma once
#include "fibers.h"

// Which lane each reads from is `source(lane)`; beyond its part of `width` lanes it reads itself.
template <class V, class Source>
inline V emulated_shuffle(unsigned mask, const char* what, V value, Source source) {
    static_assert(sizeof(V) <= emulation::VALUE_BYTES, "a value of a lane");
    emulation::Meeting& meeting = emulation::meet_warp(mask, what, &value, sizeof value);
    V result;
    memcpy(&result, meeting.values[source((int)threadIdx.x % 32)], sizeof result);
    emulation::leave(meeting);
    return result;
}
template <class V>
inline V __shfl_sync(unsigned mask, V value, int from, int width = 32) {
    return emulated_shuffle(mask, "__shfl_sync", value, [=](int lane) {
        return lane / width * width + (from & (width - 1));
    });
}
template <class V>
inline V __shfl_xor_sync(unsigned mask, V value, int bits, int width = 32) {
    return emulated_shuffle(mask, "__shfl_xor_sync", value, [=](int lane) {
        const int from = lane ^ bits;
        return from / width > lane / width ? lane : from;
    });
}
template <class V>
inline V __shfl_down_sync(unsigned mask, V value, unsigned delta, int width = 32) {
    return emulated_shuffle(mask, "__shfl_down_sync", value, [=](int lane) {
        const int from = lane + (int)delta;
        return from / width > lane / width ? lane : from;
    });
}
template <class V>
inline V __shfl_up_sync(unsigned mask, V value, unsigned delta, int width = 32) {
    return emulated_shuffle(mask, "__shfl_up_sync", value, [=](int lane) {
        const int from = lane - (int)delta;
        return from < lane / width * width ? lane : from;
    });
}
inline void __syncwarp(unsigned mask = ~0u) {
    emulation::leave(emulation::meet_warp(mask, "__syncwarp", "", 1));
}

// `join(result, value)` over the lanes that came.
template <class V, class Join>
inline V emulated_reduce(unsigned mask, const char* what, V value, V start, Join join) {
    emulation::Meeting& meeting = emulation::meet_warp(mask, what, &value, sizeof value);
    V result = start;
    for (int lane = 0; lane < 32; lane++) {
        if (!(meeting.arrived >> lane & 1)) continue;
        V other;
        memcpy(&other, meeting.values[lane], sizeof other);
        result = join(result, other, lane);
    }
    emulation::leave(meeting);
    return result;
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
    return emulated_reduce(mask, "__ballot_sync", (unsigned)(vote != 0), 0u,
                           [](unsigned all, unsigned v, int lane) { return all | v << lane; });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, !vote) == 0; }
template <class V>
inline V __reduce_add_sync(unsigned mask, V value) {
    return emulated_reduce(mask, "__reduce_add_sync", value, V(0),
                           [](V all, V v, int) { return V(all + v); });
}
template <class V>
inline V __reduce_max_sync(unsigned mask, V value) {
    return emulated_reduce(mask, "__reduce_max_sync", value, value,
                           [](V all, V v, int) { return v > all ? v : all; });
}
template <class V>
inline V __reduce_min_sync(unsigned mask, V value) {
    return emulated_reduce(mask, "__reduce_min_sync", value, value,
                           [](V all, V v, int) { return v < all ? v : all; });
}

#define __syncthreads() ((void)emulation::meet_block(__LINE__, false))
#define __syncthreads_count(vote) emulation::meet_block(__LINE__, (vote) != 0)
#define __syncthreads_or(vote) (emulation::meet_block(__LINE__, (vote) != 0) != 0)
#define __syncthreads_and(vote) (emulation::meet_block(__LINE__, (vote) == 0) == 0)
inline void __trap() { emulation::fail("a trap"); }

// Ranks are threads of the process, so atomic here is atomic for all of them.
template <class V, class Change>
inline V emulated_atomic(V* address, Change change) {
    V old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(address, &old, change(old), false, __ATOMIC_SEQ_CST,
                                        __ATOMIC_SEQ_CST)) {
    }
    return old;
}
template <class V, class W>
inline V atomicAdd(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return V(old + (V)value); });
}
inline float atomicAdd(float* address, float value) {
    const int old = emulated_atomic(
        (int*)address, [=](int bits) { return __float_as_int(__int_as_float(bits) + value); });
    return __int_as_float(old);
}
template <class V, class W>
inline V atomicSub(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return V(old - (V)value); });
}
template <class V, class W>
inline V atomicMax(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return (V)value > old ? (V)value : old; });
}
template <class V, class W>
inline V atomicMin(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return (V)value < old ? (V)value : old; });
}
template <class V, class W>
inline V atomicOr(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return V(old | (V)value); });
}
template <class V, class W>
inline V atomicAnd(V* address, W value) {
    return emulated_atomic(address, [=](V old) { return V(old & (V)value); });
}
template <class V, class W>
inline V atomicExch(V* address, W value) {
    return emulated_atomic(address, [=](V) { return (V)value; });
}
template <class V, class W, class X>
inline V atomicCAS(V* address, W expected, X value) {
    return emulated_atomic(address, [=](V old) { return old == (V)expected ? (V)value : old; });
}
