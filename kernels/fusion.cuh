// The rows and results of fusion, which its kernel (fusion.cu), the sampler (sample.cu) and what is between two steps
// (step.cu) share.
#pragma once

#include "common.cuh"

constexpr u32 MAX_EXPERTS = 8;
constexpr u32 MAX_MODELS = MAX_EXPERTS + 2;
constexpr u32 NOBODY = 0xffffffffu;

// What one lane sums.
struct FuseLane {
    float alpha;
    u32 base;       // 0: the model that is steered, 1: the small one, 2 + t: expert t
    u32 direction;  // t: D_t, COMBINED, or NO_DIRECTION: d = 0
};

// Which lane is what, counted from the row's first one.
struct FuseLayout {
    u32 first;                   // of these lanes; the numbers below count from it
    u32 lanes;
    u32 tracks;                  // directions with candidates
    u32 track[MAX_EXPERTS];      // the lane with α = 0 of each; its candidates follow
    u32 candidates[MAX_EXPERTS]; // of each
    u32 target[MAX_EXPERTS];     // the lane of S along D_t; that of E_t follows
};

struct FuseRow {
    u32 slot;
    u32 base_model;              // index of the model that is steered
    u32 experts;                 // 0 where the base runs alone
    u32 first_lane;              // in `lanes`
    u32 held;                    // which layout is used: α are given
    u32 every;                   // α is sought at steps 0, every, 2 · every, …; 0: never
    float coefficient[MAX_EXPERTS];  // the α that are given
    u32 objective;               // 0: both terms, 1: KL(P̃‖P) alone, 2: KL(P‖P̃) alone
    u32 refined;                 // whether the minimum between candidates is sought
    u32 forced;                  // the token that is given, or NOBODY
    float scale;                 // 1 / temperature, or 0: greedy, or `sample` draws
    u32 seed[2];
    u32 step[2];
    FuseLayout layout[2];        // of a search (or a model alone), and of α that are given
};

// How `sample` chooses a row's token. The row's history and biases lie behind each other in one list.
struct SampleRow {
    u32* history;                // (history_len,): tokens that penalties look at, and room for more
    const uint2* biases;         // (bias_count,): an id, each once, and the bits of the f32 that is added
    u32 history_len;
    u32 prompt_len;              // how many of them weren't generated
    u32 bias_count;
    u32 active;                  // 0: `fuse` has chosen already
    float scale;                 // 1 / temperature, or 0: greedy
    u32 top_k;                   // 0: all
    float top_p;                 // 1: all
    float min_p;                 // 0: all
    float repetition, presence, frequency;
    u32 unused;
};

struct FuseResult {
    double loss, forward, reverse;
    double alpha[MAX_EXPERTS];   // of each expert
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

// What a model gave for the chosen token: the base for number 0, the small model for 1, the experts from 2 on.
__device__ inline void tell(
    const FuseRow& row, const float* const* models, u64 at, u32 small_model, u32 first_expert, FuseResult& result, u32 number
) {
    if (number == 0) result.logit_base = models[row.base_model][at];
    else if (number == 1) result.logit_small = row.experts ? models[small_model][at] : 0;
    else result.logit_expert[number - 2] = models[first_expert + number - 2][at];
}
