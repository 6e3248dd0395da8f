// An emulation of a GPU: what the functions of csrc/wgmma.cuh mean. A product is made at once or
// when it is waited for, as is drawn, as copies are.
#pragma once

DEVICE u64 factor(u32 address) {
    return (address & 0x3ffff) >> 4 | 1ull << 16 | 1024ull >> 4 << 32 | 1ull << 62;
}

namespace emulated {

struct Product {
    float* d;
    int columns;
    bool add, down;   // down: b is walked down its columns
    u64 a, b;         // a: a factor, or
    float rows[2][16];  // what it is, where `given`
    bool given;
    int group;
};
const int MAX_PRODUCTS = 64;
static struct Products {
    Product pending[MAX_PRODUCTS];
    int count, group;
} products[emulation::MAX_THREADS];

// Two bytes at an address of shared memory, whose 16-byte units are permuted by the address.
inline float element_at(u64 factor, u32 address) {
    if (factor >> 62 != 1 || factor >> 49 & 7)
        emulation::fail("a factor that is not swizzled by 128 bytes");
    address ^= address >> 3 & 0x70;
    // Descriptors hold 18 bits of an address.
    const u32 within = (address - (u32)(size_t)emulation::dynamic_shared) & 0x3ffff;
    if (within + sizeof(T) > emulation::MAX_SHARED) emulation::fail("a factor beyond shared memory");
    T x;
    memcpy(&x, emulation::dynamic_shared + within, sizeof x);
    return to_float(x);
}
// An element of a factor, which lies where its descriptor says: rows of 128 bytes in groups of 8.
inline float element(u64 factor, int row, int k) {
    const u32 start = (u32)(factor & 0x3fff) << 4, groups = (u32)(factor >> 32 & 0x3fff) << 4;
    return element_at(factor, start + row / 8 * groups + row % 8 * 128 + k * 2);
}
// The same of a factor that is walked down its columns: columns are in groups of 64.
inline float element_below(u64 factor, int column, int k) {
    const u32 start = (u32)(factor & 0x3fff) << 4, groups = (u32)(factor >> 32 & 0x3fff) << 4;
    const u32 columns = (u32)(factor >> 16 & 0x3fff) << 4;
    return element_at(factor, start + column / 64 * columns + column % 64 * 2 + k / 8 * groups +
                                  k % 8 * 128);
}

inline void make(const Product& product) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int row = threadIdx.x / 32 % 4 * 16 + g;
    for (int h = 0; h < 2; h++) {
        float left[16];
        for (int k = 0; k < 16; k++)
            left[k] = product.given ? product.rows[h][k] : element(product.a, row + 8 * h, k);
        for (int i = 0; i < product.columns / 4; i++) {
            const int column = i / 2 * 8 + 2 * t + i % 2;
            float& sum = product.d[i / 2 * 4 + 2 * h + i % 2];
            if (!product.add) sum = 0;
            for (int k = 0; k < 16; k++)
                sum += left[k] * (product.down ? element_below(product.b, column, k)
                                               : element(product.b, column, k));
        }
    }
}

inline void begin(const Product& product) {
    Products& own = products[emulation::current];
    // In order: those before are made first.
    if (own.count == 0 && emulation::draw(2)) make(product);
    else if (own.count == MAX_PRODUCTS) emulation::fail("products without end");
    else own.pending[own.count++] = product;
}

}  // namespace emulated

DEVICE void begin_product(float (&d)[COLUMNS / 2], u64 a, u64 b, u32 add) {
    const int group = emulated::products[emulation::current].group;
    emulated::begin({d, COLUMNS, add != 0, false, a, b, {}, false, group});
}
DEVICE void products_begin() {}
DEVICE void products_commit() { emulated::products[emulation::current].group++; }
template <int PENDING>
DEVICE void products_wait() {
    emulated::Products& own = emulated::products[emulation::current];
    int made = 0;
    for (; made < own.count && own.pending[made].group < own.group - PENDING; made++)
        emulated::make(own.pending[made]);
    own.count -= made;
    memmove(own.pending, own.pending + made, own.count * sizeof own.pending[0]);
    __syncwarp();  // a warp waits as one
}
template <int N>
DEVICE void sums_ready(float (&)[N]) {}
