// What attention reads and writes, whether row by row (attention.cu) or on tensor cores (attention_wide.cu).
#pragma once

#include "common.cuh"

struct AttentionArgs {
    const float* queries;     // (rows, query_stride) f32, rotated
    const float* cache;       // this layer of model 0: (blocks, 2, kv_heads, 16, head_dim)
    float* partial;           // (launched rows, heads, splits, head_dim): Σ exp(s − m) v
    float* state;             // (launched rows, heads, splits, 2): m = max s, l = Σ exp(s − m)
    float* attended;          // (rows, query_stride) f32
    const u32* position;      // (rows,)
    const u32* table;         // (rows,)
    const u32* model;         // (rows,)
    const u32* block_tables;  // (tables, table_stride)
    const u32* alone;         // (launched rows,): the rows that attend by themselves
    const u32* tile_first;    // (tiles,): the first row of each tile of attention_wide
    const u32* tile_rows;     // (tiles,): rows of each, of one sequence, by position
    u64 model_stride;         // bytes from one model's cache to the next
    u32 query_stride;
    u32 table_stride;
    u32 heads;
    u32 kv_heads;
    u32 head_dim;
    u32 splits;               // of the launch: at least position / 64 + 1 of every row
    u32 lanes;                // that share a position: a power of two, lanes · 8 ≥ head_dim
    float scale;              // 1 / √head_dim
};
