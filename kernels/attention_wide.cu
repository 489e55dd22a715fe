// Attention of a prompt: up to 64 rows of one sequence together, on tensor cores, over the paged cache.
#include "async.cuh"
#include "attention.cuh"
#include "tf32.cuh"

constexpr u32 THREADS = 128;  // four warps of sixteen rows
constexpr u32 COLUMNS = 128;  // of the values that a block computes at most

// c = a · b of f32 factors.
__device__ inline void multiply(float (&c)[4], const float (&a)[4], float b0, float b1) {
    u32 high[4], low[4], b_high[2], b_low[2];
#pragma unroll
    for (u32 i = 0; i < 4; i++) split(a[i], high[i], low[i]);
    split(b0, b_high[0], b_low[0]);
    split(b1, b_high[1], b_low[1]);
    mma_f32(c, high, low, b_high[0], b_high[1], b_low[0], b_low[1]);
}

// The sixteen keys (part 0) or values (part 1) of one block of the cache, on their way to `staged`; those after `last`
// are zeros, because nothing has been written there.
__device__ inline void fetch(const AttentionArgs& args, const float* cache, u32 block, u32 kv_head, u32 part, u32 last, float* staged, u32 stride) {
    const float* from = cache + ((u64(block) * 2 + part) * args.kv_heads + kv_head) * BLOCK_SIZE * args.head_dim;
    const u32 pieces = args.head_dim / 4;
    for (u32 at = threadIdx.x; at < BLOCK_SIZE * pieces; at += THREADS) {
        const u32 key = at / pieces, piece = at % pieces;
        copy_async(staged + key * stride + 4 * piece, from + u64(at) * 4, key <= last);
    }
    commit_copies();
}

// attended[row, head, :] = Σ_k softmax_k(q[row, head] · K[k] / √head_dim) V[k] over the positions k up to the row's own
//
// Sixteen positions, a block of the cache, at a time: scores, their softmax in online form, and its product with the
// values, by mma.sync m16n8k8 of tf32 with three products for one (tf32.cuh), each sum of eight from zero and added by
// f32 instructions. The keys of the next block come while this one's values are multiplied, and the other way round. Rows
// of staged keys and values are an odd number of four banks long: fragments are read without conflicts.
//
// grid   (tiles, heads, ⌈head_dim / 128⌉) × 128 threads; a warp is sixteen rows, blockIdx.z 128 columns of the values
// shared 2 · 16 · (head_dim rounded up to 32, + 4) f32
// bytes  keys and values of a sequence once for each tile and head, from the L2 cache
// bound  tensor cores: 12 · positions · head_dim operations a row and head, three times those of one product
// needs  head_dim a multiple of 8, at most 256, and at most 8 · N where N < 16; rows of a tile of one table and one
//        model, by position; blocks of every position up to the last row's
template <u32 N>
__device__ void attention_wide(const AttentionArgs& args) {
    extern __shared__ float4 memory[];
    const u32 head = blockIdx.y, kv_head = head / (args.heads / args.kv_heads), head_dim = args.head_dim;
    const u32 first_row = args.tile_first[blockIdx.x], count = args.tile_rows[blockIdx.x];
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const u32 stride = (head_dim + 31) / 32 * 32 + 4, column = blockIdx.z * COLUMNS;
    float* const keys = reinterpret_cast<float*>(memory);  // (16, stride)
    float* const values = keys + BLOCK_SIZE * stride;      // (16, stride)
    const float* cache = advance(args.cache, args.model[first_row] * args.model_stride);
    const u32* blocks = args.block_tables + u64(args.table[first_row]) * args.table_stride;
    const u32 last = args.position[first_row + count - 1];

    // A lane has two rows of the tile; one that doesn't exist sees what the tile's first sees, and is dropped.
    u32 row[2], position[2];
    const float* q[2];
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        row[i] = warp * 16 + g + 8 * i;
        const u32 real = first_row + (row[i] < count ? row[i] : 0);
        position[i] = args.position[real];
        q[i] = args.queries + u64(real) * args.query_stride + head * head_dim;
    }
    // Positions after this one concern no row of this warp.
    const bool has_rows = warp * 16 < count;
    const u32 reach = args.position[first_row + min(warp * 16 + 15, count - 1)];
    const u32 least = args.position[first_row + min(warp * 16, count - 1)];
    float o[N][4] = {};
    float top[2] = {-INFINITE, -INFINITE}, sum[2] = {0, 0};

    fetch(args, cache, blocks[0], kv_head, 0, last, keys, stride);
    fetch(args, cache, blocks[0], kv_head, 1, last, values, stride);
    for (u32 base = 0; base <= last; base += BLOCK_SIZE) {
        const u32 next = base + BLOCK_SIZE;
        await_copies<1>();
        __syncthreads();
        float s[2][4] = {};
        const bool is_used = has_rows && base <= reach;
        if (is_used) {
            for (u32 k = 0; k < head_dim; k += 8) {
                float a[4];
#pragma unroll
                for (u32 i = 0; i < 4; i++) a[i] = __ldg(q[i % 2] + k + t + i / 2 * 4) * args.scale;
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    const float* b = keys + (8 * j + g) * stride + k + t;
                    float of_columns[4];
                    multiply(of_columns, a, b[0], b[4]);
#pragma unroll
                    for (u32 i = 0; i < 4; i++) s[j][i] += of_columns[i];
                }
            }
        }
        __syncthreads();
        if (next <= last) fetch(args, cache, blocks[next / BLOCK_SIZE], kv_head, 0, last - next, keys, stride);
        else commit_copies();

        // s[j][2 i + c] is row i of the lane's two and position base + 8 j + 2 t + c.
        float shrink[2];
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            float largest = -INFINITE;
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float& x = s[j][2 * i + c];
                    if (base + 8 * j + 2 * t + c > position[i]) x = -INFINITE;
                    largest = fmaxf(largest, x);
                }
            }
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(ALL_LANES, largest, 2));
            // The first block has position 0, which every row sees: from then on the top is a number.
            largest = fmaxf(largest, top[i]);
            shrink[i] = __expf(top[i] - largest);
            top[i] = largest;
            float total = 0;
#pragma unroll
            for (u32 j = 0; j < 2; j++) {
#pragma unroll
                for (u32 c = 0; c < 2; c++) {
                    float& x = s[j][2 * i + c];
                    x = __expf(x - largest);
                    total += x;
                }
            }
            sum[i] = sum[i] * shrink[i] + total;
        }

        await_copies<1>();
        __syncthreads();
        if (is_used) {
            // Where some row doesn't see all positions, its weights are zeros, and a zero doesn't hide what can't be split:
            // such a value counts as nothing, and makes NaN of the rows that see it.
            const bool is_edge = base + BLOCK_SIZE - 1 > least;
            u32 spoilt = 0;
#pragma unroll
            for (u32 n = 0; n < N; n++) {
                if (column + 8 * n >= head_dim) break;
                float of_keys[2][4];
#pragma unroll
                for (u32 j = 0; j < 2; j++) {
                    // Where mma has columns t and t + 4 of its factor stand the weights of positions 2 t and 2 t + 1.
                    const float a[4] = {s[j][0], s[j][2], s[j][1], s[j][3]};
                    const u32 key = 8 * j + 2 * t;
                    const float* b = values + key * stride + column + g + 8 * n;
                    float b0 = b[0], b1 = b[stride];
                    if (is_edge) {
                        if (!(fabsf(b0) <= LARGEST_SPLIT)) b0 = 0, spoilt |= 1u << key;
                        if (!(fabsf(b1) <= LARGEST_SPLIT)) b1 = 0, spoilt |= 2u << key;
                    }
                    multiply(of_keys[j], a, b0, b1);
                }
#pragma unroll
                for (u32 i = 0; i < 4; i++) o[n][i] = fmaf(o[n][i], shrink[i / 2], of_keys[0][i] + of_keys[1][i]);
            }
            if (is_edge) {
                spoilt = __reduce_or_sync(ALL_LANES, spoilt);
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    const u32 seen = position[i] < base ? 0 : (2u << min(position[i] - base, 15u)) - 1;
                    if (spoilt & seen) sum[i] = __int_as_float(0x7fffffff);
                }
            }
        }
        __syncthreads();
        if (next <= last) fetch(args, cache, blocks[next / BLOCK_SIZE], kv_head, 1, last - next, values, stride);
        else commit_copies();
    }

#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
        if (row[i] >= count) continue;
        float* to = args.attended + u64(first_row + row[i]) * args.query_stride + head * head_dim + column + 2 * t;
#pragma unroll
        for (u32 n = 0; n < N; n++) {
            if (column + 8 * n >= head_dim) break;
            *reinterpret_cast<float2*>(to + 8 * n) = {o[n][2 * i] / sum[i], o[n][2 * i + 1] / sum[i]};
        }
    }
}

#define ATTENTION_WIDE(N)                                                                            \
    extern "C" __global__ __launch_bounds__(128) void attention_wide_##N(const AttentionArgs args) { \
        attention_wide<N>(args);                                                                     \
    }

ATTENTION_WIDE(8) ATTENTION_WIDE(16)
