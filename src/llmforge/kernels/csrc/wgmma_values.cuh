// As wgmma.cuh, which comes before: products of rows in registers and of a factor in shared memory that
// is walked down its columns, as attention multiplies weights and values.
//   HEAD_DIM: columns of the product, a multiple of 16, at most 256.
#pragma once

// Rows of up to HEAD_DIM elements as a factor whose rows are walked along: 64 elements, 128 bytes, of
// each row together, swizzled as the copy engine does, the next 64 of all rows `stride` bytes on.
// `address` is that of 16 of the rows.
DEVICE u64 value_factor(u32 address, u32 stride) {
    const u64 layout = 1, rows = 1024;  // swizzled by 128 bytes; from 8 rows to the next
    return (address & 0x3ffff) >> 4 | (u64)(stride >> 4) << 16 | rows >> 4 << 32 | layout << 62;
}

// Operands %5 on of a product, as WORDS_ of %3 on.
#define TERMS_16 "%5, %6, %7, %8, %9, %10, %11, %12"
#define TERMS_32 TERMS_16 ", %13, %14, %15, %16, %17, %18, %19, %20"
#define TERMS_48 TERMS_32 ", %21, %22, %23, %24, %25, %26, %27, %28"
#define TERMS_64 TERMS_48 ", %29, %30, %31, %32, %33, %34, %35, %36"
#define TERMS_80 TERMS_64 ", %37, %38, %39, %40, %41, %42, %43, %44"
#define TERMS_96 TERMS_80 ", %45, %46, %47, %48, %49, %50, %51, %52"
#define TERMS_112 TERMS_96 ", %53, %54, %55, %56, %57, %58, %59, %60"
#define TERMS_128 TERMS_112 ", %61, %62, %63, %64, %65, %66, %67, %68"
#define TERMS_144 TERMS_128 ", %69, %70, %71, %72, %73, %74, %75, %76"
#define TERMS_160 TERMS_144 ", %77, %78, %79, %80, %81, %82, %83, %84"
#define TERMS_176 TERMS_160 ", %85, %86, %87, %88, %89, %90, %91, %92"
#define TERMS_192 TERMS_176 ", %93, %94, %95, %96, %97, %98, %99, %100"
#define TERMS_208 TERMS_192 ", %101, %102, %103, %104, %105, %106, %107, %108"
#define TERMS_224 TERMS_208 ", %109, %110, %111, %112, %113, %114, %115, %116"
#define TERMS_240 TERMS_224 ", %117, %118, %119, %120, %121, %122, %123, %124"
#define TERMS_256 TERMS_240 ", %125, %126, %127, %128, %129, %130, %131, %132"

// d[64 x HEAD_DIM] += a[64 x 16] b[16 x HEAD_DIM], begun. a: as `mma` of a warp has its 16 rows.
DEVICE void begin_product_of(float (&d)[HEAD_DIM / 2], u32 (&a)[KEYS / 4], int step, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n" TEXT(HEAD_DIM) "k16.f32." MMA_TYPE "." MMA_TYPE
                 " {" OF(TERMS_, HEAD_DIM) "}, {%0, %1, %2, %3}, %4, 1, 1, 1, 1;"
                 : "+r"(a[4 * step]), "+r"(a[4 * step + 1]), "+r"(a[4 * step + 2]),
                   "+r"(a[4 * step + 3]), "+l"(b), OF(SUMS_, HEAD_DIM));
}
// The words of `a`: what changes them stays before this.
template <int N>
DEVICE void sums_ready(u32 (&words)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(words[i])::"memory");
}

// Has products that begin after this read what this thread has stored in shared memory.
DEVICE void stores_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// Whole warps, together so many threads, meet at a barrier, 1 to 15; or arrive there without waiting.
DEVICE void threads_meet(int barrier, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
DEVICE void threads_arrive(int barrier, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// From here on each lane of this warpgroup has so many registers: what some give, others can take.
template <int COUNT>
DEVICE void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
DEVICE void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
