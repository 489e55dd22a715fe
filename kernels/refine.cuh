// The minimum of a loss between two candidates of α, from A(α) = log E_P[exp(α D)] and A′ at both: the arithmetic of
// src/fusion/refine.rs, where it is explained, shared out to the lanes of a warp.
#pragma once

#include "common.cuh"

// What f32 sums may be off by, relative to 1 + both divergences; by how much an α that is near enough may move; sums over a
// row at most.
constexpr double ROUNDING = 2e-6, NEAR = 1e-3;
constexpr u32 MOST_ROUNDS = 4;

// A and A′ at one α.
struct Knot {
    double alpha, a, slope;
};

// Between two candidates A is that of two atoms: with s = exp(−gap t) at the fraction t of the way,
//
//     A = a + top t + ln((s + ratio) / (1 + ratio))        step A′ = top − gap s / (s + ratio)
struct Cell {
    double start, step, a, top, gap, ratio;
};

constexpr double LEAST = 2.2250738585072014e-308;
constexpr u32 HALF = WARP / 2;  // lanes that share a cell

__device__ inline double log_of_ratio(double s, double ratio) { return log(fmax(s + ratio, LEAST) / (1 + ratio)); }

// The gap is growth (1 + x): the ratio that gives the slope its growth, and how far A then lies above the parabola through
// the slopes; −∞ where no ratio does.
__device__ inline double excess_of(double growth, double x, double& gap, double& ratio) {
    gap = growth * (1 + x);
    const double fall = exp(-gap), sum = x * (1 - fall) - 2 * fall;
    ratio = (sum + sqrt(fmax(sum * sum - 4 * fall, 0.0))) / 2;
    const double excess = gap / (1 + ratio) + log_of_ratio(fall, ratio) - growth / 2;
    return sum >= 2 * sqrt(fall) ? excess : -double(INFINITE);
}

// The cell between neighbours, one for each half of a warp: its sixteen lanes look at as many places of ln x at once.
__device__ inline Cell between(const Knot& left, const Knot& right) {
    const u32 lane = threadIdx.x % WARP, half = lane / HALF, place = lane % HALF;
    const double width = right.alpha - left.alpha;
    const double excess = right.a - left.a - width * (left.slope + right.slope) / 2;
    const bool early = excess >= 0;
    const double growth = fmax((right.slope - left.slope) * width, 1e-12);
    double low = -1.31 - growth / 2, high = 20 + fmax(log(2 / sqrt(growth)), 0.0), gap, ratio;
    // 17¹⁰ is more than the 2⁴⁰ of the CPU's halvings.
    for (u32 round = 0; round < 10; round++) {
        const double part = (high - low) / (HALF + 1);
        const bool enough = excess_of(growth, exp(low + part * (place + 1)), gap, ratio) >= fabs(excess);
        const u32 votes = __ballot_sync(ALL_LANES, enough) >> (half * HALF) & ((1u << HALF) - 1);
        const u32 first = votes ? __ffs(votes) - 1 : HALF;
        if (first < HALF) high = low + part * (first + 1);
        low += part * first;
    }
    excess_of(growth, exp(high), gap, ratio);
    const double step = early ? width : -width, slope = early ? left.slope : right.slope;
    return {early ? left.alpha : right.alpha, step, early ? left.a : right.a, step * slope + gap / (1 + ratio), gap, ratio};
}

// The best of what was summed, and its neighbours; one that there isn't is the best itself.
struct Bracket {
    Knot left, middle, right;
};

// One of two, number by number, so that they stay in registers.
__device__ inline Knot pick(bool first, Knot a, Knot b) {
    return {first ? a.alpha : b.alpha, first ? a.a : b.a, first ? a.slope : b.slope};
}

// With what was summed at another α between the neighbours.
__device__ inline Bracket narrow(Bracket old, Knot found, bool better) {
    const Knot middle = pick(better, found, old.middle), outer = pick(better, old.middle, found);
    return {pick(outer.alpha < middle.alpha, outer, old.left), middle, pick(outer.alpha > middle.alpha, outer, old.right)};
}

// The least loss(knot) in the two cells, the lower cell's where both are equal, and what A and A′ should be there. All
// lanes of a warp together, each gets it.
template <typename Loss>
__device__ Knot refine(Bracket bracket, Loss loss) {
    const u32 lane = threadIdx.x % WARP, half = lane / HALF, place = lane % HALF;
    // At an end of the candidates both halves have the one cell.
    const bool has_left = bracket.left.alpha < bracket.middle.alpha, has_right = bracket.right.alpha > bracket.middle.alpha;
    const bool lower = has_left && (half == 0 || !has_right);
    const Cell cell = between(pick(lower, bracket.left, bracket.middle), pick(lower, bracket.middle, bracket.right));
    const auto at = [&](double t) {
        const double s = exp(-cell.gap * t);
        const double a = cell.a + cell.top * t + log_of_ratio(s, cell.ratio);
        return Knot{cell.start + t * cell.step, a, (cell.top - cell.gap * s / fmax(s + cell.ratio, LEAST)) / cell.step};
    };
    double low = 0, high = 1, least = double(INFINITE), least_t = 0;
    // Each round keeps 2/15 of the bracket: seven leave 4e-7 of a cell.
    for (u32 round = 0; round < 7; round++) {
        const double part = (high - low) / (HALF - 1);
        double value = loss(at(low + part * place));
        u32 where = place;
        for (u32 distance = HALF / 2; distance > 0; distance /= 2) {
            const double other = __shfl_xor_sync(ALL_LANES, value, distance);
            const u32 there = __shfl_xor_sync(ALL_LANES, where, distance);
            if (other < value || (other == value && there < where)) value = other, where = there;
        }
        if (value < least) least = value, least_t = low + part * where;
        high = low + part * min(where + 1, HALF - 1);
        low += part * (max(where, 1u) - 1);
    }
    const Knot found = at(least_t);
    const u32 from = __shfl_sync(ALL_LANES, least, HALF) < __shfl_sync(ALL_LANES, least, 0) ? HALF : 0;
    return {__shfl_sync(ALL_LANES, found.alpha, from), __shfl_sync(ALL_LANES, found.a, from), __shfl_sync(ALL_LANES, found.slope, from)};
}
