// The first half of a low-rank update: t = A x. The second, B t, is an epilogue of the projections (gemv.cuh).
#include "common.cuh"

struct LoraArgs {
    const float* x;          // (rows, stride) f32
    const float* norm;       // (cols,) of set 0, with zeros up to stride, or null: no RMSNorm
    const float* a;          // (outputs, stride) of adapter 0
    float* t;                // (rows, outputs) f32
    const u32* adapter;      // (rows,), 0xffffffff for none
    const u32* set_first;    // (sets + 1,)
    u64 set_stride;          // bytes from one set's norm to the next
    u64 lora_stride;         // bytes from one adapter to the next
    u32 outputs;             // segments · rank
    u32 stride;
    u32 cols;
    u32 sets;
    float eps;
};

// t[row, j] = Σ_k A[adapter of row][j, k] y[k] with y = rms_norm(x[row]), or x[row] itself
//
// grid   (⌈outputs / 8⌉, rows) × 256 threads; a warp is an output
// bytes  A of every adapter in use, once a row; bound by memory bandwidth, small beside the weights
// needs  16-byte aligned rows
extern "C" __global__ __launch_bounds__(256) void lora_down(const LoraArgs args) {
    const u32 row = blockIdx.y, j = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const u32 adapter = args.adapter[row];
    if (j >= args.outputs || adapter == 0xffffffffu) return;
    u32 set = 0;
    while (set + 1 < args.sets && row >= args.set_first[set + 1]) set++;
    const float* norm = args.norm ? advance(args.norm, set * args.set_stride) : nullptr;
    const float* a = advance(args.a, adapter * args.lora_stride) + u64(j) * args.stride;
    const float* x = args.x + u64(row) * args.stride;
    float sum = 0, squares = 0;
    for (u32 k = 4 * lane; k < args.stride; k += 4 * WARP) {
        float4 v = *reinterpret_cast<const float4*>(x + k);
        const float4 w = __ldg(reinterpret_cast<const float4*>(a + k));
        if (norm) {
            squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
            const float4 n = __ldg(reinterpret_cast<const float4*>(norm + k));
            v.x *= n.x, v.y *= n.y, v.z *= n.z, v.w *= n.w;
        }
        sum = fmaf(w.x, v.x, fmaf(w.y, v.y, fmaf(w.z, v.z, fmaf(w.w, v.w, sum))));
    }
    sum = warp_sum(sum);
    if (norm) sum *= 1.0f / sqrtf(warp_sum(squares) / float(args.cols) + args.eps);
    if (lane == 0) args.t[u64(row) * args.outputs + j] = sum;
}
