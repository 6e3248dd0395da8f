// An emulation of a GPU: copies to shared memory that run beside the arithmetic. Each is made at once
// or when it is waited for, as is drawn: who reads without waiting, or overwrites what another still
// reads, gets a wrong result in one of the two.
#pragma once
#include "fibers.h"

namespace emulation {

struct Copy {
    char* target;
    const char* source;
    size_t bytes;
    void* barrier;      // of a bulk copy
    int fiber, group;   // of another
    size_t swizzle;     // 16-byte units of a row of 128 bytes are permuted by the row's address
    size_t from = 0;    // bytes from the target's row on
};

const int MAX_COPIES = 4096;
static Copy copies[MAX_COPIES];
static int copy_count;
static int groups[MAX_THREADS];  // that a fiber has ended

static void reset_copies() {
    copy_count = 0;
    memset(groups, 0, sizeof groups);
}

// An mbarrier, in the 8 bytes of one.
struct Barrier {
    int expected;  // bytes
    unsigned short pending;
    unsigned char count, phase;

    void end_if_complete() {
        if (pending || expected) return;
        pending = count;
        phase ^= 1;
    }
};

inline void make(const Copy& copy) {
    if (copy.swizzle) {
        for (size_t i = 0; i < copy.bytes; i += 16) {
            const size_t at = (size_t)copy.target + copy.from + i;
            memcpy((void*)(at ^ (at >> 3 & 0x70)), copy.source + i, 16);
        }
    } else {
        memcpy(copy.target, copy.source, copy.bytes);
    }
    if (!copy.barrier) return;
    Barrier& barrier = *(Barrier*)copy.barrier;
    barrier.expected -= (int)copy.bytes;
    barrier.end_if_complete();
}

inline void begin(const Copy& copy) {
    if (draw(2) || copy_count == MAX_COPIES) make(copy);
    else copies[copy_count++] = copy;
}

// Makes those copies for which `wanted`, in order.
template <class Wanted>
inline void make_all(Wanted wanted) {
    int kept = 0;
    for (int i = 0; i < copy_count; i++) {
        if (wanted(copies[i])) make(copies[i]);
        else copies[kept++] = copies[i];
    }
    copy_count = kept;
}

// What launch.TensorMap describes, with the innermost dimension first.
struct EncodedMap {
    const char* address;
    uint64_t sizes[4], strides[3];  // strides in bytes, of the dimensions from the second on
    uint32_t box[4];
    uint32_t itemsize;
};

inline void begin_box(char* target, const EncodedMap& map, const int (&at)[4], void* barrier) {
    const size_t row_bytes = (size_t)map.box[0] * map.itemsize;
    if (row_bytes != 128) fail("a box has rows of 128 bytes");
    if ((size_t)target % 128) fail("a box goes to a multiple of 128 bytes");
    // What of a row is inside: whole units of 16 bytes, which are permuted one by one.
    const int64_t left = ((int64_t)map.sizes[0] - at[0]) * map.itemsize;
    const size_t there = left < 0 ? 0 : left < (int64_t)row_bytes ? left : row_bytes;
    if (there % 16) fail("a row of a map is of whole 16 bytes");
    static const char zeros[128] = {};
    for (unsigned i3 = 0; i3 < map.box[3]; i3++)
        for (unsigned i2 = 0; i2 < map.box[2]; i2++)
            for (unsigned i1 = 0; i1 < map.box[1]; i1++) {
                const uint64_t r1 = at[1] + i1, r2 = at[2] + i2, r3 = at[3] + i3;
                const bool inside = r1 < map.sizes[1] && r2 < map.sizes[2] && r3 < map.sizes[3];
                const char* source = map.address + (int64_t)at[0] * map.itemsize +
                                     r1 * map.strides[0] + r2 * map.strides[1] + r3 * map.strides[2];
                const size_t bytes = inside ? there : 0;
                if (bytes) begin({target, source, bytes, barrier, 0, 0, 1});
                if (bytes < row_bytes)
                    begin({target, zeros, row_bytes - bytes, barrier, 0, 0, 1, bytes});
                target += row_bytes;
            }
}

}  // namespace emulation
