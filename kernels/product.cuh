// What a projection multiplies: y = W x for the rows of x of each set of weights.
//
// A unit is four outputs that one warp (gemv.cuh) or thread (gemm.cuh) has together; what they are, the projections say.
#pragma once

#include "common.cuh"

constexpr u32 UNIT = 4;  // outputs
constexpr u32 NO_ADAPTER = 0xffffffffu;

struct Product {
    const void* x;             // (rows, stride) f32; for Gemm what split_rows made of it
    const void* weights;       // (n, stride) of set 0
    const float* bias;         // (n,) of set 0, or null
    const float* norm;         // (cols,) of set 0, zeros up to stride, then ε; or null: no RMSNorm; Gemm doesn't read it
    const u32* set_first;      // (sets + 1,): rows of set z are set_first[z] .. set_first[z + 1]
    const u32* rows;           // (rows,): which rows of x, or null: all of them, in order
    const float* lora_b;       // (n, rank) of adapter 0, scaled, or null: no adapters
    float* lora_t;             // (rows, segments · rank): t = A x of each row's adapter
    const u32* adapter;        // (rows,): the adapter of each row, NO_ADAPTER for none
    u64 set_stride;            // bytes from one set to the next: weights, bias, norm
    u64 lora_stride;           // bytes from one adapter to the next
    u32 n;                     // outputs
    u32 cols;                  // columns: the true number
    u32 stride;                // columns rounded up to 8; the padding is zero in x and W
    u32 chunk;                 // Gemv: panels that fit shared memory at once
    u32 rank;                  // of the adapters, rounded up to 8
    u32 segments;              // projections that W stacks: lora_t has one part for each
    u32 producers;             // Gemv: blocks of each set that compute lora_t; 0 where it is there
    u32 ranges;                // Gemm: ranges of columns, a block each, that a tile's sums come from; 1 or more
    const float* lora_a;       // (segments · rank, stride) of adapter 0, for whoever computes lora_t
    u32* progress;             // Gemv: (sets, 2): blocks that have begun, and producers that are done; zero before
                               // Gemm: (tiles,): blocks that have their sums; zero before and after; unused with one range
    float* range_sums;         // Gemm: (tiles, ranges, 64 · 128): what each range adds to a tile; unused with one
};

// The rows of x that a block computes for one set: after `skip` of them at most `most`.
struct Span {
    u32 first;
    u32 count;
    __device__ Span(const Product& p, u32 set, u32 skip, u32 most) {
        first = p.set_first[set] + skip;
        const u32 end = p.set_first[set + 1];
        count = first < end ? min(end - first, most) : 0;
    }
};
