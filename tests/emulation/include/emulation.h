// An emulation of a GPU on one x86-64 processor, for tests: what the CUDA C++ of a kernel means,
// fiber by fiber. No word here says how fast anything is, nor how a GPU schedules it.
#pragma once
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

#include "types.h"
#include "fibers.h"
#include "intrinsics.h"
#include "copies.h"
#include "faults.h"

#undef INFINITY  // kernels define their own
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))
#define __shared__ static __attribute__((section("emulated_shared")))
