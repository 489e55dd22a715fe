// The minimum of a loss between two candidates of α, from A(α) = log E_P[exp(α D)] and A′ at both: the arithmetic of
// src/fusion/refine.rs, where it is explained, shared out to the lanes of a warp.
#pragma once

#include "common.cuh"

// The numbers of src/fusion/refine.rs: how far divergences may be from what was foretold, and those of candidates that tie from
// each other, relative to 1 + both; by how much an α that was summed may be off; what is one α; how much less deep than the least
// a second valley may be foretold; sums over a row at most.
constexpr double ROUNDING = 2e-6, TIED = 2e-7, NEAR = 1e-3, SAME = 1e-6, SECOND = 2;
constexpr double EPSILON = 1.2e-7;  // of f32
constexpr u32 MOST_ROUNDS = 6;

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
constexpr double LEAST_GROWTH = 1e-12, LEAST_SHAPED = 2e-6;
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
// Where the slope grows by less than `shaped`, rounding hides how.
__device__ inline Cell between(const Knot& left, const Knot& right, double shaped) {
    const u32 lane = threadIdx.x % WARP, half = lane / HALF, place = lane % HALF;
    const double width = right.alpha - left.alpha;
    const double above = right.a - left.a - width * (left.slope + right.slope) / 2;
    const bool early = above >= 0;
    const double growth = fmax((right.slope - left.slope) * width, LEAST_GROWTH);
    const double excess = growth < shaped ? 0 : fabs(above);
    double low = -1.31 - growth / 2, high = 20 + fmax(log(2 / sqrt(growth)), 0.0), gap, ratio;
    // 17¹⁰ is more than the 2⁴⁰ of the CPU's halvings.
    for (u32 round = 0; round < 10; round++) {
        const double part = (high - low) / (HALF + 1);
        const bool enough = excess_of(growth, exp(low + part * (place + 1)), gap, ratio) >= excess;
        const u32 votes = __ballot_sync(ALL_LANES, enough) >> (half * HALF) & ((1u << HALF) - 1);
        const u32 first = votes ? __ffs(votes) - 1 : HALF;
        if (first < HALF) high = low + part * (first + 1);
        low += part * first;
    }
    excess_of(growth, exp(high), gap, ratio);
    const double step = early ? width : -width, slope = early ? left.slope : right.slope;
    return {early ? left.alpha : right.alpha, step, early ? left.a : right.a, step * slope + gap / (1 + ratio), gap, ratio};
}

// The better of two that were summed, or the best of three, and its neighbours; one that there isn't is the best itself.
struct Bracket {
    Knot left, middle, right;

    // With what was summed at another α between the neighbours.
    __device__ void add(const Knot& found, bool better) {
        const Knot outer = better ? middle : found;
        if (better) middle = found;
        if (outer.alpha < middle.alpha) left = outer;
        if (outer.alpha > middle.alpha) right = outer;
    }
};

// A minimum that is foretold, unless it is known: at an end of a cell.
struct Bottom {
    Knot knot;
    double loss;
    bool unknown;
};

struct Valley {
    Bracket bracket;
    Bottom bottom;
};

// The least loss(knot) in the cell of each half of a warp; the lowest t where several are. Half of the samples lie evenly,
// half a fraction 1 / gap apart around the bend.
template <typename Loss>
__device__ Bottom minimise(const Cell& cell, Loss loss) {
    const u32 place = threadIdx.x % HALF;
    const auto at = [&](double t) {
        const double s = exp(-cell.gap * t);
        const double a = cell.a + cell.top * t + log_of_ratio(s, cell.ratio);
        return Knot{cell.start + t * cell.step, a, (cell.top - cell.gap * s / fmax(s + cell.ratio, LEAST)) / cell.step};
    };
    const double even = double(place) / (HALF - 1), bend = -log(fmax(cell.ratio, LEAST)) / cell.gap;
    double around = bend + (double(place) - HALF / 2) / cell.gap;
    if (!(around >= 0 && around <= 1)) around = even;
    double least = double(INFINITE), least_t = 0, low = 0, high = 1;
    // After the samples, each round keeps 2/15 of what is between those next to the best one, at most 2/15 of a cell: six leave
    // 8e-7 of one.
#pragma unroll 1
    for (u32 round = 0; round < 8; round++) {
        const double part = (high - low) / (HALF - 1);
        double t = round == 0 ? even : round == 1 ? around : low + part * place, value = loss(at(t));
        for (u32 distance = HALF / 2; distance > 0; distance /= 2) {
            const double other = __shfl_xor_sync(ALL_LANES, value, distance), there = __shfl_xor_sync(ALL_LANES, t, distance);
            if (other < value || (other == value && there < t)) value = other, t = there;
        }
        if (value < least || (value == least && t < least_t)) least = value, least_t = t;
        if (round > 1) low = fmax(low, least_t - part), high = fmin(high, least_t + part);
        if (round != 1) continue;
        low = fmax(even < least_t ? even : 0, around < least_t ? around : 0);
        high = fmin(even > least_t ? even : 1, around > least_t ? around : 1);
        for (u32 distance = HALF / 2; distance > 0; distance /= 2) {
            low = fmax(low, __shfl_xor_sync(ALL_LANES, low, distance));
            high = fmin(high, __shfl_xor_sync(ALL_LANES, high, distance));
        }
    }
    return {at(least_t), least, true};
}

// The minimum between two neighbours, for each half of a warp its own. Where they are one, there is none.
template <typename Loss>
__device__ Bottom foretell(const Knot& left, const Knot& right, double shaped, Loss loss) {
    Bottom bottom = minimise(between(left, right, shaped), loss);
    const double alpha = bottom.knot.alpha;
    bottom.unknown = alpha - left.alpha > SAME && right.alpha - alpha > SAME;
    if (left.alpha == right.alpha) bottom.loss = double(INFINITE), bottom.unknown = false;
    return bottom;
}
