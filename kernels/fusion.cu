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
//         its lanes walk over them, each for its own candidate, 32 candidates a round: no candidate needs a shuffle.
//         What lanes with one base or one direction read is one number for all, and the others' lies in other banks. The
//         next 32 are on their way meanwhile. The warps of a block merge, a block writes its partial states, and the last
//         block of a row (a ticket after a fence) merges the slices, eight threads a lane, decides in f64, a thread a
//         candidate, and resets the ticket, so that a graph can replay the launch.
//         Where the minimum between candidates is sought, it follows from the same sums; the last block then reads the
//         row again, from the L2 cache, for what belongs to that α.
// bytes   (2 + experts) · vocab_size · 4 a row, and the partial states twice: slices · lanes · 16, or 24 where fusion draws
// bound   latency: at 32000 tokens the logits lie in the L2 cache, and the walk is a few thousand instructions a warp
// needs   vocab_stride ≥ vocab_size; lanes ≤ 32 · ROUNDS; tickets zero before the first launch
#include "noise.cuh"
#include "refine.cuh"

constexpr u32 WARPS = 8;
constexpr u32 PARTS = 8;                // threads that merge the slices of a lane
constexpr u32 AT_ONCE = 8;              // tokens of a lane's step
constexpr u32 COMBINED = MAX_EXPERTS;   // the direction Σ c_t D_t
constexpr u32 NO_DIRECTION = COMBINED + 1;
constexpr u64 ALL_FINITE = ~0ull;

struct Partial {
    float m, s, u;
    u32 best;      // argmax x, the lowest id where several tie
    float key;     // max x / τ + g
    u32 drawn;     // its argmax
};

__device__ Partial nothing() { return {-INFINITE, 0, 0, 0, -INFINITE, 0}; }

struct FuseArgs {
    const float* const* models;  // (model_count,): where the logits of each lie, (slots, vocab_stride)
    const FuseRow* rows;     // (rows,)
    const FuseLane* lanes;
    uint4* partial;          // (rows, slices, lane_stride): m, s, u, best
    uint2* drawn;            // the same: key, drawn; of rows that fusion draws for
    u32* tickets;            // (rows,)
    u64* not_finite;         // (rows,): ALL_FINITE between launches
    FuseResult* results;     // (rows,)
    const u64* stamps;       // (2,): when the step began and when the large model was done, or null
    u32 vocab_stride;
    u32 vocab_size;
    u32 small_model;         // index of the small model
    u32 first_expert;        // index of expert 0; the others follow
    u32 slice;               // tokens of a slice: a multiple of 32
    u32 lane_stride;
    u32 model_count;         // at most MAX_MODELS
};

// What another block wrote: past the first-level cache.
__device__ Partial read(const FuseArgs& args, u64 at, bool draws) {
    const uint4 sums = __ldcg(args.partial + at);
    Partial part = {__uint_as_float(sums.x), __uint_as_float(sums.y), __uint_as_float(sums.z), sums.w, -INFINITE, 0};
    if (!draws) return part;
    const uint2 drawn = __ldcg(args.drawn + at);
    part.key = __uint_as_float(drawn.x), part.drawn = drawn.y;
    return part;
}

__device__ void write(const FuseArgs& args, u64 at, bool draws, const Partial& part) {
    args.partial[at] = {__float_as_uint(part.m), __float_as_uint(part.s), __float_as_uint(part.u), part.best};
    if (draws) args.drawn[at] = {__float_as_uint(part.key), part.drawn};
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

// The tokens of a tile as lanes read them: base logits, then differences, 32 numbers each, four at once. Eight neighbours
// begin in different banks.
struct Tile {
    static constexpr u32 STRIDE = WARP + 4;
    float* memory;
    u32 experts;
    __device__ float* base(u32 b) const { return memory + b * STRIDE; }
    __device__ float* difference(u32 d) const { return memory + (2 + experts + min(d, experts + 1)) * STRIDE; }
    __device__ float* combined() const { return difference(experts); }
    __device__ float* zero() const { return difference(experts + 1); }
    __device__ float* noise() const { return memory + (4 + 2 * experts) * STRIDE; }
    static __device__ u32 size(u32 experts) { return (5 + 2 * experts) * STRIDE; }
};

// What the models give for one token; −∞ past the last one.
struct Logits {
    float large, small, expert[MAX_EXPERTS];
};

// Asks for the logits of a token, of all models at once.
__device__ Logits fetch(const FuseArgs& args, const FuseRow& row, const float* const* models, u32 token) {
    const bool exists = token < args.vocab_size;
    const u64 at = u64(row.slot) * args.vocab_stride + token;
    Logits logits = {-INFINITE, row.experts ? -INFINITE : 0};
    if (exists) logits.large = __ldg(models[row.base_model] + at);
    if (exists && row.experts) logits.small = __ldg(models[args.small_model] + at);
#pragma unroll
    for (u32 t = 0; t < MAX_EXPERTS; t++) {
        logits.expert[t] = -INFINITE;
        if (exists && t < row.experts) logits.expert[t] = __ldg(models[args.first_expert + t] + at);
    }
    return logits;
}

// Puts the token of this lane into a tile; notes the first logit that is not finite.
__device__ void store(const FuseArgs& args, const FuseRow& row, const Tile& tile, Logits logits, u32 token, u32 row_index) {
    const u32 lane = threadIdx.x % WARP;
    bool excluded = false;
    const auto look = [&](float x, u32 model) {
        if (!(x < INFINITE)) atomicMin(args.not_finite + row_index, u64(token) * 16 + model);
        excluded |= x == -INFINITE;
    };
    look(logits.large, row.base_model);
    look(logits.small, args.small_model);
#pragma unroll
    for (u32 t = 0; t < MAX_EXPERTS; t++) {
        if (t < row.experts) look(logits.expert[t], args.first_expert + t);
    }
    // What is excluded has no weight in any lane, and no difference.
    float combined = 0;
#pragma unroll
    for (u32 t = 0; t < MAX_EXPERTS; t++) {
        if (t >= row.experts) continue;
        const float d = excluded ? 0 : logits.expert[t] - logits.small;
        tile.base(2 + t)[lane] = excluded ? -INFINITE : logits.expert[t];
        tile.difference(t)[lane] = d;
        combined = fmaf(row.coefficient[t], d, combined);
    }
    tile.base(0)[lane] = excluded ? -INFINITE : logits.large;
    tile.base(1)[lane] = excluded ? -INFINITE : logits.small;
    tile.combined()[lane] = combined;
    tile.zero()[lane] = 0;
    tile.noise()[lane] = row.scale > 0 ? gumbel(philox(row, token)) : 0;
}

// Consecutive numbers of a tile.
__device__ void read(const float* from, float (&x)[AT_ONCE]) {
#pragma unroll
    for (u32 i = 0; i < AT_ONCE; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(from + i);
        x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
}

// Adds tokens that are `step` apart from `first` on: x, with d as the weight.
template <u32 COUNT>
__device__ void add(Partial& state, const float (&x)[COUNT], const float (&d)[COUNT], u32 first, u32 step) {
    float top = -INFINITE;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) top = fmaxf(top, x[i]);
    if (top > state.m) {
        // Where nothing was summed yet, the factor is exp(−∞) = 0.
        const float factor = expf(state.m - top);
        state.s *= factor, state.u *= factor, state.m = top;
#pragma unroll
        for (u32 i = COUNT; i-- > 0;) {
            if (x[i] == top) state.best = first + i * step;
        }
    }
    if (state.m == -INFINITE) return;
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        const float e = expf(x[i] - state.m);
        state.s += e;
        state.u = fmaf(e, d[i], state.u);
    }
}

// Draws among them, too.
template <u32 COUNT>
__device__ void draw(Partial& state, const float (&x)[COUNT], const float (&noise)[COUNT], float scale, u32 first, u32 step) {
#pragma unroll
    for (u32 i = 0; i < COUNT; i++) {
        const float key = fmaf(x[i], scale, noise[i]);
        if (key > state.key) state.key = key, state.drawn = first + i * step;
    }
}

// One lane's walk over a tile that begins at token `first`.
__device__ void walk(const FuseRow& row, const Tile& tile, const FuseLane& lane, u32 first, Partial& state) {
    const float* base = tile.base(lane.base);
    const float* difference = lane.direction == NO_DIRECTION ? tile.zero()
                              : lane.direction == COMBINED   ? tile.combined()
                                                             : tile.difference(lane.direction);
#pragma unroll 1
    for (u32 at = 0; at < WARP; at += AT_ONCE) {
        float x[AT_ONCE], d[AT_ONCE];
        read(base + at, x);
        read(difference + at, d);
#pragma unroll
        for (u32 i = 0; i < AT_ONCE; i++) x[i] = fmaf(lane.alpha, d[i], x[i]);
        if (row.scale > 0) {
            float noise[AT_ONCE];
            read(tile.noise() + at, noise);
            draw(state, x, noise, row.scale, first + at, 1);
        }
        add(state, x, d, first + at, 1);
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

// What the divergences of a candidate are held against.
struct Targets {
    double forward_target[MAX_EXPERTS], reverse_target[MAX_EXPERTS];
};

// Equation 6, or one of its terms; `targets` are Targets or a result.
template <typename T>
__device__ double loss_of(const FuseRow& row, const T& targets, double forward, double reverse) {
    double loss = 0;
    for (u32 t = 0; t < row.experts; t++) {
        if (row.objective != 2) loss += square(forward - targets.forward_target[t]);
        if (row.objective != 1) loss += square(reverse - targets.reverse_target[t]);
    }
    return loss;
}

// What follows from the chosen distribution.
__device__ void settle(const FuseRow& row, FuseResult& result, const Merged& chosen) {
    result.log_sum_fused = chosen.log_sum;
    result.argmax_fused = chosen.best;
    result.token = row.forced != NOBODY ? row.forced : row.scale > 0 ? chosen.drawn : chosen.best;
}

// exp(x − top) of numbers that f32 holds, 0 where x is −∞.
__device__ float weight_of(float x, float top) { return x > -INFINITE ? expf(x - top) : 0; }

// The slices of a lane together: eight neighbouring threads take turns at them, and all have the result.
__device__ Merged merge_slices(const FuseArgs& args, u64 at, u32 slices, bool draws, float alpha) {
    constexpr u32 BATCH = 8;  // slices of a thread that are on their way at once
    float top = -INFINITE, key = -INFINITE;
    u32 best = 0, drawn = 0;
    double sum = 0, weighted = 0;
#pragma unroll 1
    for (u32 first = threadIdx.x % PARTS; first < slices; first += BATCH * PARTS) {
        Partial parts[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            parts[i] = nothing();
            if (first + i * PARTS < slices) parts[i] = read(args, at + (first + i * PARTS) * args.lane_stride, draws);
        }
        const float before = top;
        // Slices come in order of their tokens: where two tie, the first has the lower id.
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            if (parts[i].m > top) top = parts[i].m, best = parts[i].best;
            if (parts[i].key > key) key = parts[i].key, drawn = parts[i].drawn;
        }
        const double factor = weight_of(before, top);
        sum *= factor, weighted *= factor;
#pragma unroll
        for (u32 i = 0; i < BATCH; i++) {
            const double weight = weight_of(parts[i].m, top);
            sum += weight * parts[i].s;
            weighted += weight * parts[i].u;
        }
    }
    const float own = top;
#pragma unroll
    for (u32 distance = PARTS / 2; distance > 0; distance /= 2) {
        const float other = __shfl_xor_sync(ALL_LANES, top, distance), other_key = __shfl_xor_sync(ALL_LANES, key, distance);
        const u32 id = __shfl_xor_sync(ALL_LANES, best, distance), other_drawn = __shfl_xor_sync(ALL_LANES, drawn, distance);
        if (other > top || (other == top && id < best)) top = other, best = id;
        if (other_key > key || (other_key == key && other_drawn < drawn)) key = other_key, drawn = other_drawn;
    }
    const double factor = weight_of(own, top);
    sum *= factor, weighted *= factor;
#pragma unroll
    for (u32 distance = PARTS / 2; distance > 0; distance /= 2) {
        sum += __shfl_xor_sync(ALL_LANES, sum, distance);
        weighted += __shfl_xor_sync(ALL_LANES, weighted, distance);
    }
    return {double(top) + log(sum), weighted / sum, best, drawn, alpha, sum == 0};
}

// The candidate with the least loss of a row whose targets are known, the first where several tie: the number of its lane.
// By one warp, a lane of it a candidate.
__device__ u32 best_candidate(const FuseRow& row, const FuseLayout& layout, const Merged* lanes, const Targets& targets) {
    double least = double(INFINITE);
    u32 best = NOBODY;
    for (u32 track = 0; track < layout.tracks; track++) {
        const u32 base = layout.track[track];
        for (u32 k = threadIdx.x; k < layout.candidates[track]; k += WARP) {
            const Merged& candidate = lanes[base + 1 + k];
            double forward, reverse;
            divergences(lanes[base], candidate, candidate.alpha, forward, reverse);
            const double loss = loss_of(row, targets, forward, reverse);
            if (loss < least) least = loss, best = base + 1 + k;
        }
    }
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        const double other = __shfl_xor_sync(ALL_LANES, least, distance);
        const u32 there = __shfl_xor_sync(ALL_LANES, best, distance);
        if (other < least || (other == least && there < best)) least = other, best = there;
    }
    // A model alone has no candidates; of a row that isn't finite nobody asks for them.
    return best != NOBODY || layout.tracks == 0 ? best : layout.track[0] + 1;
}

// The decision of a row whose lanes are merged; one warp.
__device__ void decide(const FuseArgs& args, const FuseRow& row, const FuseLayout& layout, const Merged* lanes, u32 row_index) {
    __shared__ Targets targets;
    FuseResult& result = args.results[row_index];
    const u32 t = threadIdx.x;
    if (t < row.experts) {
        const Merged& small = lanes[layout.target[t]];
        const Merged& expert = lanes[layout.target[t] + 1];
        divergences(small, expert, 1, targets.forward_target[t], targets.reverse_target[t]);
        result.forward_target[t] = targets.forward_target[t], result.reverse_target[t] = targets.reverse_target[t];
        if (t == 0) result.log_sum_small = small.log_sum;
        result.log_sum_expert[t] = expert.log_sum;
        result.argmax_expert[t] = expert.best;
        result.alpha[t] = row.held ? row.coefficient[t] : 0;
    }
    __syncwarp();
    const u32 best = best_candidate(row, layout, lanes, targets);
    if (threadIdx.x != 0) return;
    result.not_finite = args.not_finite[row_index];
    args.not_finite[row_index] = ALL_FINITE;
    result.empty = lanes[0].empty;
    result.log_sum_base = lanes[0].log_sum;
    result.argmax_base = lanes[0].best;
    const Merged& chosen = lanes[best == NOBODY ? 0 : best];
    if (best != NOBODY) {
        u32 track = 0;
        while (best > layout.track[track] + layout.candidates[track]) track++;
        result.track = track, result.candidate = best - layout.track[track] - 1;
        divergences(lanes[layout.track[track]], chosen, chosen.alpha, result.forward, result.reverse);
        result.loss = loss_of(row, targets, result.forward, result.reverse);
        if (!row.held) result.alpha[track] = chosen.alpha;
    }
    settle(row, result, chosen);
}

// Both parts of two threads together.
__device__ Partial exchange(const Partial& own, u32 distance) {
    return {
        __shfl_xor_sync(ALL_LANES, own.m, distance),   __shfl_xor_sync(ALL_LANES, own.s, distance),
        __shfl_xor_sync(ALL_LANES, own.u, distance),   __shfl_xor_sync(ALL_LANES, own.best, distance),
        __shfl_xor_sync(ALL_LANES, own.key, distance), __shfl_xor_sync(ALL_LANES, own.drawn, distance),
    };
}

// The state of x = L + α D_t over the whole row, by one block, the same in every thread. `of_warps` is room for it.
__device__ Partial measure(
    const FuseArgs& args, const FuseRow& row, const float* const* models, u32 expert, float alpha, Partial* of_warps
) {
    constexpr u32 STEP = WARPS * WARP, COUNT = 4;
    Partial state = nothing();
    for (u32 first = threadIdx.x; first < args.vocab_size; first += COUNT * STEP) {
        float x[COUNT], d[COUNT] = {};
        bool excluded[COUNT];
        const auto load = [&](u32 model, float (&to)[COUNT]) {
            const float* from = models[model] + u64(row.slot) * args.vocab_stride;
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) {
                to[i] = first + i * STEP < args.vocab_size ? __ldg(from + first + i * STEP) : -INFINITE;
            }
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) excluded[i] |= to[i] == -INFINITE;
        };
        float small[COUNT], logits[COUNT];
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) excluded[i] = false;
        load(row.base_model, x);
        load(args.small_model, small);
        for (u32 t = 0; t < row.experts; t++) {
            load(args.first_expert + t, logits);
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) d[i] = t == expert ? logits[i] - small[i] : d[i];
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) {
            d[i] = excluded[i] ? 0 : d[i];
            x[i] = excluded[i] ? -INFINITE : fmaf(alpha, d[i], x[i]);
        }
        if (row.scale > 0) {
            float noise[COUNT];
#pragma unroll
            for (u32 i = 0; i < COUNT; i++) noise[i] = gumbel(philox(row, first + i * STEP));
            draw(state, x, noise, row.scale, first, STEP);
        }
        add(state, x, d, first, STEP);
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
// minimum is sought once more between it and its neighbours; then the other cell may be looked into.
__device__ void refine_row(
    const FuseArgs& args, const FuseRow& row, const FuseLayout& layout, const float* const* models, const Merged* lanes,
    FuseResult& result
) {
    __shared__ double asked;  // the α whose sums are wanted, or infinity: no more are
    __shared__ Valley valleys[2];  // below the best candidate and above
    __shared__ Partial of_warps[WARPS];
    const Merged& base = lanes[layout.track[result.track]];
    const u32 end = layout.candidates[result.track];
    const auto knot_of = [&](double alpha, const Merged& lane) {
        // Both lanes are the same at 0, and are summed apart.
        return Knot{alpha, alpha == 0 ? 0 : lane.log_sum - base.log_sum, lane.mean};
    };
    const auto candidate = [&](u32 k) { return knot_of((&base)[1 + k].alpha, (&base)[1 + k]); };
    const auto forward = [&](const Knot& knot) { return knot.alpha * knot.slope - knot.a; };
    const auto reverse = [&](const Knot& knot) { return knot.a - knot.alpha * base.mean; };
    const auto loss = [&](const Knot& knot) { return loss_of(row, result, forward(knot), reverse(knot)); };
    // What A may be off by because x is rounded, however large it is: the CPU rounds only what is near the largest.
    const auto of_x = [&](const Knot& knot) {
        return EPSILON * (fabs(knot.a + base.log_sum) + fabs(knot.alpha * knot.slope));
    };
    // Whether the divergences are the same, but for `rounding` relative to 1 + both, and for that of x.
    const auto is_as = [&](const Knot& one, const Knot& two, u32 objective, double rounding) {
        const auto size = [&](const Knot& knot) {
            return rounding * (1 + fabs(forward(knot)) + fabs(reverse(knot))) + of_x(knot);
        };
        const double near = fmax(size(one), size(two));
        return (objective == 2 || fabs(forward(one) - forward(two)) <= near) &&
               (objective == 1 || fabs(reverse(one) - reverse(two)) <= near);
    };
    // Only the first warp's: the cells that the halves of the warp look into, and the valley that is gone into.
    const u32 half = threadIdx.x / HALF;
    const bool leads = threadIdx.x % HALF == 0;
    Knot left = candidate(result.candidate), right = left;
    u32 active = 0;
    bool seeks = true, other = true;
    double least = result.loss, at = double(INFINITE);
    // Ten times the rounding of A, as on the CPU.
    const double shaped = LEAST_SHAPED + 10 * of_x(left);
    if (threadIdx.x < WARP) {
        // While one token has all probability a divergence doesn't move, and rounding decides which of those candidates is
        // the best. Where it passes its target is next to the first or the last of them; and on the way through α = 0 it
        // falls to 0 and rises again.
        u32 first = result.candidate, last = first;
        const Knot best = left;
        const auto tied = [&](u32 k, u32 next) {
            return is_as(candidate(next), best, row.objective, TIED) && candidate(k).alpha * candidate(next).alpha >= 0;
        };
        while (first > 0 && tied(first, first - 1)) first--;
        while (last + 1 < end && tied(last, last + 1)) last++;
        left = candidate(half == 0 ? max(first, 1u) - 1 : last), right = candidate(half == 0 ? first : min(last + 1, end - 1));
    }
#pragma unroll 1
    for (u32 round = 0; round <= MOST_ROUNDS; round++) {
        if (threadIdx.x < WARP) {
            if (seeks) {
                Bottom bottom = foretell(left, right, shaped, loss);
                const double there = __shfl_xor_sync(ALL_LANES, bottom.loss, HALF);
                if (round == 0) {
                    if (leads) valleys[half] = {{left, loss(right) < loss(left) ? right : left, right}, bottom};
                } else if (leads && (half == 0 ? bottom.loss <= there : bottom.loss < there)) {
                    bottom.unknown &= fabs(bottom.knot.alpha - at) > NEAR;
                    valleys[active].bottom = bottom;
                }
                __syncwarp();
            }
            const Bottom &lower = valleys[0].bottom, &upper = valleys[1].bottom;
            if (round == 0) active = upper.unknown && (!lower.unknown || upper.loss < lower.loss);
            bool goes_on = valleys[active].bottom.unknown;
            if (!goes_on && other) {
                // The other valley may be the deeper one.
                other = false, active = 1 - active;
                goes_on = valleys[active].bottom.unknown && valleys[active].bottom.loss < SECOND * least;
            }
            if (threadIdx.x == 0) asked = goes_on && round < MOST_ROUNDS ? valleys[active].bottom.knot.alpha : double(INFINITE);
        }
        __syncthreads();
        at = asked;
        if (at == double(INFINITE)) break;
        const Partial state = measure(args, row, models, result.track, float(at), of_warps);
        if (threadIdx.x >= WARP) continue;
        const Merged sums = {
            double(state.m) + log(double(state.s)), double(state.u) / double(state.s), state.best, state.drawn, float(at), 0,
        };
        const Knot found = knot_of(at, sums);
        const double found_loss = loss(found);
        Valley& valley = valleys[active];
        seeks = !is_as(found, valley.bottom.knot, 0, ROUNDING);
        const bool better = found_loss < loss(valley.bracket.middle);
        __syncwarp();
        if (threadIdx.x == 0) valley.bracket.add(found, better), valley.bottom.unknown = false;
        __syncwarp();
        left = half == 0 ? valley.bracket.left : valley.bracket.middle;
        right = half == 0 ? valley.bracket.middle : valley.bracket.right;
        if (!(found_loss < least)) continue;
        least = found_loss;
        if (threadIdx.x == 0) {
            result.forward = forward(found), result.reverse = reverse(found), result.loss = found_loss;
            result.alpha[result.track] = at;
            settle(row, result, sums);
        }
    }
}

// Dynamic shared memory: a tile a warp; then (WARPS, lanes) partial states; then the merged lanes.
template <u32 ROUNDS>
__device__ void fuse(const FuseArgs& args) {
    extern __shared__ float4 memory[];
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
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 begin = slice * args.slice + warp * WARP, end = min(args.vocab_size, (slice + 1) * args.slice);
    Logits next = fetch(args, row, models, begin + lane);
    copy(lanes, args.lanes + row.first_lane + layout.first, layout.lanes * sizeof(FuseLane));
    __syncthreads();
    if (args.stamps && slice == 0 && threadIdx.x == 0) args.results[row_index].joined = now();

    Partial states[ROUNDS];
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) states[r] = nothing();
    const Tile tile = {reinterpret_cast<float*>(memory) + warp * Tile::size(row.experts), row.experts};
    for (u32 first = begin; first < end; first += WARPS * WARP) {
        __syncwarp();
        store(args, row, tile, next, first + lane, row_index);
        __syncwarp();
        if (first + WARPS * WARP < end) next = fetch(args, row, models, first + WARPS * WARP + lane);
#pragma unroll
        for (u32 r = 0; r < ROUNDS; r++) {
            if (r * WARP < layout.lanes) walk(row, tile, lanes[min(r * WARP + lane, layout.lanes - 1)], first, states[r]);
        }
    }

    __syncthreads();
    Partial* of_warps = reinterpret_cast<Partial*>(memory);
#pragma unroll
    for (u32 r = 0; r < ROUNDS; r++) {
        const u32 index = r * WARP + lane;
        if (index < layout.lanes) of_warps[warp * layout.lanes + index] = states[r];
    }
    __syncthreads();
    const u64 of_row = u64(row_index) * slices * args.lane_stride;
    const bool draws = row.scale > 0;
    for (u32 index = threadIdx.x; index < layout.lanes; index += blockDim.x) {
        Partial sum = of_warps[index];
        for (u32 w = 1; w < WARPS; w++) merge(sum, of_warps[w * layout.lanes + index]);
        write(args, of_row + slice * args.lane_stride + index, draws, sum);
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
    for (u32 first = 0; first < layout.lanes; first += WARPS * WARP / PARTS) {
        const u32 index = first + threadIdx.x / PARTS, there = min(index, layout.lanes - 1);
        const Merged lane = merge_slices(args, of_row + there, slices, draws, lanes[there].alpha);
        if (index < layout.lanes && threadIdx.x % PARTS == 0) merged[index] = lane;
    }
    __syncthreads();
    FuseResult& result = args.results[row_index];
    if (threadIdx.x < WARP) decide(args, row, layout, merged, row_index);
    if (threadIdx.x == 0) args.tickets[row_index] = 0;
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

FUSE(1, 2) FUSE(2, 2) FUSE(4, 2) FUSE(9, 2)
