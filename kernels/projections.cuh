// The projections. `Multiply` is how they are computed: Gemv<T, M> in a decoding step, for up to M = 16 rows a set, of
// which the rest here speaks; Gemm<T> for many rows (gemm_projections.cuh).
//
// grid   (min(tiles, what the GPU runs at once) + producers, 1, sets) × 256 threads; a tile is 8 warps of 4 outputs
// bytes  every weight once for all rows: n · cols · size of T; x comes from the L2 cache, once a block; with producers
//        (lora.cuh) A of each row's adapter
// bound  memory bandwidth
// needs  rows of a set ≤ M; rows of W and x 16-byte aligned, zero between cols and stride; shared memory for `chunk`
//        panels of M rows; with producers `progress` zero and `rows` null
#pragma once

#include "gemv.cuh"

struct QkvArgs {
    Product product;           // W is queries, keys, values: n = (heads + 2 · kv_heads) · head_dim
    float* queries;            // (rows, query_stride) f32: rotated queries
    float* cache;              // keys and values of this layer of model 0: (blocks, 2, kv_heads, 16, head_dim)
    const float* cos;          // (positions, head_dim / 2) f32 of set 0
    const float* sin;          // (positions, head_dim / 2) f32 of set 0
    const u32* position;       // (rows,)
    const u32* table;          // (rows,): row of block_tables
    const u32* model;          // (rows,)
    const u32* block_tables;   // (tables, table_stride)
    u64 model_stride;          // bytes from one model's cache to the next
    u64 angle_stride;          // bytes from one set's cos, and sin, to the next; 0 where all rotate alike
    u32 query_stride;
    u32 table_stride;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
};

// y = rms_norm(x) Wᵀ + b; queries and keys are rotated: (a, b) → (a cos − b sin, b cos + a sin) for the pair
// (i, i + head_dim / 2) of a head at its position; keys and values go to the cache.
//
// A unit is two such pairs, so that one has both halves of what it rotates.
template <typename Multiply>
__device__ void qkv(const QkvArgs& args) {
    const u32 half = args.head_dim / 2;
    const u32 pairs = (args.heads + 2 * args.kv_heads) * half;
    const auto row_of = [=](u32 unit, u32 r) {
        const u32 pair = min(2 * unit + r % 2, pairs - 1);
        return pair / half * args.head_dim + pair % half + (r / 2) * half;
    };
    const float* cos = advance(args.cos, blockIdx.z * args.angle_stride);
    const float* sin = advance(args.sin, blockIdx.z * args.angle_stride);
    const u32 keys = args.heads * args.head_dim, values = keys + args.kv_heads * args.head_dim;
    const auto segment = [=](u32 n) { return n < keys ? 0u : n < values ? 1u : 2u; };
    const auto finish = [&](u32 unit, u32 part, u32, u32 row, const float(&y)[UNIT]) {
        const u32 pair = 2 * unit + part;
        if (pair >= pairs) return;
        const u32 head = pair / half, i = pair % half, position = args.position[row];
        float a = part ? y[1] : y[0], b = part ? y[3] : y[2];
        if (head < args.heads + args.kv_heads) {
            const u64 angle = u64(position) * half + i;
            const float c = cos[angle], s = sin[angle], x = a;
            a = x * c - b * s;
            b = b * c + x * s;
        }
        if (head < args.heads) {
            float* to = args.queries + u64(row) * args.query_stride + head * args.head_dim + i;
            to[0] = a;
            to[half] = b;
            return;
        }
        const u32 kv_head = (head - args.heads) % args.kv_heads, is_value = (head - args.heads) / args.kv_heads;
        const u32 block = args.block_tables[u64(args.table[row]) * args.table_stride + position / BLOCK_SIZE];
        float* cache = advance(args.cache, args.model[row] * args.model_stride);
        const u64 at = ((u64(block) * 2 + is_value) * args.kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE;
        cache[at * args.head_dim + i] = a;
        cache[at * args.head_dim + i + half] = b;
    };
    Multiply::template run<2>(args.product, (pairs + 1) / 2, row_of, segment, finish);
}

struct ResidualArgs {
    Product product;  // norm is null
    float* hidden;    // (rows, hidden_stride) f32
    u32 hidden_stride;
};

// hidden[row, n] += (x Wᵀ + b)[row, n]
template <typename Multiply>
__device__ void residual(const ResidualArgs& args) {
    const u32 n = args.product.n;
    const auto row_of = [=](u32 unit, u32 r) { return min(unit * UNIT + r, n - 1); };
    const auto one = [](u32) { return 0u; };
    const auto finish = [&](u32 unit, u32 part, u32, u32 row, const float(&y)[UNIT]) {
        const u32 at = unit * UNIT + part;
        const float mine = part == 0 ? y[0] : part == 1 ? y[1] : part == 2 ? y[2] : y[3];
        if (at < n) args.hidden[u64(row) * args.hidden_stride + at] += mine;
    };
    Multiply::template run<UNIT>(args.product, (n + 3) / 4, row_of, one, finish);
}

struct GateUpArgs {
    Product product;   // W is gate, up: n = 2 · intermediate_size
    float* activated;  // (rows, activated_stride) f32
    u32 activated_stride;
};

// activated[row, i] = silu(g) · u with g, u = rows i and i + intermediate_size of rms_norm(x) Wᵀ + b,
// silu(g) = g / (1 + exp(−g))
template <typename Multiply>
__device__ void gate_up(const GateUpArgs& args) {
    const u32 size = args.product.n / 2;
    const auto row_of = [=](u32 unit, u32 r) { return min(2 * unit + r % 2, size - 1) + (r / 2) * size; };
    const auto segment = [=](u32 n) { return n < size ? 0u : 1u; };
    const auto finish = [&](u32 unit, u32 part, u32, u32 row, const float(&y)[UNIT]) {
        const u32 at = 2 * unit + part;
        const float gate = part ? y[1] : y[0], up = part ? y[3] : y[2];
        if (at < size) args.activated[u64(row) * args.activated_stride + at] = gate / (1.0f + __expf(-gate)) * up;
    };
    Multiply::template run<2>(args.product, (size + 1) / 2, row_of, segment, finish);
}

struct LmHeadArgs {
    Product product;   // rows lists the wanted ones
    float* logits;     // (slots of all models, vocab_stride) f32
    const u32* slot;   // (wanted,): where the logits of each wanted row go
    u32 vocab_stride;
};

// logits[slot[i], n] = (rms_norm(x[rows[i]]) Wᵀ)[n]
template <typename Multiply>
__device__ void lm_head(const LmHeadArgs& args) {
    const u32 n = args.product.n;
    const auto row_of = [=](u32 unit, u32 r) { return min(unit * UNIT + r, n - 1); };
    const auto one = [](u32) { return 0u; };
    const auto finish = [&](u32 unit, u32 part, u32 index, u32, const float(&y)[UNIT]) {
        const u32 at = unit * UNIT + part;
        const float mine = part == 0 ? y[0] : part == 1 ? y[1] : part == 2 ? y[2] : y[3];
        if (at < n) args.logits[u64(args.slot[index]) * args.vocab_stride + at] = mine;
    };
    Multiply::template run<UNIT>(args.product, (n + 3) / 4, row_of, one, finish);
}

// The kernels of one dtype: an image each, so that a program loads only what its models need.
#define PROJECTIONS_OF(T, name, M)                                                                             \
    extern "C" __global__ __launch_bounds__(256, M < 16 ? 2 : 1) void qkv_##name##_##M(const QkvArgs args) {   \
        qkv<Gemv<T, M>>(args);                                                                                 \
    }                                                                                                          \
    extern "C" __global__                                                                                      \
    __launch_bounds__(256, M < 16 ? 2 : 1) void residual_##name##_##M(const ResidualArgs args) {               \
        residual<Gemv<T, M>>(args);                                                                            \
    }                                                                                                          \
    extern "C" __global__                                                                                      \
    __launch_bounds__(256, M < 16 ? 2 : 1) void gate_up_##name##_##M(const GateUpArgs args) {                  \
        gate_up<Gemv<T, M>>(args);                                                                             \
    }                                                                                                          \
    extern "C" __global__                                                                                      \
    __launch_bounds__(256, M < 16 ? 2 : 1) void lm_head_##name##_##M(const LmHeadArgs args) {                  \
        lm_head<Gemv<T, M>>(args);                                                                             \
    }

#define PROJECTIONS(T, name) \
    PROJECTIONS_OF(T, name, 1) PROJECTIONS_OF(T, name, 4) PROJECTIONS_OF(T, name, 8) PROJECTIONS_OF(T, name, 16)
