// y = W x for a few rows of x: the part that the projections of a decoding step share.
//
// A warp computes four outputs for up to M rows. Its lanes walk along K in panels of 256 columns: sixteen bytes of
// each weight row a lane and step, four rows in flight, each weight read once for all rows of x. The rows of x lie in
// shared memory as f32, in an order in which a warp reads them without bank conflicts.
//
// A row's sum has one order, whatever M and the chunks: along a lane by column, then over the lanes as a butterfly.
// So a sequence decodes to the same bits alone and among others, as long as all go through here.
//
// RMSNorm costs no pass of its own: x·w is staged, its squares are summed on the way, panel by panel, and the scalar
// 1/√(mean x² + ε) multiplies the result.
#pragma once

#include "lora.cuh"

constexpr u32 GEMV_WARPS = 8;
constexpr u32 PANEL = 256;           // columns that a warp reads at once
constexpr u32 PLANE = 144;           // where the second half of a staged panel begins: 128 and a shift of 16 banks
constexpr u32 STAGED = PLANE + 128;  // numbers of a staged panel

// One lane's sixteen or thirty-two bytes of a weight row's panel.
template <typename T>
struct Piece {
    uint4 raw;
    __device__ void load(const T* row, u32 panel, u32 lane, u32 stride) {
        const u32 k = panel * PANEL + 8 * lane;
        raw = k < stride ? __ldg(reinterpret_cast<const uint4*>(row + k)) : uint4{0, 0, 0, 0};
    }
    __device__ void get(float (&w)[8]) const { unpack(raw, w, static_cast<const T*>(nullptr)); }
    // Where the q-th four columns of a panel are staged: a lane's eight columns are two fours, a plane apart.
    static __device__ u32 place(u32 q) { return (q % 2) * PLANE + (q / 2) * 4; }
};

template <>
struct Piece<float> {
    float4 low, high;
    __device__ void load(const float* row, u32 panel, u32 lane, u32 stride) {
        const u32 k = panel * PANEL + 4 * lane;
        const float4 zero = {0, 0, 0, 0};
        low = k < stride ? __ldg(reinterpret_cast<const float4*>(row + k)) : zero;
        high = k + 128 < stride ? __ldg(reinterpret_cast<const float4*>(row + k + 128)) : zero;
    }
    __device__ void get(float (&w)[8]) const {
        w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
        w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
    }
    static __device__ u32 place(u32 q) { return (q / 32) * PLANE + (q % 32) * 4; }
};

// Dynamic shared memory: staged rows (M, chunk, STAGED), squares (M, panels), sums (warps, M, outputs), ticket.
template <u32 M>
struct Shared {
    float* staged;
    float* squares;
    float* sums;
    u32* ticket;
    __device__ Shared(float* memory, u32 chunk, u32 panels)
        : staged(memory), squares(memory + M * chunk * STAGED), sums(squares + M * panels),
          ticket(reinterpret_cast<u32*>(sums + GEMV_WARPS * UNIT * M)) {}
};

// Stages the panels first .. first + count of all rows, and sums the squares of each.
template <typename T, u32 M>
__device__ void stage(const Product& p, const float* norm, Span span, Shared<M> shared, u32 first, u32 count, u32 panels) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 task = warp; task < M * count; task += GEMV_WARPS) {
        const u32 m = task / count, panel = task % count;
        const bool exists = m < span.count;
        const u32 row = !exists ? 0 : p.rows ? p.rows[span.first + m] : span.first + m;
        const float* x = static_cast<const float*>(p.x) + u64(row) * p.stride;
        float* to = shared.staged + (m * p.chunk + panel) * STAGED;
        float squares = 0;
#pragma unroll
        for (u32 half = 0; half < 2; half++) {
            const u32 q = lane + WARP * half;
            const u32 k = (first + panel) * PANEL + 4 * q;
            float4 v = {0, 0, 0, 0};
            if (exists && k < p.stride) v = *reinterpret_cast<const float4*>(x + k);
            if (norm) {
                squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
                if (k < p.stride) {
                    const float4 w = __ldg(reinterpret_cast<const float4*>(norm + k));
                    v.x *= w.x, v.y *= w.y, v.z *= w.z, v.w *= w.w;
                }
            }
            *reinterpret_cast<float4*>(to + Piece<T>::place(q)) = v;
        }
        if (norm) {
            squares = warp_sum(squares);
            if (lane == 0) shared.squares[m * panels + first + panel] = squares;
        }
    }
}

// The four weight rows of a unit, and those of their panels that are on their way.
template <typename T, u32 AHEAD>
struct Stream {
    const T* row[UNIT];
    Piece<T> pieces[AHEAD][UNIT];
    // Asks for the panels panel .. panel + AHEAD.
    __device__ void load(u32 panel, u32 panels, u32 lane, u32 stride) {
#pragma unroll
        for (u32 a = 0; a < AHEAD; a++) {
            if (panel + a >= panels) continue;
#pragma unroll
            for (u32 r = 0; r < UNIT; r++) pieces[a][r].load(row[r], panel + a, lane, stride);
        }
    }
};

// The product for up to M rows of each set.
template <typename T, u32 M>
struct Gemv {
    // Calls finish(unit, part, index, row, y) for each unit, part of a unit and row, with the four outputs y; `PARTS`
    // lanes of the unit's warp take a part each.
    //
    // `row_of(unit, r)` is the weight row of output r of a unit; past the end it may be any row that exists, and finish
    // drops it. `segment(row)` is the part of lora_t that belongs to a weight row.
    //
    // Weights don't depend on what is staged: a tile's first panels are asked for before that, or while the tile before it
    // is finished. Warps of a block meet only where rows are staged.
    template <u32 PARTS, typename RowOf, typename Segment, typename Finish>
    static __device__ void run(const Product& p, u32 units, RowOf row_of, Segment segment, Finish finish) {
        extern __shared__ float4 memory[];
        const u32 set = blockIdx.z, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
        u32 ticket = 0;
        if (p.producers && threadIdx.x == 0) ticket = atomicAdd(p.progress + 2 * set, 1);
        const u32 panels = (p.stride + PANEL - 1) / PANEL;
        const Shared<M> shared(reinterpret_cast<float*>(memory), p.chunk, panels);
        const T* weights = advance(static_cast<const T*>(p.weights), set * p.set_stride);
        const float* norm = p.norm ? advance(p.norm, set * p.set_stride) : nullptr;
        const float* bias = p.bias ? advance(p.bias, set * p.set_stride) : nullptr;
        const u32 tiles = (units + GEMV_WARPS - 1) / GEMV_WARPS;
        constexpr u32 AHEAD = M <= 4 ? 2 : 1;  // panels in flight

        const u32 blocks = gridDim.x - p.producers;
        u32 tile = blockIdx.x;
        if (p.producers) {
            if (threadIdx.x == 0) *shared.ticket = ticket;
            __syncthreads();
            ticket = *shared.ticket;
            if (ticket < p.producers) return produce(p, norm, set, ticket);
            tile = ticket - p.producers;
        }
        Stream<T, AHEAD> stream;
        bool asked = false;  // for the panels that come next
        const auto begin = [&](u32 unit) {
#pragma unroll
            for (u32 r = 0; r < UNIT; r++) stream.row[r] = weights + u64(row_of(unit, r)) * p.stride;
            stream.load(0, panels, lane, p.stride);
            asked = true;
        };
        if (tile < tiles) begin(tile * GEMV_WARPS + warp);
        const Span span(p, set, 0, M);
        if (span.count == 0) return;
        bool staged = false;
        float scale = 0;  // lane m: 1/√(mean x² + ε) of row m
        float* mine = shared.sums + warp * UNIT * M;
        for (; tile < tiles; tile += blocks) {
            const u32 unit = tile * GEMV_WARPS + warp;
            float sums[UNIT][M] = {};

            for (u32 first = 0; first < panels; first += p.chunk) {
                const u32 count = min(p.chunk, panels - first);
                // Where all panels fit at once they stay for all tiles.
                if (!staged || panels > p.chunk) {
                    __syncthreads();
                    stage<T, M>(p, norm, span, shared, first, count, panels);
                    __syncthreads();
                    if (norm && lane < M && first + count == panels) {
                        float total = 0;
                        for (u32 panel = 0; panel < panels; panel++) total += shared.squares[lane * panels + panel];
                        scale = 1.0f / sqrtf(total / float(p.cols) + norm[p.stride]);
                    }
                    staged = true;
                }
                // A chunk that isn't the last is a multiple of AHEAD.
                for (u32 panel = 0; panel < count; panel += AHEAD) {
                    if (!asked) stream.load(first + panel, panels, lane, p.stride);
                    asked = false;
#pragma unroll
                    for (u32 a = 0; a < AHEAD; a++) {
                        if (panel + a >= count) continue;
                        float w[UNIT][8];
#pragma unroll
                        for (u32 r = 0; r < UNIT; r++) stream.pieces[a][r].get(w[r]);
#pragma unroll
                        for (u32 m = 0; m < M; m++) {
                            const float* from = shared.staged + (m * p.chunk + panel + a) * STAGED + 4 * lane;
                            const float4 low = *reinterpret_cast<const float4*>(from);
                            const float4 high = *reinterpret_cast<const float4*>(from + PLANE);
                            const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
                            for (u32 r = 0; r < UNIT; r++) {
#pragma unroll
                                for (u32 i = 0; i < 8; i++) sums[r][m] = fmaf(w[r][i], x[i], sums[r][m]);
                            }
                        }
                    }
                }
            }

#pragma unroll
            for (u32 r = 0; r < UNIT; r++) {
#pragma unroll
                for (u32 m = 0; m < M; m++) {
                    const float sum = warp_sum(sums[r][m]);
                    if (lane == 0) mine[m * UNIT + r] = sum;
                }
            }
            if (tile + blocks < tiles) begin(unit + blocks * GEMV_WARPS);
            if (p.producers && tile < blocks) {
                if (threadIdx.x == 0) await_producers(p, set);
                __syncthreads();
            }
            __syncwarp();
            // From here on the rows come one after another: unrolled, this part would be most of the code.
#pragma unroll 1
            for (u32 m = 0; m < span.count; m++) {
                const u32 x_row = p.rows ? p.rows[span.first + m] : span.first + m;
                const u32 adapter = p.lora_b ? p.adapter[x_row] : NO_ADAPTER;
                const float factor = norm ? __shfl_sync(ALL_LANES, scale, m) : 1.0f;
                float y[UNIT];
#pragma unroll
                for (u32 r = 0; r < UNIT; r++) {
                    const u32 n = row_of(unit, r);
                    y[r] = mine[m * UNIT + r] * factor;
                    if (adapter != NO_ADAPTER) {
                        const float* b = advance(p.lora_b, adapter * p.lora_stride) + u64(n) * p.rank;
                        const float* t = p.lora_t + (u64(x_row) * p.segments + segment(n)) * p.rank;
                        float delta = 0;
                        for (u32 j = lane; j < p.rank; j += WARP) delta = fmaf(b[j], __ldcg(t + j), delta);
                        y[r] += warp_sum(delta);
                    }
                    if (bias) y[r] += bias[n];
                }
                if (lane < PARTS) finish(unit, lane, span.first + m, x_row, y);
            }
            // The next tile writes sums again.
            __syncwarp();
        }
    }
};
