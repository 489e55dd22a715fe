// The token of rows whose fused distribution is changed before it is drawn from: by biases and bans, by penalties, or
// by leaving out all but the most probable tokens. It runs after `fuse`, which has found α.
//
//     x = L + Σ_t α_t (E_t − S)                            excluded where a model has −∞
//     x += bias; x ← x / r or x · r where seen; x −= p + f · count where generated
//     w = exp((x − max x) / τ)
//     kept: the top k by x and their ties; the fewest, most probable first, with Σ w ≥ top_p · Σ w; w ≥ min_p
//     token = argmax over kept of (x − max x) / τ + g      or argmax x where τ is 0
//
// One block is one row: it writes x to the L2 cache and walks over it again for every digit of a threshold. Sums decide
// which tokens are kept, so they must not depend on the order of additions: weights are whole multiples of 2⁻⁴⁰.
#include "noise.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 DIGIT = 8;
constexpr u32 BINS = 1 << DIGIT;

struct SampleArgs {
    const float* const* models;  // (models,): where the logits of each lie, (slots, vocab_stride)
    const FuseRow* rows;         // (rows,)
    const SampleRow* samples;    // (rows,)
    FuseResult* results;         // (rows,): α is read, the token written
    float* fused;                // (rows, vocab_stride): room for x
    u32* counts;                 // (rows, vocab_stride): zeros between launches
    const u64* stamps;           // as in `fuse`: null where nobody asks for times
    u32 vocab_stride;
    u32 vocab_size;
    u32 small_model;
    u32 first_expert;
};

// What the threads of a block tell each other.
struct Shared {
    u64 bins[WARPS][BINS];
    u64 sums[BINS];
    float keys[WARPS];
    u32 ids[WARPS];
    u64 above, at;
    u32 digit;
};

// x of this row.
__device__ void fuse_row(const SampleArgs& args, const FuseRow& row, const FuseResult& result, float* x) {
    const u64 first = u64(row.slot) * args.vocab_stride;
    const float* base = args.models[row.base_model] + first;
    const float* small = row.experts ? args.models[args.small_model] + first : nullptr;
    for (u32 id = threadIdx.x; id < args.vocab_size; id += THREADS) {
        float sum = base[id];
        bool excluded = sum == -INFINITE;
        for (u32 t = 0; t < row.experts; t++) {
            const float expert = args.models[args.first_expert + t][first + id], alpha = float(result.alpha[t]);
            excluded |= expert == -INFINITE || small[id] == -INFINITE;
            if (alpha != 0) sum = fmaf(alpha, expert - small[id], sum);
        }
        x[id] = excluded ? -INFINITE : sum;
    }
    __syncthreads();
}

// Calls change(id, count) once for each id among `tokens`, with how often it is there. `counts` is zero before and after.
template <typename Change>
__device__ void for_each_count(const u32* tokens, u32 len, u32* counts, u32 vocab_size, Change change) {
    for (u32 i = threadIdx.x; i < len; i += THREADS) {
        if (tokens[i] < vocab_size) atomicAdd(counts + tokens[i], 1);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < len; i += THREADS) {
        if (tokens[i] >= vocab_size) continue;
        const u32 count = atomicExch(counts + tokens[i], 0);
        if (count > 0) change(tokens[i], count);
    }
    __syncthreads();
}

// Biases, bans and penalties, rounded as on the CPU: no product is fused with a sum.
__device__ void change_row(const SampleRow& how, float* x, u32* counts, u32 vocab_size) {
    for (u32 i = threadIdx.x; i < how.bias_count; i += THREADS) {
        const uint2 bias = how.biases[i];
        if (bias.x < vocab_size) x[bias.x] += __uint_as_float(bias.y);
    }
    __syncthreads();
    if (how.repetition != 1) {
        for_each_count(how.history, how.history_len, counts, vocab_size, [&](u32 id, u32) {
            x[id] = x[id] < 0 ? x[id] * how.repetition : x[id] / how.repetition;
        });
    }
    if (how.presence != 0 || how.frequency != 0) {
        const u32* generated = how.history + how.prompt_len;
        for_each_count(generated, how.history_len - how.prompt_len, counts, vocab_size, [&](u32 id, u32 count) {
            x[id] = __fsub_rn(x[id], __fadd_rn(how.presence, __fmul_rn(how.frequency, float(count))));
        });
    }
}

struct Best {
    float key;  // −∞ where there is none
    u32 id;     // then NOBODY
    __device__ void take(float other, u32 other_id) {
        if (other > key || (other == key && other_id < id)) key = other, id = other_id;
    }
};

// The id with the largest key_of(id), −∞ being none: the lowest where several tie. In every thread.
template <typename KeyOf>
__device__ Best best_of(Shared& shared, u32 vocab_size, KeyOf key_of) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Best best = {-INFINITE, NOBODY};
    for (u32 id = threadIdx.x; id < vocab_size; id += THREADS) {
        const float key = key_of(id, best.key);
        if (key > -INFINITE) best.take(key, id);
    }
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        const float key = __shfl_xor_sync(ALL_LANES, best.key, distance);
        best.take(key, __shfl_xor_sync(ALL_LANES, best.id, distance));
    }
    __syncthreads();
    if (lane == 0) shared.keys[warp] = best.key, shared.ids[warp] = best.id;
    __syncthreads();
    best = {-INFINITE, NOBODY};
    for (u32 w = 0; w < WARPS; w++) best.take(shared.keys[w], shared.ids[w]);
    return best;
}

// A number whose order is that of x.
__device__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float unordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The weights of the tokens whose key begins like `prefix`, by the digit of the key that follows: shared.sums[d] is the
// weight of digit d and of all above it.
template <typename KeyOf, typename WeightOf>
__device__ void count_digit(Shared& shared, u32 vocab_size, u32 prefix, u32 shift, KeyOf key_of, WeightOf weight_of) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 i = threadIdx.x; i < WARPS * BINS; i += THREADS) shared.bins[i / BINS][i % BINS] = 0;
    __syncthreads();
    for (u32 first = warp * WARP; first < vocab_size; first += THREADS) {
        const u32 id = first + lane;
        const u32 key = id < vocab_size ? key_of(id) : 0;
        const bool begins = id < vocab_size && (shift + DIGIT == 32 || key >> (shift + DIGIT) == prefix);
        const u64 weight = begins ? weight_of(id) : 0;
        const u32 digit = (key >> shift) % BINS;
        // Lanes with one digit add up first: most tokens share their largest digits, and would wait for each other.
        for (u32 left = __ballot_sync(ALL_LANES, weight > 0); left;) {
            const u32 leader = __ffs(left) - 1;
            const u32 of_leader = __shfl_sync(ALL_LANES, digit, leader);
            const bool same = weight > 0 && digit == of_leader;
            // A weight has at most 41 bits.
            const u32 high = __reduce_add_sync(ALL_LANES, same ? u32(weight >> 20) : 0);
            const u32 low = __reduce_add_sync(ALL_LANES, same ? u32(weight) & 0xfffff : 0);
            if (lane == leader) shared.bins[warp][digit] += (u64(high) << 20) + low;
            left &= ~__ballot_sync(ALL_LANES, same);
        }
        __syncwarp();
    }
    __syncthreads();
    if (threadIdx.x < BINS) {
        u64 sum = 0;
        for (u32 w = 0; w < WARPS; w++) sum += shared.bins[w][threadIdx.x];
        shared.sums[threadIdx.x] = sum;
    }
    __syncthreads();
#pragma unroll 1
    for (u32 distance = 1; distance < BINS; distance *= 2) {
        const u64 sum = threadIdx.x + distance < BINS ? shared.sums[threadIdx.x + distance] : 0;
        __syncthreads();
        if (threadIdx.x < BINS) shared.sums[threadIdx.x] += sum;
        __syncthreads();
    }
}

struct Threshold {
    u32 key;
    u64 above;   // the weight of larger keys
    u64 at;      // the weight of this one
    u64 enough;
};

// The largest key that weighs at least `enough` together with `above` and all larger keys. enough_of(Σ) is asked once, with
// the weight of all; where even they weigh less, the key is 0.
template <typename KeyOf, typename WeightOf, typename EnoughOf>
__device__ Threshold threshold(Shared& shared, u32 vocab_size, u64 above, KeyOf key_of, WeightOf weight_of, EnoughOf enough_of) {
    Threshold found = {0, above, 0, 0};
#pragma unroll 1
    for (u32 shift = 32; shift > 0;) {
        shift -= DIGIT;
        count_digit(shared, vocab_size, found.key, shift, key_of, weight_of);
        if (shift + DIGIT == 32) {
            // At least something, or no digit would be found where nothing weighs anything.
            found.enough = max(enough_of(shared.sums[0]), 1ull);
            if (found.above + shared.sums[0] < found.enough) return found;
        }
        if (threadIdx.x < BINS) {
            const u64 larger = threadIdx.x + 1 < BINS ? shared.sums[threadIdx.x + 1] : 0;
            const bool reaches = found.above + shared.sums[threadIdx.x] >= found.enough;
            if (reaches && found.above + larger < found.enough) {
                shared.digit = threadIdx.x, shared.above = found.above + larger;
                shared.at = shared.sums[threadIdx.x] - larger;
            }
        }
        __syncthreads();
        found = {found.key << DIGIT | shared.digit, shared.above, shared.at, found.enough};
    }
    return found;
}

// The logits of a row as they are drawn from.
struct Draw {
    const float* x;
    float top;    // max x
    float scale;  // 1 / τ
    double least; // min-p: the exponent at least
    float floor;  // top-k: x at least
    u32 key;      // top-p: ordered(x) larger,
    u32 last;     // or equal, and the id at most this

    __device__ float exponent(u32 id) const { return (x[id] - top) * scale; }
    __device__ u64 weigh(float logit) const {
        return logit >= floor ? __float2ull_rn(expf((logit - top) * scale) * 1099511627776.0f) : 0;
    }
    __device__ bool keeps(u32 id) const {
        const u32 own = ordered(x[id]);
        if (!(x[id] >= floor) || own < key || (own == key && id > last)) return false;
        return x[id] > -INFINITE && double(exponent(id)) >= least;
    }
};

// Leaves out what top-k and top-p leave out.
__device__ void truncate(Shared& shared, const SampleRow& how, u32 vocab_size, Draw& draw) {
    const auto key_of = [&](u32 id) { return ordered(draw.x[id]); };
    if (how.top_k > 0) {
        const auto one = [&](u32 id) { return u64(draw.x[id] > -INFINITE); };
        const auto k = [&](u64) { return u64(how.top_k); };
        const Threshold found = threshold(shared, vocab_size, 0, key_of, one, k);
        // No number has the key 0: there are fewer than k.
        if (found.key > 0) draw.floor = unordered(found.key);
    }
    if (how.top_p < 1) {
        const auto weight = [&](u32 id) { return draw.weigh(draw.x[id]); };
        const auto share = [&](u64 all) { return u64(ceil(double(how.top_p) * double(all))); };
        const Threshold found = threshold(shared, vocab_size, 0, key_of, weight, share);
        draw.key = found.key;
        if (found.at > draw.weigh(unordered(found.key))) {
            // Several tie for the last place: the lower ids come first.
            const auto tied = [&](u32 id) { return key_of(id) == found.key ? weight(id) : 0; };
            const auto before = [](u32 id) { return ~id; };
            const auto enough = [&](u64) { return found.enough; };
            draw.last = ~threshold(shared, vocab_size, found.above, before, tied, enough).key;
        }
    }
}

// token[row] = argmax (x − max x) / τ + g over the tokens that are kept, or argmax x where τ is 0; NOBODY where all are
// excluded. And what each model gave for it.
//
// grid   (rows) × 512 threads
// bytes  a row's logits of every model once, x written and read 2 times from the L2 cache, and 4 to 8 times more for each
//        of top-k and top-p: 4 · vocab_size each
// bound  latency, of walks by one block
// needs  results of the same rows, by `fuse`; an id at most once among the biases; counts zero before the first launch;
//        history and biases as long as they say
extern "C" __global__ __launch_bounds__(THREADS, 1) void sample(const SampleArgs args) {
    __shared__ Shared shared;
    const SampleRow& how = args.samples[blockIdx.x];
    if (!how.active) return;
    const FuseRow& row = args.rows[blockIdx.x];
    FuseResult& result = args.results[blockIdx.x];
    const u32 vocab_size = args.vocab_size;
    float* x = args.fused + u64(blockIdx.x) * args.vocab_stride;
    fuse_row(args, row, result, x);
    change_row(how, x, args.counts + u64(blockIdx.x) * args.vocab_stride, vocab_size);
    Best best = best_of(shared, vocab_size, [&](u32 id, float) { return x[id]; });
    // A bias may have made one infinite: nothing is as probable.
    if (how.scale > 0 && best.id != NOBODY && best.key < INFINITE) {
        Draw draw = {x, best.key, how.scale, log(double(how.min_p)), -INFINITE, 0, NOBODY};
        truncate(shared, how, vocab_size, draw);
        best = best_of(shared, vocab_size, [&](u32 id, float ahead) {
            // No g is larger than 22.875.
            if (!draw.keeps(id) || draw.exponent(id) + 22.875f < ahead) return -INFINITE;
            return draw.exponent(id) + gumbel(philox(row, id));
        });
    }
    const u64 at = u64(row.slot) * args.vocab_stride + min(best.id, vocab_size - 1);
    if (threadIdx.x < 2 + row.experts) tell(row, args.models, at, args.small_model, args.first_expert, result, threadIdx.x);
    if (threadIdx.x == 0) {
        result.token = best.id;
        if (args.stamps) result.done = now();
    }
}
