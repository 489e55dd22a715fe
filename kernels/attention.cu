// Attention of a decoding step: one query row for each sequence, over the paged cache, split along the positions.
#include "attention.cuh"

// Positions of a split. Fixed, so that a row's result doesn't depend on the others.
constexpr u32 SPLIT = 64;
constexpr u32 WARPS = 4;

// Softmax over some positions: the largest score, Σ exp(s − m), and a lane's part of Σ exp(s − m) v.
struct State {
    float m = -INFINITE;
    float l = 0;
    float o[8] = {};

    // Positions that come together; a score of −∞ counts nothing.
    template <u32 COUNT>
    __device__ void add(const float (&scores)[COUNT], const float (&v)[COUNT][8]) {
        float top = m;
#pragma unroll
        for (u32 p = 0; p < COUNT; p++) top = fmaxf(top, scores[p]);
        if (top == -INFINITE) return;
        const float a = __expf(m - top);
        m = top;
        l *= a;
#pragma unroll
        for (u32 i = 0; i < 8; i++) o[i] *= a;
#pragma unroll
        for (u32 p = 0; p < COUNT; p++) {
            const float weight = __expf(scores[p] - top);
            l += weight;
#pragma unroll
            for (u32 i = 0; i < 8; i++) o[i] = fmaf(weight, v[p][i], o[i]);
        }
    }

    __device__ void merge(float other_m, float other_l, const float (&other_o)[8]) {
        const float top = fmaxf(m, other_m);
        if (top == -INFINITE) return;
        const float a = __expf(m - top), b = __expf(other_m - top);
        m = top;
        l = l * a + other_l * b;
#pragma unroll
        for (u32 i = 0; i < 8; i++) o[i] = o[i] * a + other_o[i] * b;
    }
};

// A lane's eight numbers of a query, key or value.
__device__ void load8(const float* from, u32 d, u32 head_dim, bool exists, float (&x)[8]) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) x[i] = 0;
    if (!exists || d >= head_dim) return;
    if (head_dim % 8 == 0) {
        const float4* at = reinterpret_cast<const float4*>(from + d);
        const float4 low = __ldg(at), high = __ldg(at + 1);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
        return;
    }
    // Heads that sixteen bytes don't divide.
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        if (d + i < head_dim) x[i] = from[d + i];
    }
}

// partial, state = the softmax-weighted sum of the values at one split's positions, for G query heads of one key head
//
// grid    (kv_heads · ⌈group / G⌉, splits, rows) × 128 threads; `lanes` lanes are a position, a warp has 32 / lanes
// shared  WARPS · G · (head_dim + 2) f32
// bytes   keys and values once for up to G query heads: 2 · positions · head_dim · 4
// bound   memory bandwidth
// needs   blocks of every position up to position[row]; head_dim even, at most 256
template <u32 G>
__device__ void attention(const AttentionArgs& args) {
    extern __shared__ float memory[];
    const u32 row = args.alone[blockIdx.z], split = blockIdx.y;
    const u32 length = args.position[row] + 1;
    const u32 first = split * SPLIT, last = min(length, first + SPLIT);
    if (first >= last) return;
    const u32 group = args.heads / args.kv_heads, chunks = (group + G - 1) / G;
    const u32 kv_head = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
    const u32 head = kv_head * group + chunk * G, heads = min(G, group - chunk * G);
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 at_once = WARP / args.lanes, mine = lane / args.lanes, d = lane % args.lanes * 8;
    const float* cache = advance(args.cache, args.model[row] * args.model_stride);
    const u32* blocks = args.block_tables + u64(args.table[row]) * args.table_stride;

    float q[G][8];
    State states[G];
#pragma unroll
    for (u32 g = 0; g < G; g++) {
        const float* from = args.queries + u64(row) * args.query_stride + (head + g) * args.head_dim;
        load8(from, d, args.head_dim, g < heads, q[g]);
#pragma unroll
        for (u32 i = 0; i < 8; i++) q[g][i] *= args.scale;
    }

    // Several positions a lane come at once, so that few times anything waits for memory.
    constexpr u32 AT_ONCE = G <= 4 ? 4 : 2;
    const u32 step = WARPS * at_once;
    for (u32 base = first + warp * at_once + mine; base - mine < last; base += AT_ONCE * step) {
        u32 block[AT_ONCE];
        float k[AT_ONCE][8], v[AT_ONCE][8], scores[G][AT_ONCE];
#pragma unroll
        for (u32 p = 0; p < AT_ONCE; p++) block[p] = blocks[min(base + p * step, last - 1) / BLOCK_SIZE];
#pragma unroll
        for (u32 p = 0; p < AT_ONCE; p++) {
            const u32 position = base + p * step;
            const bool exists = position < last;
            const u64 slot = (u64(block[p]) * 2 * args.kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE;
            load8(cache + slot * args.head_dim, d, args.head_dim, exists, k[p]);
            load8(cache + (slot + u64(args.kv_heads) * BLOCK_SIZE) * args.head_dim, d, args.head_dim, exists, v[p]);
        }
#pragma unroll
        for (u32 g = 0; g < G; g++) {
#pragma unroll
            for (u32 p = 0; p < AT_ONCE; p++) {
                scores[g][p] = 0;
#pragma unroll
                for (u32 i = 0; i < 8; i++) scores[g][p] = fmaf(q[g][i], k[p][i], scores[g][p]);
            }
        }
#pragma unroll
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
            if (distance >= args.lanes) continue;
#pragma unroll
            for (u32 g = 0; g < G; g++) {
#pragma unroll
                for (u32 p = 0; p < AT_ONCE; p++) scores[g][p] += __shfl_xor_sync(ALL_LANES, scores[g][p], distance);
            }
        }
#pragma unroll
        for (u32 g = 0; g < G; g++) {
#pragma unroll
            for (u32 p = 0; p < AT_ONCE; p++) {
                if (base + p * step >= last) scores[g][p] = -INFINITE;
            }
            states[g].add(scores[g], v);
        }
    }

    // The positions of a warp, then the warps.
    float* sums = memory;                                    // (WARPS, G, head_dim)
    float* scalars = memory + WARPS * G * args.head_dim;     // (WARPS, G, 2)
#pragma unroll
    for (u32 g = 0; g < G; g++) {
        for (u32 distance = args.lanes; distance < WARP; distance *= 2) {
            const float m = __shfl_xor_sync(ALL_LANES, states[g].m, distance);
            const float l = __shfl_xor_sync(ALL_LANES, states[g].l, distance);
            float o[8];
#pragma unroll
            for (u32 i = 0; i < 8; i++) o[i] = __shfl_xor_sync(ALL_LANES, states[g].o[i], distance);
            states[g].merge(m, l, o);
        }
        if (mine == 0) {
            float* to = sums + (warp * G + g) * args.head_dim;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                if (d + i < args.head_dim) to[d + i] = states[g].o[i];
            }
            if (d == 0) {
                scalars[2 * (warp * G + g)] = states[g].m;
                scalars[2 * (warp * G + g) + 1] = states[g].l;
            }
        }
    }
    __syncthreads();
    for (u32 index = threadIdx.x; index < heads * args.head_dim; index += blockDim.x) {
        const u32 g = index / args.head_dim, i = index % args.head_dim;
        float top = -INFINITE;
        for (u32 w = 0; w < WARPS; w++) top = fmaxf(top, scalars[2 * (w * G + g)]);
        float sum = 0, total = 0;
        for (u32 w = 0; w < WARPS; w++) {
            const float weight = __expf(scalars[2 * (w * G + g)] - top);
            sum = fmaf(weight, sums[(w * G + g) * args.head_dim + i], sum);
            total = fmaf(weight, scalars[2 * (w * G + g) + 1], total);
        }
        const u64 at = (u64(blockIdx.z) * args.heads + head + g) * args.splits + split;
        args.partial[at * args.head_dim + i] = sum;
        if (i == 0) {
            args.state[2 * at] = top;
            args.state[2 * at + 1] = total;
        }
    }
}

// attended[row, head, :] = Σ_split e^(m − max m) partial / Σ_split e^(m − max m) l
//
// grid   (heads, rows) × 128 threads
// bytes  what the splits of a row wrote: heads · splits · (head_dim + 2) f32; bound by latency
extern "C" __global__ __launch_bounds__(128) void attention_merge(const AttentionArgs args) {
    const u32 head = blockIdx.x, row = args.alone[blockIdx.y], lane = threadIdx.x % WARP;
    const u32 splits = args.position[row] / SPLIT + 1;
    const u64 first = (u64(blockIdx.y) * args.heads + head) * args.splits;
    const float* state = args.state + 2 * first;
    float top = -INFINITE, total = 0;
    for (u32 s = lane; s < splits; s += WARP) top = fmaxf(top, state[2 * s]);
#pragma unroll
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, distance));
    for (u32 s = lane; s < splits; s += WARP) total = fmaf(__expf(state[2 * s] - top), state[2 * s + 1], total);
    total = warp_sum(total);
    for (u32 i = threadIdx.x; i < args.head_dim; i += blockDim.x) {
        float sum = 0;
#pragma unroll 8
        for (u32 s = 0; s < splits; s++) {
            sum = fmaf(__expf(state[2 * s] - top), args.partial[(first + s) * args.head_dim + i], sum);
        }
        args.attended[u64(row) * args.query_stride + head * args.head_dim + i] = sum / total;
    }
}

#define ATTENTION(G) \
    extern "C" __global__ __launch_bounds__(128) void attention_##G(const AttentionArgs args) { attention<G>(args); }

ATTENTION(1) ATTENTION(2) ATTENTION(4) ATTENTION(8)
