#include "common.cuh"

struct EmbedArgs {
    float* hidden;       // (rows, stride) f32: the residual stream
    const void* table;   // (vocab_size, stride) of set 0
    const u32* token;    // (rows,)
    const u32* set_first;  // (sets + 1,): rows of set z are set_first[z] .. set_first[z + 1]
    u64 set_stride;      // bytes from one set's table to the next
    u32 stride;          // hidden_size rounded up to 8; the padding of the table is zero
    u32 counters;        // numbers in progress
    u32* progress;       // (counters,): what the projections of this step count with, see lora.cuh
};

// hidden[row, :] = table[set of row][token[row], :] as f32; progress = 0
//
// grid   (most rows of a set, 1, sets) × 128 threads; a block is a row
// bytes  reads and writes one row each; bound by latency, it is a few microseconds at most
// needs  token[row] < vocab_size; 16-byte aligned rows
template <typename T>
__device__ void embed(const EmbedArgs& args) {
    const u32 block = blockIdx.z * gridDim.x + blockIdx.x, threads = gridDim.z * gridDim.x * blockDim.x;
    for (u32 i = block * blockDim.x + threadIdx.x; i < args.counters; i += threads) args.progress[i] = 0;
    const u32 set = blockIdx.z;
    const u32 row = args.set_first[set] + blockIdx.x;
    if (row >= args.set_first[set + 1]) return;
    const T* table = advance(static_cast<const T*>(args.table), set * args.set_stride);
    const T* from = table + u64(args.token[row]) * args.stride;
    float* to = args.hidden + u64(row) * args.stride;
    for (u32 k = threadIdx.x; k < args.stride; k += blockDim.x) to[k] = to_f32(from[k]);
}

extern "C" __global__ void embed_f32(const EmbedArgs args) { embed<float>(args); }
extern "C" __global__ void embed_f16(const EmbedArgs args) { embed<f16>(args); }
extern "C" __global__ void embed_bf16(const EmbedArgs args) { embed<bf16>(args); }
