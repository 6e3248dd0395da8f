// What CUDA C++ has no words for, of compute capability 9.0 alone (sm_90a): products of a warpgroup, 4
// neighbouring warps, on factors in shared memory. As ptx.cuh, which see.
//   COLUMNS: of a product, a multiple of 16, at most 256.
#pragma once

// A factor in shared memory: rows of 64 elements, 128 bytes, swizzled as the copy engine does, 8 rows at
// each multiple of 1024. `address` is that of 16 of the elements of the first row.
DEVICE u64 factor(u32 address) {
    const u64 layout = 1, stride = 1024;  // swizzled by 128 bytes; from 8 rows to the next
    return (address & 0x3ffff) >> 4 | 1ull << 16 | stride >> 4 << 32 | layout << 62;
}

// Operands %3 on of a product: each line has 16 columns, 8 of a lane's sums.
#define WORDS_16 "%3, %4, %5, %6, %7, %8, %9, %10"
#define WORDS_32 WORDS_16 ", %11, %12, %13, %14, %15, %16, %17, %18"
#define WORDS_48 WORDS_32 ", %19, %20, %21, %22, %23, %24, %25, %26"
#define WORDS_64 WORDS_48 ", %27, %28, %29, %30, %31, %32, %33, %34"
#define WORDS_80 WORDS_64 ", %35, %36, %37, %38, %39, %40, %41, %42"
#define WORDS_96 WORDS_80 ", %43, %44, %45, %46, %47, %48, %49, %50"
#define WORDS_112 WORDS_96 ", %51, %52, %53, %54, %55, %56, %57, %58"
#define WORDS_128 WORDS_112 ", %59, %60, %61, %62, %63, %64, %65, %66"
#define WORDS_144 WORDS_128 ", %67, %68, %69, %70, %71, %72, %73, %74"
#define WORDS_160 WORDS_144 ", %75, %76, %77, %78, %79, %80, %81, %82"
#define WORDS_176 WORDS_160 ", %83, %84, %85, %86, %87, %88, %89, %90"
#define WORDS_192 WORDS_176 ", %91, %92, %93, %94, %95, %96, %97, %98"
#define WORDS_208 WORDS_192 ", %99, %100, %101, %102, %103, %104, %105, %106"
#define WORDS_224 WORDS_208 ", %107, %108, %109, %110, %111, %112, %113, %114"
#define WORDS_240 WORDS_224 ", %115, %116, %117, %118, %119, %120, %121, %122"
#define WORDS_256 WORDS_240 ", %123, %124, %125, %126, %127, %128, %129, %130"
#define SUMS_16 EIGHT_SUMS(0)
#define SUMS_32 SUMS_16, EIGHT_SUMS(8)
#define SUMS_48 SUMS_32, EIGHT_SUMS(16)
#define SUMS_64 SUMS_48, EIGHT_SUMS(24)
#define SUMS_80 SUMS_64, EIGHT_SUMS(32)
#define SUMS_96 SUMS_80, EIGHT_SUMS(40)
#define SUMS_112 SUMS_96, EIGHT_SUMS(48)
#define SUMS_128 SUMS_112, EIGHT_SUMS(56)
#define SUMS_144 SUMS_128, EIGHT_SUMS(64)
#define SUMS_160 SUMS_144, EIGHT_SUMS(72)
#define SUMS_176 SUMS_160, EIGHT_SUMS(80)
#define SUMS_192 SUMS_176, EIGHT_SUMS(88)
#define SUMS_208 SUMS_192, EIGHT_SUMS(96)
#define SUMS_224 SUMS_208, EIGHT_SUMS(104)
#define SUMS_240 SUMS_224, EIGHT_SUMS(112)
#define SUMS_256 SUMS_240, EIGHT_SUMS(120)
#define EIGHT_SUMS(i)                                                                           \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define JOINED(a, b) a##b
#define OF(name, columns) JOINED(name, columns)
#define QUOTED(x) #x
#define TEXT(x) QUOTED(x)

// d[64 x COLUMNS] (+)= a[64 x 16] b[COLUMNS x 16]ᵀ, begun: `products_wait` waits for it. Of each 8
// columns a lane has four sums, as `mma` of a warp, whose 16 rows are its part of the 64.
DEVICE void begin_product(float (&d)[COLUMNS / 2], u64 a, u64 b, u32 add) {
    // The factors come first, so that their numbers do not depend on how many sums there are.
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %2, 0; wgmma.mma_async.sync.aligned.m64n" TEXT(
                     COLUMNS) "k16.f32." MMA_TYPE "." MMA_TYPE " {" OF(WORDS_, COLUMNS) "}, %0, %1, "
                 "add, 1, 1, 0, 0; }"
                 : "+l"(a), "+l"(b), "+r"(add), OF(SUMS_, COLUMNS));
}
// Before the first product on sums that have been used otherwise.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of products.
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Returns when at most the last PENDING groups are still under way.
template <int PENDING>
DEVICE void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The sums, known to be complete: reads of them stay behind this.
template <int N>
DEVICE void sums_ready(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
