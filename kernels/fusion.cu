// The whole search for α, and the choice of the token, in one launch.
//
// Every number of the method is a sum over a tilted distribution, so one code path gives them all. A lane has a base
// (the logits of the large model, of the small one or of an expert), an α and a direction D, and keeps, for
// x = base + α d, d = E − S:
//
//     m = max x      s = Σ exp(x − m)      u = Σ exp(x − m) d      argmax x
//
//     KL(P̃‖P) = α u/s − A     KL(P‖P̃) = A − α u₀/s₀     A = (m + ln s) − (m₀ + ln s₀)     0: the lane with α = 0
//
// All lanes of all experts walk over the same tokens: each logit is read from memory once, whatever their number.
//
// grid    (slices, rows) × 256 threads. A warp loads 32 tokens of every model, coalesced, into shared memory; then
//         its lanes walk over them, each for its own candidate, 32 candidates a round: reads are broadcasts, and no
//         candidate needs a shuffle. The warps of a block merge, a block writes its partial states, and the last
//         block of a row (a ticket after a fence) merges the slices in order, decides in f64 and resets the ticket,
//         so that a graph can replay the launch.
//         Where the minimum between candidates is sought, it follows from the same sums; the last block then reads the
//         row again, from the L2 cache, for what belongs to that α.
// bytes   (2 + experts) · vocab_size · 4 a row, and the partial states twice: slices · lanes · 24
// bound   latency: at 32000 tokens the logits lie in the L2 cache, and the walk is a few thousand instructions a warp
// needs   vocab_stride ≥ vocab_size; lanes ≤ 32 · ROUNDS; tickets zero before the first launch
#include "noise.cuh"
#include "refine.cuh"

constexpr u32 WARPS = 8;
constexpr u32 COMBINED = MAX_EXPERTS;   // the direction Σ c_t D_t
constexpr u32 NO_DIRECTION = COMBINED + 1;
constexpr u64 ALL_FINITE = ~0ull;

struct alignas(8) Partial {
    float m, s, u;
    u32 best;      // argmax x, the lowest id where several tie
    float key;     // max x / τ + g
    u32 drawn;     // its argmax
};

struct FuseArgs {
    const float* const* models;  // (model_count,): where the logits of each lie, (slots, vocab_stride)
    const FuseRow* rows;     // (rows,)
    const FuseLane* lanes;
    Partial* partial;        // (rows, slices, lane_stride)
    u32* tickets;            // (rows,)
    u64* not_finite;         // (rows,): ALL_FINITE between launches
    FuseResult* results;     // (rows,)
    const u64* stamps;       // (2,): when the step began and when the large model was done, or null
    u32 vocab_stride;
    u32 vocab_size;
    u32 small_model;         // index of the small model
    u32 first_expert;        // index of expert 0; the others follow
    u32 slice;               // tokens of a slice: a multiple of 256
    u32 lane_stride;
    u32 model_count;         // at most MAX_MODELS
};

// What another block wrote: past the first-level cache.
__device__ Partial read(const Partial* from) {
    const uint2* x = reinterpret_cast<const uint2*>(from);
    const uint2 a = __ldcg(x), b = __ldcg(x + 1), c = __ldcg(x + 2);
    return {__uint_as_float(a.x), __uint_as_float(a.y), __uint_as_float(b.x), b.y, __uint_as_float(c.x), c.y};
}

// Both parts together; the lower id where two tie.
__device__ void merge(Partial& a, const Partial& b) {
    if (b.m == -INFINITE) return;
    if (a.m == -INFINITE) {
        a = b;
        return;
    }
    if (b.m > a.m || (b.m == a.m && b.best < a.best)) a.best = b.best;
    if (b.key > a.key || (b.key == a.key && b.drawn < a.drawn)) a.key = b.key, a.drawn = b.drawn;
    const float top = fmaxf(a.m, b.m), x = expf(a.m - top), y = expf(b.m - top);
    a.s = a.s * x + b.s * y;
    a.u = a.u * x + b.u * y;
    a.m = top;
}

// The tokens of a tile as lanes read them: base logits, then differences, 32 numbers each.
struct Tile {
    float* memory;
    u32 experts;
    __device__ float* base(u32 b) const { return memory + b * WARP; }
    __device__ float* difference(u32 d) const { return memory + (2 + experts + min(d, experts + 1)) * WARP; }
    __device__ float* combined() const { return difference(experts); }
    __device__ float* zero() const { return difference(experts + 1); }
    __device__ float* noise() const { return memory + (4 + 2 * experts) * WARP; }
    static __device__ u32 size(u32 experts) { return (5 + 2 * experts) * WARP; }
};

// Loads the token of this lane; notes the first logit that is not finite.
__device__ void load(
    const FuseArgs& args, const FuseRow& row, const float* const* models, const Tile& tile, u32 token, u32 row_index
) {
    const u32 lane = threadIdx.x % WARP;
    const bool exists = token < args.vocab_size;
    const u64 at = u64(row.slot) * args.vocab_stride + token;
    bool excluded = !exists;
    const auto read = [&](u32 model) {
        const float x = exists ? models[model][at] : -INFINITE;
        if (!(x < INFINITE)) atomicMin(args.not_finite + row_index, u64(token) * 16 + model);
        excluded |= x == -INFINITE;
        return x;
    };
    float large = read(row.base_model), small = 0, combined = 0;
    if (row.experts) small = read(args.small_model);
#pragma unroll 1
    for (u32 t = 0; t < row.experts; t++) {
        const float expert = read(args.first_expert + t), d = expert - small;
        tile.base(2 + t)[lane] = expert;
        tile.difference(t)[lane] = d;
        combined = fmaf(row.coefficient[t], d, combined);
    }
    if (excluded) {
        // No weight in any lane, and no difference.
        large = small = -INFINITE;
        combined = 0;
        for (u32 t = 0; t < row.experts; t++) tile.base(2 + t)[lane] = -INFINITE, tile.difference(t)[lane] = 0;
    }
    tile.base(0)[lane] = large;
    tile.base(1)[lane] = small;
    tile.combined()[lane] = combined;
    tile.zero()[lane] = 0;
    tile.noise()[lane] = row.scale > 0 ? gumbel(philox(row, token)) : 0;
}

// One lane's walk over a tile that begins at token `first`.
__device__ void walk(const FuseRow& row, const Tile& tile, const FuseLane& lane, u32 first, Partial& state) {
    const float* base = tile.base(lane.base);
    const float* d = lane.direction == NO_DIRECTION ? tile.zero()
                     : lane.direction == COMBINED   ? tile.combined()
                                                    : tile.difference(lane.direction);
    float top = -INFINITE;
    u32 best = 0;
#pragma unroll 8
    for (u32 i = 0; i < WARP; i++) {
        const float x = fmaf(lane.alpha, d[i], base[i]);
        if (x > top) top = x, best = i;
    }
    if (top == -INFINITE) return;
    if (row.scale > 0) {
        for (u32 i = 0; i < WARP; i++) {
            const float key = fmaf(fmaf(lane.alpha, d[i], base[i]), row.scale, tile.noise()[i]);
            if (key > state.key) state.key = key, state.drawn = first + i;
        }
    }
    if (top > state.m) {
        // Where nothing was summed yet, the factor is exp(−∞) = 0.
        const float factor = expf(state.m - top);
        state.s *= factor, state.u *= factor, state.m = top, state.best = first + best;
    }
#pragma unroll 8
    for (u32 i = 0; i < WARP; i++) {
        const float e = expf(fmaf(lane.alpha, d[i], base[i]) - state.m);
        state.s += e;
        state.u = fmaf(e, d[i], state.u);
    }
}

// What the last block of a row keeps of each merged lane.
struct Merged {
    double log_sum, mean;
    u32 best, drawn;
    float alpha;
    u32 empty;
};

__device__ double square(double x) { return x * x; }

// KL(tilted‖base) and KL(base‖tilted); exactly 0 at α = 0.
__device__ void divergences(const Merged& base, const Merged& tilted, double alpha, double& forward, double& reverse) {
    const double a = tilted.log_sum - base.log_sum;
    forward = alpha == 0 ? 0 : alpha * tilted.mean - a;
    reverse = alpha == 0 ? 0 : a - alpha * base.mean;
}

// Equation 6, or one of its terms.
__device__ double loss_of(const FuseRow& row, const FuseResult& result, double forward, double reverse) {
    double loss = 0;
    for (u32 t = 0; t < row.experts; t++) {
        if (row.objective != 2) loss += square(forward - result.forward_target[t]);
        if (row.objective != 1) loss += square(reverse - result.reverse_target[t]);
    }
    return loss;
}

// What follows from the chosen distribution.
__device__ void settle(const FuseRow& row, FuseResult& result, const Merged& chosen) {
    result.log_sum_fused = chosen.log_sum;
    result.argmax_fused = chosen.best;
    result.token = row.forced != NOBODY ? row.forced : row.scale > 0 ? chosen.drawn : chosen.best;
}

// The decision of a row whose lanes are merged; one thread.
__device__ void decide(const FuseArgs& args, const FuseRow& row, const FuseLayout& layout, const Merged* lanes, u32 row_index) {
    FuseResult& result = args.results[row_index];
    result.not_finite = args.not_finite[row_index];
    args.not_finite[row_index] = ALL_FINITE;
    result.empty = lanes[0].empty;
    for (u32 t = 0; t < row.experts; t++) {
        const Merged& small = lanes[layout.target[t]];
        const Merged& expert = lanes[layout.target[t] + 1];
        divergences(small, expert, 1, result.forward_target[t], result.reverse_target[t]);
        result.log_sum_small = small.log_sum;
        result.log_sum_expert[t] = expert.log_sum;
        result.argmax_expert[t] = expert.best;
        result.alpha[t] = row.held ? row.coefficient[t] : 0;
    }
    result.log_sum_base = lanes[0].log_sum;
    result.argmax_base = lanes[0].best;
    u32 chosen = 0;
    bool any = false;
    for (u32 track = 0; track < layout.tracks; track++) {
        const u32 base = layout.track[track];
        for (u32 k = 0; k < layout.candidates[track]; k++) {
            const u32 index = base + 1 + k;
            double forward, reverse;
            divergences(lanes[base], lanes[index], lanes[index].alpha, forward, reverse);
            const double loss = loss_of(row, result, forward, reverse);
            if (!any || loss < result.loss) {
                result.loss = loss, result.forward = forward, result.reverse = reverse;
                result.track = track, result.candidate = k, chosen = index, any = true;
            }
        }
    }
    if (!row.held && any) result.alpha[result.track] = lanes[chosen].alpha;
    settle(row, result, lanes[chosen]);
}

// Both parts of two threads together.
__device__ Partial exchange(const Partial& own, u32 distance) {
    return {
        __shfl_xor_sync(ALL_LANES, own.m, distance),   __shfl_xor_sync(ALL_LANES, own.s, distance),
        __shfl_xor_sync(ALL_LANES, own.u, distance),   __shfl_xor_sync(ALL_LANES, own.best, distance),
        __shfl_xor_sync(ALL_LANES, own.key, distance), __shfl_xor_sync(ALL_LANES, own.drawn, distance),
    };
}

// The state of x = L + α D_t over the whole row, by one block; valid in thread 0. `of_warps` is room for it.
__device__ Partial measure(
    const FuseArgs& args, const FuseRow& row, const float* const* models, u32 expert, float alpha, Partial* of_warps
) {
    Partial state = {-INFINITE, 0, 0, 0, -INFINITE, 0};
    const u64 first = u64(row.slot) * args.vocab_stride;
    for (u32 token = threadIdx.x; token < args.vocab_size; token += blockDim.x) {
        const float large = models[row.base_model][first + token], small = models[args.small_model][first + token];
        bool excluded = large == -INFINITE || small == -INFINITE;
        float d = 0;
        for (u32 t = 0; t < row.experts; t++) {
            const float logit = models[args.first_expert + t][first + token];
            excluded |= logit == -INFINITE;
            if (t == expert) d = logit - small;
        }
        if (excluded) continue;
        const float x = fmaf(alpha, d, large);
        const float key = row.scale > 0 ? fmaf(x, row.scale, gumbel(philox(row, token))) : x;
        merge(state, {x, 1, d, token, key, token});
    }
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) merge(state, exchange(state, distance));
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = state;
    __syncthreads();
    state = of_warps[0];
    for (u32 w = 1; w < WARPS; w++) merge(state, of_warps[w]);
    return state;
}

// Moves the α of a row that is decided to the minimum between the candidates, from their sums, and takes the row's numbers
// from there: a second look at the row, by its last block. Where the sums there aren't those that were foretold, the
// minimum is sought once more between it and its neighbours.
__device__ void refine_row(
    const FuseArgs& args, const FuseRow& row, const FuseLayout& layout, const float* const* models, const Merged* lanes,
    FuseResult& result
) {
    __shared__ double asked;  // the α whose sums are wanted, or infinity: no more are
    __shared__ Partial of_warps[WARPS];
    const Merged& base = lanes[layout.track[result.track]];
    const u32 last = layout.candidates[result.track] - 1, best = result.candidate;
    const auto knot_of = [&](double alpha, const Merged& lane) { return Knot{alpha, lane.log_sum - base.log_sum, lane.mean}; };
    const auto candidate = [&](u32 k) { return knot_of((&base)[1 + k].alpha, (&base)[1 + k]); };
    const auto forward = [&](const Knot& knot) { return knot.alpha * knot.slope - knot.a; };
    const auto reverse = [&](const Knot& knot) { return knot.a - knot.alpha * base.mean; };
    const auto loss = [&](const Knot& knot) { return loss_of(row, result, forward(knot), reverse(knot)); };
    // Only the first warp's.
    Bracket bracket = {candidate(max(best, 1u) - 1), candidate(best), candidate(min(best + 1, last))};
    Knot foretold = bracket.middle;
    double least = double(INFINITE), alpha = 0;
    bool settled = false;
#pragma unroll 1
    for (u32 round = 0; round <= MOST_ROUNDS; round++) {
        if (threadIdx.x < WARP) {
            settled |= round == MOST_ROUNDS;
            if (!settled) foretold = refine(bracket, loss);
            settled |= round > 0 && fabs(foretold.alpha - alpha) <= NEAR;
            if (threadIdx.x == 0) asked = settled ? double(INFINITE) : foretold.alpha;
        }
        __syncthreads();
        const double at = asked;
        if (at == double(INFINITE)) break;
        const Partial state = measure(args, row, models, result.track, float(at), of_warps);
        if (threadIdx.x >= WARP) continue;
        const Merged sums = {
            double(state.m) + log(double(state.s)), double(state.u) / double(state.s), state.best, state.drawn, float(at), 0,
        };
        const Knot found = knot_of(at, sums);
        const double found_forward = forward(found), found_reverse = reverse(found), found_loss = loss(found);
        const double near = ROUNDING * (1 + fabs(found_forward) + fabs(found_reverse));
        settled = fabs(found_forward - forward(foretold)) <= near && fabs(found_reverse - reverse(foretold)) <= near;
        bracket = narrow(bracket, found, found_loss < loss(bracket.middle));
        if (!(found_loss < least)) continue;
        least = found_loss, alpha = at;
        if (threadIdx.x == 0) {
            result.forward = found_forward, result.reverse = found_reverse, result.loss = found_loss;
            result.alpha[result.track] = at;
            settle(row, result, sums);
        }
    }
}

// Dynamic shared memory: a tile a warp; then (WARPS, lanes) partial states; then the merged lanes.
template <u32 ROUNDS>
__device__ void fuse(const FuseArgs& args) {
    extern __shared__ double memory[];
    __shared__ u32 ticket;
    __shared__ FuseRow row;  // all but its layouts
    __shared__ FuseLayout layout;
    __shared__ FuseLane lanes[ROUNDS * WARP];
    __shared__ const float* models[MAX_MODELS];
    const u32 row_index = blockIdx.y, slices = gridDim.x, slice = blockIdx.x;
    // Each block reads what it is to do once.
    const auto copy = [](void* to, const void* from, u32 bytes) {
        for (u32 i = threadIdx.x; i < bytes / 4; i += blockDim.x) static_cast<u32*>(to)[i] = static_cast<const u32*>(from)[i];
    };
    copy(&row, args.rows + row_index, sizeof(FuseRow) - sizeof(row.layout));
    copy(&layout, &args.rows[row_index].layout[args.rows[row_index].held], sizeof(FuseLayout));
    copy(models, args.models, args.model_count * sizeof(models[0]));
    __syncthreads();
    copy(lanes, args.lanes + row.first_lane + layout.first, layout.lanes * sizeof(FuseLane));
    __syncthreads();
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Partial nothing = {-INFINITE, 0, 0, 0, -INFINITE, 0};
    if (args.stamps && slice == 0 && threadIdx.x == 0) args.results[row_index].joined = now();

    FuseLane mine[ROUNDS];
    Partial states[ROUNDS];
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) {
        states[r] = nothing;
        const u32 index = r * WARP + lane;
        mine[r] = index < layout.lanes ? lanes[index] : FuseLane{0, 0, NO_DIRECTION};
    }
    const Tile tile = {reinterpret_cast<float*>(memory) + warp * Tile::size(row.experts), row.experts};
    const u32 end = min(args.vocab_size, (slice + 1) * args.slice);
    for (u32 first = slice * args.slice + warp * WARP; first < end; first += WARPS * WARP) {
        __syncwarp();
        load(args, row, models, tile, first + lane, row_index);
        __syncwarp();
#pragma unroll
        for (u32 r = 0; r < ROUNDS; r++) walk(row, tile, mine[r], first, states[r]);
    }

    __syncthreads();
    Partial* of_warps = reinterpret_cast<Partial*>(memory);
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) {
        const u32 index = r * WARP + lane;
        if (index < layout.lanes) of_warps[warp * layout.lanes + index] = states[r];
    }
    __syncthreads();
    Partial* of_slices = args.partial + u64(row_index) * slices * args.lane_stride;
    for (u32 index = threadIdx.x; index < layout.lanes; index += blockDim.x) {
        Partial sum = of_warps[index];
        for (u32 w = 1; w < WARPS; w++) merge(sum, of_warps[w * layout.lanes + index]);
        of_slices[slice * args.lane_stride + index] = sum;
    }
    // The barrier brings the block's states to thread 0, whose fence brings them to the other blocks; the last block
    // takes the same way back.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        ticket = atomicAdd(args.tickets + row_index, 1);
        __threadfence();
    }
    __syncthreads();
    if (ticket != slices - 1) return;

    Merged* merged = reinterpret_cast<Merged*>(memory);
    for (u32 index = threadIdx.x; index < layout.lanes; index += blockDim.x) {
        Partial top = nothing;
        double sum = 0, weighted = 0;
        for (u32 s = 0; s < slices; s++) {
            const Partial part = read(of_slices + s * args.lane_stride + index);
            if (part.m == -INFINITE) continue;
            if (part.key > top.key) top.key = part.key, top.drawn = part.drawn;
            // Slices come in order of their tokens: where two tie, the first has the lower id.
            if (part.m > top.m) {
                const double factor = exp(double(top.m) - double(part.m));
                sum *= factor, weighted *= factor;
                top.m = part.m, top.best = part.best;
            }
            const double weight = exp(double(part.m) - double(top.m));
            sum += weight * part.s;
            weighted += weight * part.u;
        }
        merged[index] = {double(top.m) + log(sum), weighted / sum, top.best, top.drawn, lanes[index].alpha, sum == 0};
    }
    __syncthreads();
    FuseResult& result = args.results[row_index];
    if (threadIdx.x == 0) {
        decide(args, row, layout, merged, row_index);
        args.tickets[row_index] = 0;
    }
    __syncthreads();
    if (row.refined && !row.held && !result.empty && layout.candidates[result.track] > 1) {
        refine_row(args, row, layout, models, merged, result);
    }
    // All that tell are in the warp of thread 0.
    __syncwarp();
    const u64 at = u64(row.slot) * args.vocab_stride + min(result.token, args.vocab_size - 1);
    if (threadIdx.x < 2 + row.experts) tell(row, models, at, args.small_model, args.first_expert, result, threadIdx.x);
    if (threadIdx.x == 0 && args.stamps) {
        result.begun = args.stamps[0], result.large_done = args.stamps[1];
        result.done = now();
    }
}

#define FUSE(ROUNDS, BLOCKS) \
    extern "C" __global__ __launch_bounds__(256, BLOCKS) void fuse_##ROUNDS(const FuseArgs args) { fuse<ROUNDS>(args); }

FUSE(1, 1) FUSE(2, 1) FUSE(4, 1) FUSE(9, 1)
