// The projections for many rows: a prompt's, or those of a large batch.
//
// grid   (⌈rows of the largest set / 64⌉ · ranges, ⌈units / 32⌉, sets) × 256 threads; a block is 128 outputs of 64 rows,
//        over one of `ranges` ranges of the columns: as many as bring a launch of few such tiles to 128 blocks
// shared 48 KiB: three steps of 64 bytes of columns, afterwards the sums
// bytes  a row of blocks reads the weights once, and a column of blocks x: what they share comes from the L2 cache; with
//        several ranges their sums, 512 bytes a row (eight rows at least) and block, written and read once
// bound  tensor cores: 4 · n · cols · rows operations, twice those of one product; three times in f32
// needs  x as split_rows writes it; rows of W 16-byte aligned, zero between cols and stride; with several ranges
//        `progress` zero, and it is so again afterwards
#pragma once

#include "gemm.cuh"
#include "lora.cuh"
#include "projections.cuh"

// queries, keys, values = x Wᵀ + b, rotated, to where qkv puts them
template <typename T>
__device__ void qkv_wide(const QkvArgs& args) {
    qkv<Gemm<T>>(args);
}

// hidden[row, n] += (x Wᵀ + b)[row, n]
template <typename T>
__device__ void residual_wide(const ResidualArgs& args) {
    residual<Gemm<T>>(args);
}

// activated[row, i] = silu(g) · u with g, u = rows i and i + intermediate_size of x Wᵀ + b
template <typename T>
__device__ void gate_up_wide(const GateUpArgs& args) {
    gate_up<Gemm<T>>(args);
}

// logits[slot[i], n] = (x[i] Wᵀ)[n]
template <typename T>
__device__ void lm_head_wide(const LmHeadArgs& args) {
    lm_head<Gemm<T>>(args);
}

struct SplitArgs {
    Product product;  // x is (rows, stride) f32; weights, bias and lora_b aren't read
    void* to;         // (indices, 2 · stride) T and sixteen bytes: high, low, then the factor as one f32
};

__device__ inline void narrow(float x, f16& y) { y = __float2half_rn(x); }
__device__ inline void narrow(float x, bf16& y) { y = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, float& y) {
    u32 bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    y = __uint_as_float(bits);
}

// What a thread writes at once.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
    T of[4];
};

// (high + low) · factor = rms_norm(x[row]), or x[row] itself: high = T(y), low = T(y − high) with y = x · w · 2^s, and
// factor = 2^−s / √(mean x² + ε); s brings the largest |y| of the row near 2¹⁴, so that no f16 is lost; T of f32 is tf32
//
// With adapters also lora_t[row, j] (lora.cuh), by blocks of their own.
//
// grid   (indices, 1 + ⌈segments · rank / 4⌉) × 128 threads; a block with y = 0 is a row, a warp of the others is an
//        output of lora_t; without adapters (indices)
// shared 32 bytes
// bytes  reads x twice, 8 · cols, the second time from the L1 cache; writes 4 · cols, in f32 8 · cols; A of the row's
//        adapter, x once an output, from the L2 cache
// bound  memory bandwidth, small beside the product
// needs  no more blocks than set_first has rows; 16-byte aligned rows, zero between cols and stride
template <typename T>
__device__ void split_rows(const SplitArgs& args) {
    __shared__ float of_warp[2][4];
    const Product& p = args.product;
    const u32 index = blockIdx.x, row = p.rows ? p.rows[index] : index, warp = threadIdx.x / WARP;
    u32 set = 0;
    while (index >= p.set_first[set + 1]) set++;
    const float* norm = p.norm ? advance(p.norm, set * p.set_stride) : nullptr;
    if (blockIdx.y > 0) {
        const u32 j = (blockIdx.y - 1) * 4 + warp;
        if (j < p.segments * p.rank) lora_down(p, norm, row, j);
        return;
    }
    const float* x = static_cast<const float*>(p.x) + u64(row) * p.stride;
    const auto load = [&](u32 k, float& squares) {
        float4 v = *reinterpret_cast<const float4*>(x + k);
        if (norm) {
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            const float4 w = __ldg(reinterpret_cast<const float4*>(norm + k));
            v.x *= w.x, v.y *= w.y, v.z *= w.z, v.w *= w.w;
        }
        return v;
    };
    float squares = 0, largest = 0;
    for (u32 k = 4 * threadIdx.x; k < p.stride; k += 4 * blockDim.x) {
        const float4 v = load(k, squares);
        largest = fmaxf(fmaxf(fmaxf(largest, fabsf(v.x)), fmaxf(fabsf(v.y), fabsf(v.z))), fabsf(v.w));
    }
    squares = warp_sum(squares);
#pragma unroll
    for (u32 d = WARP / 2; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, d));
    if (threadIdx.x % WARP == 0) of_warp[0][warp] = squares, of_warp[1][warp] = largest;
    __syncthreads();
    squares = (of_warp[0][0] + of_warp[0][1]) + (of_warp[0][2] + of_warp[0][3]);
    largest = fmaxf(fmaxf(of_warp[1][0], of_warp[1][1]), fmaxf(of_warp[1][2], of_warp[1][3]));

    // The exponent of the largest; a row of zeros or subnormals needs no more than 2^114.
    const int exponent = max(int(__float_as_uint(largest) >> 23) - 127, -100);
    const float up = __uint_as_float(u32(127 + 14 - exponent) << 23);
    const float down = __uint_as_float(u32(127 - 14 + exponent) << 23);
    T* to = static_cast<T*>(args.to) + u64(index) * split_stride<T>(p.stride);
    float unused = 0;
    for (u32 k = 4 * threadIdx.x; k < p.stride; k += 4 * blockDim.x) {
        const float4 v = load(k, unused);
        const float y[4] = {v.x * up, v.y * up, v.z * up, v.w * up};
        Four<T> high, low;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            narrow(y[i], high.of[i]);
            narrow(y[i] - to_f32(high.of[i]), low.of[i]);
        }
        *reinterpret_cast<Four<T>*>(to + k) = high;
        *reinterpret_cast<Four<T>*>(to + p.stride + k) = low;
    }
    if (threadIdx.x == 0) {
        const float factor = norm ? down / sqrtf(squares / float(p.cols) + norm[p.stride]) : down;
        *reinterpret_cast<float*>(to + 2 * p.stride) = factor;
    }
}

#define WIDE_PROJECTIONS(T, name)                                                                             \
    extern "C" __global__ __launch_bounds__(256, 2) void qkv_wide_##name(const QkvArgs args) {                \
        qkv_wide<T>(args);                                                                                    \
    }                                                                                                         \
    extern "C" __global__ __launch_bounds__(256, 2) void residual_wide_##name(const ResidualArgs args) {      \
        residual_wide<T>(args);                                                                               \
    }                                                                                                         \
    extern "C" __global__ __launch_bounds__(256, 2) void gate_up_wide_##name(const GateUpArgs args) {         \
        gate_up_wide<T>(args);                                                                                \
    }                                                                                                         \
    extern "C" __global__ __launch_bounds__(256, 2) void lm_head_wide_##name(const LmHeadArgs args) {         \
        lm_head_wide<T>(args);                                                                                \
    }                                                                                                         \
    extern "C" __global__ __launch_bounds__(128) void split_rows_##name(const SplitArgs args) {               \
        split_rows<T>(args);                                                                                  \
    }
