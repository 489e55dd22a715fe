// f32 on tensor cores: they multiply tf32, eleven bits of an f32, so that an f32 takes two of them.
#pragma once

#include "common.cuh"

// The largest number that `split` can hold, 3.40199e38: of those above it the eleven bits are rounded to infinity, and the
// rest is the opposite one, so that a product with zero is NaN.
#define LARGEST_SPLIT __int_as_float(0x7f7fefff)

// An f32 as the sum of two numbers of eleven bits, which is what mma reads of each. The first is rounded, so that the
// sign of the second is one more bit: three numbers of four are whole, the others lack their last bit. What is larger than
// LARGEST_SPLIT, or NaN, makes products NaN.
__device__ inline void split(float x, u32& high, u32& low) {
    high = (__float_as_uint(x) + 0x1000u) & 0xffffe000u;
    low = __float_as_uint(x - __uint_as_float(high));
}

// c += a · b for 16 rows of a, 8 columns of b and a depth of 8.
__device__ inline void mma_tf32(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// c = a · b of f32 factors, each in two parts; what both low ones would add is below the last bit. The small products come
// first: tensor cores may cut sums off, always towards zero, and so only the last call does at the size of the result.
__device__ inline void mma_f32(
    float (&c)[4], const u32 (&high)[4], const u32 (&low)[4], u32 b0_high, u32 b1_high, u32 b0_low, u32 b1_low
) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) c[i] = 0;
    mma_tf32(c, high, b0_low, b1_low);
    mma_tf32(c, low, b0_high, b1_high);
    mma_tf32(c, high, b0_high, b1_high);
}
