// Low-rank updates: y += B t with t = A x, A and B of each row's adapter. B t is an epilogue of the projections.
//
// With few rows a projection computes t itself, while it reads W. Its blocks take tickets: the first `producers` of each
// set compute t, count that they are done, and end. The others multiply their first tile, which takes longer, and wait for
// that count before its epilogue.
//
// Tickets come in the order in which blocks begin. So whoever waits, waits for blocks that have begun, and those wait for
// nobody: no number of blocks has to be on the GPU at once, whatever else runs there, and any order of blocks will do.
#pragma once

#include "product.cuh"

// t[row, j] = Σ_k A[adapter of row][j, k] y[k] with y = rms_norm(x[row]), or x[row] itself; nothing where the row has no
// adapter. A warp's work; the sum has one order: along a lane by column, then over the lanes.
__device__ inline void lora_down(const Product& p, const float* norm, u32 row, u32 j) {
    const u32 adapter = p.adapter[row], lane = threadIdx.x % WARP;
    if (adapter == NO_ADAPTER) return;
    const float* a = advance(p.lora_a, adapter * p.lora_stride) + u64(j) * p.stride;
    const float* x = static_cast<const float*>(p.x) + u64(row) * p.stride;
    float sum = 0, squares = 0;
#pragma unroll 4
    for (u32 k = 4 * lane; k < p.stride; k += 4 * WARP) {
        float4 v = *reinterpret_cast<const float4*>(x + k);
        const float4 w = __ldg(reinterpret_cast<const float4*>(a + k));
        if (norm) {
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            const float4 n = __ldg(reinterpret_cast<const float4*>(norm + k));
            v.x *= n.x, v.y *= n.y, v.z *= n.z, v.w *= n.w;
        }
        sum = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum))));
    }
    sum = warp_sum(sum);
    if (norm) sum *= 1.0f / sqrtf(warp_sum(squares) / float(p.cols) + norm[p.stride]);
    if (lane == 0) p.lora_t[u64(row) * p.segments * p.rank + j] = sum;
}

// The share of t of the producer with this ticket, by all threads of its block.
__device__ inline void produce(const Product& p, const float* norm, u32 set, u32 ticket) {
    const u32 first = p.set_first[set], outputs = p.segments * p.rank, warps = blockDim.x / WARP;
    const u32 all = (p.set_first[set + 1] - first) * outputs;
    for (u32 at = ticket * warps + threadIdx.x / WARP; at < all; at += p.producers * warps) {
        lora_down(p, norm, first + at / outputs, at % outputs);
    }
    // The barrier brings the block's numbers to thread 0, whose fence brings them to the other blocks.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(p.progress + 2 * set + 1, 1);
    }
}

// Waits until the producers of a set are done: one thread, then a barrier of its block. After that t is read past the
// first-level cache.
__device__ inline void await_producers(const Product& p, u32 set) {
    const volatile u32* done = p.progress + 2 * set + 1;
    while (*done < p.producers) {}
    __threadfence();
}
