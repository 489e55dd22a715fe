// What turns one decoding step into the next with no help of the host.
#include "fusion.cuh"

// A group's rows: what changes from step to step.
struct StepGroup {
    u32* token;               // (rows,)
    u32* position;            // (rows,)
    const u32* wanted_slot;   // (rows,): model · slots + slot
    u64 rows;                 // 0 where the group doesn't run
};

struct AdvanceArgs {
    StepGroup large, small;
    const FuseResult* results;  // (slots,): the step that ends
    FuseRow* fused;             // (fused_rows,)
    SampleRow* samples;         // (fused_rows,)
    u64* stamps;                // [0]: when the step began
    u32 slots;
    u32 fused_rows;
    u32 vocab_size;
};

struct StampArgs {
    u64* to;
};

// token[r] = what was chosen in r's slot; position[r] += 1
// of fusion: step += 1; α is held or sought, as that step has it; the token goes to the history
//
// grid   (1) × 256 threads: there are at most a few hundred rows
// bytes  a few words a row; bound by latency, a microsecond or two
// needs  each row wants its logits, so that wanted_slot has an entry for it; slot s was decided in results[s]; a history
//        has room for another token
extern "C" __global__ __launch_bounds__(256) void advance(const AdvanceArgs args) {
    const auto forward = [&](const StepGroup& group) {
        for (u32 row = threadIdx.x; row < group.rows; row += blockDim.x) {
            const u32 token = args.results[group.wanted_slot[row] % args.slots].token;
            // A row that failed has no token; what it computes next is thrown away, but must exist.
            group.token[row] = token < args.vocab_size ? token : 0;
            group.position[row] += 1;
        }
    };
    forward(args.large);
    forward(args.small);
    for (u32 row = threadIdx.x; row < args.fused_rows; row += blockDim.x) {
        FuseRow& fused = args.fused[row];
        const FuseResult& result = args.results[row];
        const u64 step = (u64(fused.step[1]) << 32 | fused.step[0]) + 1;
        fused.step[0] = u32(step), fused.step[1] = u32(step >> 32);
        if (!fused.held) {
            for (u32 t = 0; t < fused.experts; t++) fused.coefficient[t] = float(result.alpha[t]);
        }
        fused.held = fused.every == 0 || step % fused.every != 0;
        SampleRow& sample = args.samples[row];
        // A row that failed has no token to remember, and no next step.
        if (sample.active && sample.history) sample.history[sample.history_len++] = min(result.token, args.vocab_size);
    }
    if (threadIdx.x == 0) args.stamps[0] = now();
}

// *to = the time, in nanoseconds
//
// grid   (1) × 1 thread
// bytes  8; bound by latency, a microsecond
extern "C" __global__ __launch_bounds__(32) void stamp(const StampArgs args) { *args.to = now(); }
