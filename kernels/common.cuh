// What every kernel shares: names of types, conversions, sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using u32 = unsigned int;
using u64 = unsigned long long;
using f16 = __half;
using bf16 = __nv_bfloat16;

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffffu;

#define INFINITE __int_as_float(0x7f800000)

// Positions in a block of the key-value cache.
constexpr u32 BLOCK_SIZE = 16;

// The sum over the lanes of a warp, in every lane, always in the same order.
__device__ inline float warp_sum(float x) {
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// `bytes` after `pointer`: how one set, model or layer follows the other.
template <typename T>
__device__ inline T* advance(T* pointer, u64 bytes) {
    return reinterpret_cast<T*>(reinterpret_cast<u64>(pointer) + bytes);
}

__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(f16 x) { return __half2float(x); }
__device__ inline float to_f32(bf16 x) { return __bfloat162float(x); }

// Eight consecutive 16-bit numbers, sixteen bytes, as f32.
__device__ inline void unpack(uint4 raw, float (&x)[8], const bf16*) {
    // A bf16 is the upper half of an f32.
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ inline void unpack(uint4 raw, float (&x)[8], const f16*) {
    const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}
