// The search for α as a tensor framework runs it: each operation is a launch, each intermediate tensor lies in device
// memory. What fusion.cu is measured against by `dlf-engine bench fusion`; no generation runs it.
//
//     log_softmax     log P, log Q, log Q_t                         the models
//     subtract        D_t = E_t − S                                 each expert
//     kl_terms, row_sum   KL(Q_t‖Q), KL(Q‖Q_t)                      each expert, twice
//     tilt            x = L + α D_t                                 each candidate of each expert, or all of an expert at once
//     log_softmax     log P̃
//     kl_terms, row_sum   KL(P̃‖P), KL(P‖P̃)                          twice
//     loss            Σ_t (KL(P̃‖P) − KL(Q_t‖Q))² + (KL(P‖P̃) − KL(Q‖Q_t))²
//     argmin, tilt_chosen, argmax                                   the candidate, its fused row, the token
//
// The operations of one formula that work number by number are one launch, as a compiler of tensors makes them; a
// reduction is a block for each row, as PyTorch's log-softmax is. Tensors are (rows, cols) f32, row r at r · stride; sums,
// losses and indices are a number a row. Where an operand has fewer rows than the result, row r reads its row r / per.
//
// needs   finite logits; stride ≥ cols and a multiple of 4; tensors at multiples of 16 bytes
#include "common.cuh"

constexpr u32 WIDE_BLOCK = 1024;  // threads of a reduction

// What the operations on whole rows take; each uses what it needs.
struct TensorArgs {
    const float* x;      // (rows / x_per, cols)
    const float* y;      // (rows / y_per, cols)
    const float* alpha;  // (y_per,): tilt; (experts, x_per): tilt_chosen
    const u32* choice;   // (rows,): tilt_chosen
    void* out;           // (rows, cols) f32; (rows,) f32: row_sum; (rows,) u32: argmin, argmax
    u32 cols;
    u32 stride;
    u32 x_per;           // tilt_chosen: candidates of an expert
    u32 y_per;           // tilt_chosen: rows of an expert in y, (experts, y_per, cols)
};

struct LossArgs {
    const float* forward;  // (rows,): KL(P̃‖P)
    const float* reverse;  // (rows,): KL(P‖P̃)
    const float* targets;  // (2, experts, batch): KL(Q_t‖Q), then KL(Q‖Q_t)
    float* losses;         // (batch, stride)
    u32 rows;              // batch · per, candidates of one row of the batch one after another
    u32 per;
    u32 batch;
    u32 experts;
    u32 first;             // where in a row of `losses` these candidates begin
    u32 stride;
};

// out[i] = f(x[i], y[i]) for the four numbers of this thread.
template <typename F>
__device__ void number_by_number(const float* x, const float* y, float* out, u32 cols, F f) {
    const u32 i = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (i + 4 <= cols) {
        const float4 a = *reinterpret_cast<const float4*>(x + i), b = *reinterpret_cast<const float4*>(y + i);
        *reinterpret_cast<float4*>(out + i) = make_float4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
    } else {
        for (u32 j = i; j < cols; j++) out[j] = f(x[j], y[j]);
    }
}

// Calls f(i, x[i]) for the numbers of a row that are this thread's, in order.
template <typename F>
__device__ void numbers_of(const float* x, u32 cols, F f) {
    constexpr u32 IN_FLIGHT = 4;
    const u32 whole = cols & ~3u, step = 4 * blockDim.x;
    for (u32 first = 4 * threadIdx.x; first < whole; first += IN_FLIGHT * step) {
        float4 a[IN_FLIGHT];
#pragma unroll
        for (u32 n = 0; n < IN_FLIGHT; n++) {
            if (first + n * step < whole) a[n] = *reinterpret_cast<const float4*>(x + first + n * step);
        }
#pragma unroll
        for (u32 n = 0; n < IN_FLIGHT; n++) {
            const u32 i = first + n * step;
            if (i < whole) f(i, a[n].x), f(i + 1, a[n].y), f(i + 2, a[n].z), f(i + 3, a[n].w);
        }
    }
    for (u32 i = whole + threadIdx.x; i < cols; i += blockDim.x) f(i, x[i]);
}

// What all threads of a block have, joined; in every thread. `nothing` joins without effect.
template <typename T, typename Join>
__device__ T over_block(T mine, T nothing, Join join) {
    __shared__ T of_warps[WARP];
    const auto over_warp = [&](T value) {
#pragma unroll
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) value = join(value, value.from(distance));
        return value;
    };
    mine = over_warp(mine);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = mine;
    __syncthreads();
    return over_warp(threadIdx.x % WARP < blockDim.x / WARP ? of_warps[threadIdx.x % WARP] : nothing);
}

__device__ float other(float x, u32 distance) { return __shfl_xor_sync(ALL_LANES, x, distance); }

struct Total {
    float sum;
    __device__ Total from(u32 distance) const { return {other(sum, distance)}; }
};

// m = max x, s = Σ exp(x − m)
struct Exponentials {
    float m, s;
    __device__ Exponentials from(u32 distance) const { return {other(m, distance), other(s, distance)}; }
};

struct Best {
    float value;
    u32 index;
    __device__ Best from(u32 distance) const {
        return {other(value, distance), __shfl_xor_sync(ALL_LANES, index, distance)};
    }
};

__device__ Exponentials join(Exponentials a, Exponentials b) {
    const float top = fmaxf(a.m, b.m);
    // Both empty: −∞ − (−∞) is no number.
    if (top == -INFINITE) return a;
    return {top, a.s * expf(a.m - top) + b.s * expf(b.m - top)};
}

// out = x − y
//
// grid    (⌈cols / 1024⌉, rows) × 256 threads, four numbers a thread
// bytes   12 · rows · cols
// bound   memory bandwidth, or the launch
extern "C" __global__ __launch_bounds__(256) void subtract(const TensorArgs args) {
    const u64 row = u64(blockIdx.y) * args.stride;
    float* out = static_cast<float*>(args.out) + row;
    number_by_number(args.x + row, args.y + row, out, args.cols, [](float x, float y) { return x - y; });
}

// out = x + α y, α[k] for the k-th of `y_per` rows of one row of x and y
//
// grid    (⌈cols / 1024⌉, rows) × 256 threads, four numbers a thread
// bytes   12 · rows · cols
// bound   memory bandwidth, or the launch
extern "C" __global__ __launch_bounds__(256) void tilt(const TensorArgs args) {
    const float alpha = args.alpha[blockIdx.y % args.y_per];
    const u64 from = u64(blockIdx.y / args.y_per) * args.stride;
    float* out = static_cast<float*>(args.out) + u64(blockIdx.y) * args.stride;
    number_by_number(args.x + from, args.y + from, out, args.cols, [=](float x, float y) { return fmaf(alpha, y, x); });
}

// out = x + α y of the candidate that was chosen: number c is candidate c mod `x_per` of expert c / `x_per`
//
// grid    (⌈cols / 1024⌉, rows) × 256 threads, four numbers a thread
// bytes   12 · rows · cols
// bound   memory bandwidth, or the launch
extern "C" __global__ __launch_bounds__(256) void tilt_chosen(const TensorArgs args) {
    const u32 choice = args.choice[blockIdx.y];
    const float alpha = args.alpha[choice];
    const u64 row = u64(blockIdx.y) * args.stride, of_expert = u64(choice / args.x_per) * args.y_per * args.stride;
    float* out = static_cast<float*>(args.out) + row;
    const auto add = [=](float x, float y) { return fmaf(alpha, y, x); };
    number_by_number(args.x + row, args.y + of_expert + row, out, args.cols, add);
}

// out = exp(x) (x − y): the terms of KL(p‖q) for x = log p and y = log q
//
// grid    (⌈cols / 1024⌉, rows) × 256 threads, four numbers a thread
// bytes   12 · rows · cols
// bound   memory bandwidth, or the launch
extern "C" __global__ __launch_bounds__(256) void kl_terms(const TensorArgs args) {
    const float* x = args.x + u64(blockIdx.y / args.x_per) * args.stride;
    const float* y = args.y + u64(blockIdx.y / args.y_per) * args.stride;
    float* out = static_cast<float*>(args.out) + u64(blockIdx.y) * args.stride;
    number_by_number(x, y, out, args.cols, [](float x, float y) { return expf(x) * (x - y); });
}

// out = x − m − ln Σ exp(x − m), m = max x
//
// grid    rows × 1024 threads
// bytes   12 · rows · cols: a row is read twice
// bound   memory bandwidth of one multiprocessor, where rows are few
extern "C" __global__ __launch_bounds__(WIDE_BLOCK) void log_softmax(const TensorArgs args) {
    const float* x = args.x + u64(blockIdx.x) * args.stride;
    float* out = static_cast<float*>(args.out) + u64(blockIdx.x) * args.stride;
    Exponentials mine = {-INFINITE, 0};
    numbers_of(x, args.cols, [&](u32, float x) {
        // Where nothing was summed yet, the factor is exp(−∞) = 0.
        if (x > mine.m) mine.s *= expf(mine.m - x), mine.m = x;
        mine.s += expf(x - mine.m);
    });
    const auto both = [](Exponentials a, Exponentials b) { return join(a, b); };
    const Exponentials all = over_block(mine, Exponentials{-INFINITE, 0}, both);
    const float log_sum = all.m + logf(all.s);
    const u32 whole = args.cols & ~3u;
    for (u32 i = 4 * threadIdx.x; i < whole; i += 4 * blockDim.x) {
        const float4 a = *reinterpret_cast<const float4*>(x + i);
        *reinterpret_cast<float4*>(out + i) = make_float4(a.x - log_sum, a.y - log_sum, a.z - log_sum, a.w - log_sum);
    }
    for (u32 i = whole + threadIdx.x; i < args.cols; i += blockDim.x) out[i] = x[i] - log_sum;
}

// out = Σ x, a number for each row
//
// grid    rows × 1024 threads
// bytes   4 · rows · cols
// bound   memory bandwidth of one multiprocessor, where rows are few
extern "C" __global__ __launch_bounds__(WIDE_BLOCK) void row_sum(const TensorArgs args) {
    Total mine = {0};
    numbers_of(args.x + u64(blockIdx.x) * args.stride, args.cols, [&](u32, float x) { mine.sum += x; });
    const Total all = over_block(mine, Total{0}, [](Total a, Total b) { return Total{a.sum + b.sum}; });
    if (threadIdx.x == 0) static_cast<float*>(args.out)[blockIdx.x] = all.sum;
}

// The least number of each row or the largest, the lowest index where several tie.
template <typename Before>
__device__ void best_of_row(const TensorArgs& args, float worst, Before before) {
    Best mine = {worst, 0xffffffffu};
    numbers_of(args.x + u64(blockIdx.x) * args.stride, args.cols, [&](u32 i, float x) {
        if (before(x, mine.value)) mine = {x, i};
    });
    const Best all = over_block(mine, Best{worst, 0xffffffffu}, [=](Best a, Best b) {
        return before(b.value, a.value) || (b.value == a.value && b.index < a.index) ? b : a;
    });
    if (threadIdx.x == 0) static_cast<u32*>(args.out)[blockIdx.x] = all.index;
}

// out = argmin x, an index for each row
//
// grid    rows × 1024 threads
// bytes   4 · rows · cols
// bound   the launch
extern "C" __global__ __launch_bounds__(WIDE_BLOCK) void argmin(const TensorArgs args) {
    best_of_row(args, INFINITE, [](float a, float b) { return a < b; });
}

// out = argmax x, an index for each row
//
// grid    rows × 1024 threads
// bytes   4 · rows · cols
// bound   memory bandwidth of one multiprocessor, where rows are few
extern "C" __global__ __launch_bounds__(WIDE_BLOCK) void argmax(const TensorArgs args) {
    best_of_row(args, -INFINITE, [](float a, float b) { return a > b; });
}

// losses[b, first + k] = Σ_t (forward − forward target_t)² + (reverse − reverse target_t)²
//
// grid    ⌈rows / 256⌉ × 256 threads, a candidate of a row of the batch each
// bytes   12 · rows + 8 · experts · rows
// bound   the launch
extern "C" __global__ __launch_bounds__(256) void loss(const LossArgs args) {
    const u32 r = blockIdx.x * blockDim.x + threadIdx.x;
    if (r >= args.rows) return;
    const u32 b = r / args.per, k = r % args.per;
    float sum = 0;
    for (u32 t = 0; t < args.experts; t++) {
        const float forward = args.forward[r] - args.targets[t * args.batch + b];
        const float reverse = args.reverse[r] - args.targets[(args.experts + t) * args.batch + b];
        sum += forward * forward + reverse * reverse;
    }
    args.losses[b * args.stride + args.first + k] = sum;
}
