// y = W x for many rows of x: the part that the projections on tensor cores share.
//
// A block computes 128 outputs of 64 rows, a warp 32 of 32, by mma.sync with f32 sums: W is A, the rows of x are B.
// split_rows has written x as high + low, two numbers of W's type, and both are multiplied: 22 bits of x count for f16
// and 16 for bf16. An f32 has more bits than tensor cores read, so that W is split, too, and three products are taken
// (tf32.cuh).
//
// Columns come 64 bytes at a time by cp.async into one of three buffers: while one is multiplied the next two are on
// their way. A staged row is four pieces of 16 bytes, permuted by the row, so that neither cp.async nor ldmatrix meets
// a bank conflict.
//
// A launch of few tiles would leave most of the GPU idle: there the columns are cut into ranges, a block for each range of a
// tile. Each block writes its sums and takes a ticket; the last one adds all of them in the order of the ranges, whichever
// came when, and finishes the tile. Nobody waits.
#pragma once

#include "async.cuh"
#include "product.cuh"
#include "tf32.cuh"

constexpr u32 GEMM_OUTPUTS = 128;  // of a block
constexpr u32 GEMM_ROWS = 64;      // of a block
constexpr u32 GEMM_STAGES = 3;
constexpr u32 GEMM_THREADS = 256;
constexpr u32 GEMM_UNITS = GEMM_OUTPUTS / UNIT;
constexpr u32 SUMS = GEMM_OUTPUTS + 4;  // numbers of a row of sums: the shift keeps the banks of a warp apart

// Numbers of a row that split_rows writes: high, low, and the factor in the last sixteen bytes.
template <typename T>
__device__ u32 split_stride(u32 stride) {
    return 2 * stride + 16 / sizeof(T);
}

__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const f16*) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1, const bf16*) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void ldmatrix(u32 (&to)[4], const void* from) {
    const u32 address = u32(__cvta_generic_to_shared(from));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(address) : "memory");
}

// The columns of one step: 64 bytes of each row.
template <typename T>
struct Stage {
    static constexpr u32 PIECE = 16 / sizeof(T);  // columns
    static constexpr u32 COLS = 4 * PIECE;

    T weights[GEMM_OUTPUTS * COLS];
    T high[GEMM_ROWS * COLS];
    T low[GEMM_ROWS * COLS];

    // Where a piece of a staged row lies.
    static __device__ u32 at(u32 row, u32 piece) { return row * COLS + (piece ^ (row / 2 % 4)) * PIECE; }

    // What a call of mma reads of W: 16 outputs from `row` on, of the step's first 32 bytes or its second.
    __device__ void load_outputs(u32 (&to)[4], u32 row, u32 k) const {
        const u32 lane = threadIdx.x % WARP;
        ldmatrix(to, weights + at(row + lane % 16, 2 * k + lane / 16));
    }
};

// A warp's sums: 2 · 16 outputs of 4 · 8 rows.
using Sums = float[2][4][4];

// c += W x over the columns of a step, which are two calls of mma deep. Tensor cores cut sums off instead of rounding
// them, each time a little, and always towards zero: what a step adds is summed from zero, and then rounded.
template <typename T>
__device__ void add_step(const Stage<T>& stage, u32 outputs, u32 rows, Sums& c) {
    const u32 lane = threadIdx.x % WARP;
    Sums of_step = {};
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
        u32 w[2][4];
#pragma unroll
        for (u32 i = 0; i < 2; i++) stage.load_outputs(w[i], outputs + i * 16, k);
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const T* const part = half ? stage.low : stage.high;
#pragma unroll
            for (u32 j = 0; j < 4; j += 2) {
                u32 b[4];
                ldmatrix(b, part + Stage<T>::at(rows + j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    mma(of_step[i][j], w[i], b[0], b[1], part);
                    mma(of_step[i][j + 1], w[i], b[2], b[3], part);
                }
            }
        }
    }
#pragma unroll
    for (u32 at = 0; at < 32; at++) c[at / 16][at / 4 % 4][at % 4] += of_step[at / 16][at / 4 % 4][at % 4];
}

// The same of f32 weights, which are split here. Each call's columns are summed from zero, so that the cutting off stays
// below the rounding of c.
__device__ inline void add_step(const Stage<float>& stage, u32 outputs, u32 rows, Sums& c) {
    const u32 lane = threadIdx.x % WARP;
    Sums of_half;
#pragma unroll
    for (u32 k = 0; k < 2; k++) {
        u32 high[2][4], low[2][4];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            stage.load_outputs(low[i], outputs + i * 16, k);
#pragma unroll
            for (u32 at = 0; at < 4; at++) split(__uint_as_float(low[i][at]), high[i][at], low[i][at]);
        }
#pragma unroll
        for (u32 j = 0; j < 4; j += 2) {
            u32 x_high[4], x_low[4];
            const u32 place = Stage<float>::at(rows + j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
            ldmatrix(x_high, stage.high + place);
            ldmatrix(x_low, stage.low + place);
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
#pragma unroll
                for (u32 of = 0; of < 2; of++) {
                    float sum[4];
                    mma_f32(sum, high[i], low[i], x_high[2 * of], x_high[2 * of + 1], x_low[2 * of], x_low[2 * of + 1]);
#pragma unroll
                    for (u32 at = 0; at < 4; at++) {
                        float& half = of_half[i][j + of][at];
                        if (k == 0) half = sum[at];
                        else c[i][j + of][at] += half + sum[at];
                    }
                }
            }
        }
    }
}

// What a block computes.
struct Tile {
    u32 rows, range;  // which 64 rows, and which range of the columns
    __device__ explicit Tile(const Product& p) : rows(blockIdx.x), range(0) {
        if (p.ranges > 1) rows = blockIdx.x / p.ranges, range = blockIdx.x % p.ranges;
    }
};

// Brings the sums of a tile's ranges together, by all threads of the block of one range: true in the last block, in whose c
// they are then. `rows` of the tile's `count` rows come before this warp's.
__device__ inline bool gather(const Product& p, u32 count, u32 rows, Sums& c) {
    const u32 range = Tile(p).range;
    const u32 tile = (blockIdx.z * gridDim.y + blockIdx.y) * (gridDim.x / p.ranges) + Tile(p).rows;
    float4* const all = reinterpret_cast<float4*>(p.range_sums);
    // As the threads hold them: whole sectors, and rows that don't exist are passed over.
    const auto place = [=](u32 of, u32 fragment) {
        return all + ((u64(tile) * p.ranges + of) * 8 + fragment) * GEMM_THREADS + threadIdx.x;
    };
    const auto exists = [=](u32 fragment) { return rows + fragment % 4 * 8 < count; };
#pragma unroll
    for (u32 at = 0; at < 8; at++) {
        const float(&from)[4] = c[at / 4][at % 4];
        if (exists(at)) *place(range, at) = {from[0], from[1], from[2], from[3]};
    }
    // The barrier brings the block's sums to thread 0, whose fence brings them to the other blocks; the last block takes
    // the same way back.
    __syncthreads();
    bool last = false;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(p.progress + tile, 1) == p.ranges - 1;
        __threadfence();
        if (last) p.progress[tile] = 0;  // for the next launch
    }
    if (!__syncthreads_or(last)) return false;
#pragma unroll
    for (u32 at = 0; at < 32; at++) c[at / 16][at / 4 % 4][at % 4] = 0;
#pragma unroll 1
    for (u32 of = 0; of < p.ranges; of++) {
        float4 parts[8] = {};
#pragma unroll
        for (u32 at = 0; at < 8; at++) {
            if (exists(at)) parts[at] = __ldcg(place(of, at));
        }
#pragma unroll
        for (u32 at = 0; at < 8; at++) {
            float(&to)[4] = c[at / 4][at % 4];
            to[0] += parts[at].x, to[1] += parts[at].y, to[2] += parts[at].z, to[3] += parts[at].w;
        }
    }
    return true;
}

// One block of the product, by all its threads: range blockIdx.x % ranges of the columns, for rows
// blockIdx.x / ranges · 64 … of set blockIdx.z, units blockIdx.y · 32 ….
template <typename T>
struct Gemm {
    static constexpr u32 PIECE = Stage<T>::PIECE, COLS = Stage<T>::COLS;

    // Calls finish(unit, part, index, row, y) for each unit, part of a unit and row, with the four outputs y. `PARTS`,
    // `row_of` and `segment` are as in Gemv.
    template <u32 PARTS, typename RowOf, typename Segment, typename Finish>
    static __device__ void run(const Product& p, u32 units, RowOf row_of, Segment segment, Finish finish) {
        __shared__ uint4 memory[GEMM_STAGES * sizeof(Stage<T>) / sizeof(uint4)];
        Stage<T>* const stages = reinterpret_cast<Stage<T>*>(memory);
        float* const sums = reinterpret_cast<float*>(memory);  // (GEMM_ROWS, SUMS), when all is multiplied
        const u32 first_row = Tile(p).rows * GEMM_ROWS, first_unit = blockIdx.y * GEMM_UNITS;
        const Span span(p, blockIdx.z, first_row, GEMM_ROWS);
        if (span.count == 0) return;
        const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        const u32 outputs = warp / 2 * 32, rows = warp % 2 * 32;  // where this warp's part begins

        Sums c = {};
        const auto weight_row = [=](u32 o) { return row_of(first_unit + o / UNIT, o % UNIT); };
        multiply(p, span, weight_row, stages, outputs, rows, c);
        if (p.ranges > 1 && !gather(p, span.count, rows, c)) return;

        // The factor of each row undoes its power of two and normalises it.
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
#pragma unroll
            for (u32 half = 0; half < 2; half++) {
                const u32 m = rows + j * 8 + lane % 4 * 2 + half;
                const float factor = m < span.count ? factor_of(p, span.first + m) : 0;
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
#pragma unroll
                    for (u32 k = 0; k < 2; k++) {
                        sums[m * SUMS + outputs + i * 16 + k * 8 + lane / 4] = c[i][j][2 * k + half] * factor;
                    }
                }
            }
        }
        __syncthreads();
        const auto x_row = [&](u32 m) { return p.rows ? p.rows[span.first + m] : span.first + m; };
        if (p.lora_b) {
            for (u32 at = threadIdx.x; at < span.count * GEMM_OUTPUTS; at += GEMM_THREADS) {
                const u32 m = at / GEMM_OUTPUTS, o = at % GEMM_OUTPUTS, n = row_of(first_unit + o / UNIT, o % UNIT);
                const u32 row = x_row(m), adapter = p.adapter[row];
                if (adapter == NO_ADAPTER) continue;
                const float* b = advance(p.lora_b, adapter * p.lora_stride) + u64(n) * p.rank;
                const float* t = p.lora_t + (u64(row) * p.segments + segment(n)) * p.rank;
                float delta = 0;
                for (u32 j = 0; j < p.rank; j++) delta = fmaf(b[j], t[j], delta);
                sums[m * SUMS + o] += delta;
            }
            __syncthreads();
        }
        const float* bias = p.bias ? advance(p.bias, blockIdx.z * p.set_stride) : nullptr;
        const u32 here = min(GEMM_UNITS, units - first_unit);
        for (u32 at = threadIdx.x; at < span.count * here * PARTS; at += GEMM_THREADS) {
            const u32 part = at % PARTS, u = at / PARTS % here, m = at / PARTS / here;
            const float4 v = *reinterpret_cast<const float4*>(sums + m * SUMS + u * UNIT);
            float y[UNIT] = {v.x, v.y, v.z, v.w};
            if (bias) {
#pragma unroll
                for (u32 r = 0; r < UNIT; r++) y[r] += bias[row_of(first_unit + u, r)];
            }
            finish(first_unit + u, part, span.first + m, x_row(m), y);
        }
    }

    // A row as split_rows wrote it.
    static __device__ const T* x_of(const Product& p, u32 index) {
        return static_cast<const T*>(p.x) + u64(index) * split_stride<T>(p.stride);
    }

    static __device__ float factor_of(const Product& p, u32 index) {
        return *reinterpret_cast<const float*>(x_of(p, index) + 2 * p.stride);
    }

    // c += W x over the block's range of the columns: whole steps, as many of them in each range but in the last ones, which
    // may have none.
    template <typename RowOf>
    static __device__ void multiply(
        const Product& p, Span span, RowOf row_of, Stage<T>* stages, u32 outputs, u32 rows, Sums& c
    ) {
        // Each thread brings two pieces of W, and one of each half of x.
        const u32 piece = threadIdx.x % 4, row = threadIdx.x / 4;
        const T* weights = advance(static_cast<const T*>(p.weights), blockIdx.z * p.set_stride);
        const T* const from[2] = {
            weights + u64(row_of(row)) * p.stride,
            weights + u64(row_of(row + GEMM_OUTPUTS / 2)) * p.stride,
        };
        const bool exists = row < span.count;
        const T* const from_x = x_of(p, span.first + (exists ? row : 0));
        u32 steps = (p.stride + COLS - 1) / COLS, first = 0;
        if (p.ranges > 1) {
            const u32 range = Tile(p).range;
            const u32 most = (steps + p.ranges - 1) / p.ranges;
            first = min(most * range, steps);
            steps = min(most, steps - first);
        }
        const u32 first_column = first * COLS + piece * PIECE;
        const auto fetch = [&](u32 step) {
            Stage<T>& stage = stages[step % GEMM_STAGES];
            const u32 k = step * COLS + first_column, at = Stage<T>::at(row, piece);
            const bool inside = k < p.stride;
            const u32 safe = inside ? k : 0;
            copy_async(stage.weights + at, from[0] + safe, inside);
            copy_async(stage.weights + at + GEMM_OUTPUTS / 2 * COLS, from[1] + safe, inside);
            copy_async(stage.high + at, from_x + safe, inside && exists);
            copy_async(stage.low + at, from_x + p.stride + safe, inside && exists);
        };
#pragma unroll
        for (u32 step = 0; step < GEMM_STAGES - 1; step++) {
            if (step < steps) fetch(step);
            commit_copies();
        }
        for (u32 step = 0; step < steps; step++) {
            await_copies<GEMM_STAGES - 2>();
            // All copies of this step have come, and nobody reads the buffer that is filled next.
            __syncthreads();
            if (step + GEMM_STAGES - 1 < steps) fetch(step + GEMM_STAGES - 1);
            commit_copies();  // an empty group at the end, so that the count of groups still tells
            add_step(stages[step % GEMM_STAGES], outputs, rows, c);
        }
    }
};
