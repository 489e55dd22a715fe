// The rows and results of fusion, which the kernel of fusion.cu and those between two steps (step.cu) share.
#pragma once

#include "common.cuh"

constexpr u32 MAX_EXPERTS = 8;

// What one lane sums.
struct FuseLane {
    float alpha;
    u32 base;       // 0: the model that is steered, 1: the small one, 2 + t: expert t
    u32 direction;  // t: D_t, COMBINED, or NO_DIRECTION: d = 0
};

// A row, and which lane is what: indices among its own lanes.
struct FuseRow {
    u32 slot;
    u32 base_model;              // index of the model that is steered
    u32 experts;                 // 0 where the base runs alone
    u32 first_lane;              // in `lanes`
    u32 lane_count;
    u32 tracks;                  // directions with candidates
    u32 track[MAX_EXPERTS];      // the lane with α = 0 of each; its candidates follow
    u32 candidates[MAX_EXPERTS]; // of each
    u32 target[MAX_EXPERTS];     // the lane of S along D_t; that of E_t follows
    float coefficient[MAX_EXPERTS];  // c_t
    u32 objective;               // 0: both terms, 1: KL(P̃‖P) alone, 2: KL(P‖P̃) alone
    u32 forced;                  // the token that is given, or NOBODY
    float scale;                 // 1 / temperature, or 0: greedy
    u32 seed[2];
    u32 step[2];
};

struct FuseResult {
    double loss, forward, reverse;
    double log_sum_fused, log_sum_base, log_sum_small;
    double log_sum_expert[MAX_EXPERTS];
    double forward_target[MAX_EXPERTS];
    double reverse_target[MAX_EXPERTS];
    u64 not_finite;              // 16 · token + model of the first NaN or +inf, or ALL_FINITE
    u32 token, argmax_fused, argmax_base;
    u32 track, candidate;
    u32 argmax_expert[MAX_EXPERTS];
    float logit_base, logit_small;
    float logit_expert[MAX_EXPERTS];
    u32 empty;                   // every token is excluded
    u64 begun, large_done;       // nanoseconds, where the launch has stamps: when the step began, when the large
    u64 joined, done;            // model was done, when this launch began, and when the row was decided
};

// Nanoseconds since some moment, the same for the whole GPU.
__device__ inline u64 now() {
    u64 time;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(time));
    return time;
}
