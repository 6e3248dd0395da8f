// An emulation of a GPU: CUDA's types, and what its conversions give.
#pragma once
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

#include <type_traits>
#include <utility>

struct uint3 {
    unsigned x, y, z;
};
typedef uint3 dim3;

#define EMULATED_VECTOR(name, type, bytes)                                        \
    struct __attribute__((aligned(bytes / 2))) name##2 { type x, y; };            \
    struct __attribute__((aligned(bytes))) name##4 { type x, y, z, w; };          \
    inline name##2 make_##name##2(type x, type y) { return {x, y}; }              \
    inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMULATED_VECTOR(uint, unsigned, 16)
EMULATED_VECTOR(int, int, 16)
EMULATED_VECTOR(float, float, 16)
#undef EMULATED_VECTOR

template <class To, class From>
inline To emulated_bits(From x) {
    static_assert(sizeof(To) == sizeof(From), "a value of the same size");
    To result;
    memcpy(&result, &x, sizeof result);
    return result;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }

struct __nv_bfloat16 {
    unsigned short bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((unsigned)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return {0x7fff};
    return {(unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
    unsigned short bits;
};
inline float __half2float(__half x) {
    const unsigned sign = (unsigned)(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // 2^-24 times an integer of at most 24 bits is exact, and so is the scaling.
    if (rest < 0x0400) return __uint_as_float(sign | __float_as_uint(rest * 0x1p-24f));
    return __uint_as_float(sign | (rest << 13) + (112u << 23));
}
inline __half __float2half_rn(float x) {
    const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000;
    const unsigned rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return {0x7fff};
    if (rest >= 0x477ff000) return {(unsigned short)(sign | 0x7c00)};
    if (rest < 0x38800000) {
        // Adding 1/2 leaves the bits of a subnormal half, rounded to nearest even, at the end.
        const float shifted = __uint_as_float(rest) + 0.5f;
        return {(unsigned short)(sign | (__float_as_uint(shifted) - 0x3f000000))};
    }
    return {(unsigned short)(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13)};
}

template <class A, class B>
inline typename std::common_type<A, B>::type min(A a, B b) {
    typedef typename std::common_type<A, B>::type C;
    return (C)b < (C)a ? (C)b : (C)a;
}
template <class A, class B>
inline typename std::common_type<A, B>::type max(A a, B b) {
    typedef typename std::common_type<A, B>::type C;
    return (C)a < (C)b ? (C)b : (C)a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __umulhi(unsigned a, unsigned b) {
    return (unsigned)((unsigned long long)a * b >> 32);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selectors) {
    const unsigned long long bytes = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; i++)
        result |= (unsigned)(bytes >> 8 * (selectors >> 4 * i & 7) & 255) << 8 * i;
    return result;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

// Loads and stores past some caches.
template <class V> inline V __ldg(const V* p) { return *p; }
template <class V> inline V __ldcg(const V* p) { return *p; }
template <class V> inline V __ldcs(const V* p) { return *p; }
template <class V> inline V __ldca(const V* p) { return *p; }
template <class V> inline void __stcg(V* p, V value) { *p = value; }
template <class V> inline void __stcs(V* p, V value) { *p = value; }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }
inline void __threadfence_system() { __threadfence(); }
inline size_t __cvta_generic_to_shared(const void* p) { return (size_t)p; }
