// The minimum of a loss between two candidates of α, from A(α) = log E_P[exp(α D)] and A′ at both: the arithmetic of
// src/fusion/refine.rs, where it is explained, shared out to the lanes of a warp.
#pragma once

#include "common.cuh"

// A and A′ at one candidate.
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

// The α in the two cells next to `best` with the least loss(α, A, A′); the lower cell's where both are equal. All lanes
// of a warp together, each gets it. `knot(k)` is candidate k of `count`, which are at least two.
template <typename KnotOf, typename Loss>
__device__ double refine(u32 best, u32 count, KnotOf knot, Loss loss) {
    const u32 lane = threadIdx.x % WARP, half = lane / HALF, place = lane % HALF;
    const u32 left = half == 0 ? max(best, 1u) - 1 : min(best, count - 2);
    const Cell cell = between(knot(left), knot(left + 1));
    double low = 0, high = 1, least = double(INFINITE), alpha = cell.start;
    // Each round keeps 2/15 of the bracket: seven leave 4e-7 of a cell.
    for (u32 round = 0; round < 7; round++) {
        const double part = (high - low) / (HALF - 1), t = low + part * place, s = exp(-cell.gap * t);
        const double a = cell.a + cell.top * t + log_of_ratio(s, cell.ratio);
        const double slope = (cell.top - cell.gap * s / fmax(s + cell.ratio, LEAST)) / cell.step;
        double value = loss(cell.start + t * cell.step, a, slope);
        u32 where = place;
        for (u32 distance = HALF / 2; distance > 0; distance /= 2) {
            const double other = __shfl_xor_sync(ALL_LANES, value, distance);
            const u32 there = __shfl_xor_sync(ALL_LANES, where, distance);
            if (other < value || (other == value && there < where)) value = other, where = there;
        }
        if (value < least) least = value, alpha = cell.start + (low + part * where) * cell.step;
        high = low + part * min(where + 1, HALF - 1);
        low += part * (max(where, 1u) - 1);
    }
    const double upper = __shfl_sync(ALL_LANES, least, HALF), upper_alpha = __shfl_sync(ALL_LANES, alpha, HALF);
    const double lower = __shfl_sync(ALL_LANES, least, 0), lower_alpha = __shfl_sync(ALL_LANES, alpha, 0);
    return upper < lower ? upper_alpha : lower_alpha;
}
