// The token of rows whose fused distribution is changed before it is drawn from: by biases and bans, by penalties, or
// by leaving out all but the most probable tokens. It runs after `fuse`, which has found α.
//
//     x = L + Σ_t α_t (E_t − S)                            excluded where a model has −∞
//     x += bias; x ← x / r or x · r where seen; x −= p + f · count where generated
//     w = exp((x − max x) / τ)
//     kept: the top k by x and their ties; the fewest, most probable first, with Σ w ≥ top_p · Σ w; w ≥ min_p
//     token = argmax over kept of (x − max x) / τ + g      or argmax x where τ is 0
//
// Every block forms x of a slice, four neighbouring ids a thread, and says of each chunk (128 ids, a warp's) the largest x
// and Σ w; where no token is left out, it draws one from each chunk. The last block of a row (a ticket after a fence) learns
// from these where the tokens lie that may be kept: for top-k and min-p it is sure, for top-p it guesses how far down they
// go, weighs them, and goes further down where they weigh too little. It brings them to its shared memory, and finds the
// borders of top-k and top-p among them, digit by digit. Where they are too many it looks at the whole row instead, by the
// same code.
//
// Sums decide which tokens are kept, so they must not depend on the order of additions: weights are whole multiples of
// 2⁻⁴⁰ of the largest.
#include "noise.cuh"

constexpr u32 THREADS = 512;
constexpr u32 WARPS = THREADS / WARP;
constexpr u32 EACH = 4;              // ids of a thread: 16 bytes
constexpr u32 CHUNK = WARP * EACH;
constexpr u32 SLICE = THREADS * EACH;
constexpr u32 ROOM = 2 * SLICE;      // tokens that the last block has room for
constexpr u32 DIGIT = 8;
constexpr u32 BINS = 1 << DIGIT;
constexpr u32 PROMPT = 0x80000000u;  // of a token that was seen without being generated

struct Best {
    float key;  // −∞ where there is none
    u32 id;     // then NOBODY
    __device__ void take(float other, u32 other_id) {
        if (other > key || (other == key && other_id < id)) key = other, id = other_id;
    }
};

// What a slice says of a chunk.
struct alignas(16) Chunk {
    Best top;        // max x
    union {
        u64 weight;  // where top-p looks at all tokens: Σ exp((x − top) / τ), in multiples of 2⁻⁴⁰
        Best drawn;  // where none is left out: max (x − top) / τ + g
    };
};

struct SampleArgs {
    const float* const* models;  // (models,): where the logits of each lie, (slots, vocab_stride)
    const FuseRow* rows;         // (rows,)
    const SampleRow* samples;    // (rows,)
    FuseResult* results;         // (rows,): α is read, the token written
    float* fused;                // (rows, slices, SLICE): room for x
    Chunk* chunks;               // (rows, slices, WARPS)
    u32* tickets;                // (rows,)
    const u64* stamps;           // as in `fuse`: null where nobody asks for times
    u32 vocab_stride;
    u32 vocab_size;
    u32 small_model;
    u32 first_expert;
};

// The largest key that weighs at least `enough` together with all larger ones.
struct Threshold {
    u32 key;     // 0 where all weigh less
    u64 above;   // the weight of larger keys
    u64 at;      // the weight of this one, 0 where all weigh less
    u64 enough;
};

// What the threads of a block tell each other.
struct Shared {
    SampleRow how;
    const float* logits[MAX_MODELS];  // of this row: the base, the small model, the experts
    float alpha[MAX_EXPERTS];
    u32 experts;
    alignas(16) float x[ROOM];        // of a slice; then of the tokens that may be drawn
    alignas(16) u32 tokens[ROOM];     // of a slice: how often each was generated, and PROMPT; then the ids of those
    u64 bins[BINS];
    Threshold found;
    u64 held;                         // the weight of the tokens that may be drawn
    u32 count;                        // how many there are
    float keys[WARPS];
    u32 ids[WARPS];
    u32 ticket;
};

// Four neighbouring logits; −∞ past the last one.
__device__ float4 four_of(const float* row, u32 id, u32 vocab_size) {
    const float* from = row + id;
    if (id + EACH <= vocab_size && u64(from) % 16 == 0) return __ldg(reinterpret_cast<const float4*>(from));
    const auto one = [&](u32 i) { return id + i < vocab_size ? __ldg(from + i) : -INFINITE; };
    return {one(0), one(1), one(2), one(3)};
}

// What all threads of a block are told.
__device__ void prepare(const SampleArgs& args, Shared& shared, u32 row_index) {
    const FuseRow& row = args.rows[row_index];
    const u32* how = reinterpret_cast<const u32*>(args.samples + row_index);
    if (threadIdx.x < sizeof(SampleRow) / sizeof(u32)) reinterpret_cast<u32*>(&shared.how)[threadIdx.x] = how[threadIdx.x];
    // A lane of the second warp is a model.
    const u32 number = threadIdx.x - WARP;
    if (number < 2 + row.experts) {
        const u32 model = number == 0 ? row.base_model : number == 1 ? args.small_model : args.first_expert + number - 2;
        shared.logits[number] = args.models[model] + u64(row.slot) * args.vocab_stride;
        if (number >= 2) shared.alpha[number - 2] = float(args.results[row_index].alpha[number - 2]);
        shared.experts = row.experts;
    }
    __syncthreads();
}

// x of four ids, before it is changed.
__device__ void fuse_four(const Shared& shared, u32 id, u32 vocab_size, float (&x)[EACH]) {
    const u32 experts = shared.experts;
    const float4 base = four_of(shared.logits[0], id, vocab_size);
    const float4 small = experts ? four_of(shared.logits[1], id, vocab_size) : make_float4(0, 0, 0, 0);
    const float s[EACH] = {small.x, small.y, small.z, small.w};
    x[0] = base.x, x[1] = base.y, x[2] = base.z, x[3] = base.w;
    float least[EACH];
    for (u32 i = 0; i < EACH; i++) least[i] = fminf(x[i], s[i]);
    for (u32 t = 0; t < experts; t++) {
        const float4 expert = four_of(shared.logits[2 + t], id, vocab_size);
        const float e[EACH] = {expert.x, expert.y, expert.z, expert.w}, alpha = shared.alpha[t];
        for (u32 i = 0; i < EACH; i++) {
            least[i] = fminf(least[i], e[i]);
            if (alpha != 0) x[i] = fmaf(alpha, e[i] - s[i], x[i]);
        }
    }
    for (u32 i = 0; i < EACH; i++) x[i] = least[i] == -INFINITE ? -INFINITE : x[i];
}

// Biases, bans and penalties of the `size` ids from `first` on, rounded as on the CPU: no product is fused with a sum.
__device__ void change(Shared& shared, const SampleRow& how, u32 first, u32 size, float (&x)[EACH]) {
    float4* own = reinterpret_cast<float4*>(shared.x) + threadIdx.x;
    if (how.bias_count > 0) {
        *own = {x[0], x[1], x[2], x[3]};
        __syncthreads();
        for (u32 i = threadIdx.x; i < how.bias_count; i += THREADS) {
            const uint2 bias = how.biases[i];
            if (bias.x - first < size) shared.x[bias.x - first] += __uint_as_float(bias.y);
        }
        __syncthreads();
        x[0] = own->x, x[1] = own->y, x[2] = own->z, x[3] = own->w;
    }
    if (how.repetition == 1 && how.presence == 0 && how.frequency == 0) return;
    uint4* counts = reinterpret_cast<uint4*>(shared.tokens) + threadIdx.x;
    *counts = {0, 0, 0, 0};
    __syncthreads();
    for (u32 i = threadIdx.x; i < how.history_len; i += THREADS) {
        const u32 at = how.history[i] - first;
        if (at >= size) continue;
        if (i < how.prompt_len) atomicOr(shared.tokens + at, PROMPT);
        else atomicAdd(shared.tokens + at, 1);
    }
    __syncthreads();
    const u32 seen_of[EACH] = {counts->x, counts->y, counts->z, counts->w};
    for (u32 i = 0; i < EACH; i++) {
        const u32 seen = seen_of[i], generated = seen & ~PROMPT;
        if (seen && how.repetition != 1) x[i] = x[i] < 0 ? x[i] * how.repetition : x[i] / how.repetition;
        if (generated) x[i] = __fsub_rn(x[i], __fadd_rn(how.presence, __fmul_rn(how.frequency, float(generated))));
    }
}

// exp(exponent) in multiples of 2⁻⁴⁰.
__device__ u64 weigh(float exponent) { return __float2ull_rn(expf(exponent) * 1099511627776.0f); }

// The sum over the lanes of a warp, in every lane, of numbers below 2⁵¹: a chunk weighs 2⁴⁷ at most.
__device__ u64 warp_sum(u64 x) {
    const u32 high = __reduce_add_sync(ALL_LANES, u32(x >> 24)), low = __reduce_add_sync(ALL_LANES, u32(x) & 0xffffff);
    return (u64(high) << 24) + low;
}

// A number whose order is that of x.
__device__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ float unordered(u32 key) { return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key); }

// The largest key of a warp, of the four of each thread, and the lowest id that has it. NaN is none.
__device__ Best warp_best(const float (&keys)[EACH], u32 id) {
    const float own = fmaxf(fmaxf(keys[0], keys[1]), fmaxf(keys[2], keys[3]));
    Best best = {unordered(__reduce_max_sync(ALL_LANES, ordered(fmaxf(own, -INFINITE)))), NOBODY};
    for (u32 i = EACH; i-- > 0;) best.id = keys[i] == best.key ? id + i : best.id;
    best.id = __reduce_min_sync(ALL_LANES, best.id);
    return best;
}

__device__ bool truncates(const SampleRow& how) { return how.top_k > 0 || how.top_p < 1 || how.min_p > 0; }

// What a warp says of its chunk.
__device__ Chunk describe(const SampleRow& how, const FuseRow& row, u32 id, const float (&x)[EACH]) {
    Chunk chunk = {warp_best(x, id)};
    if (how.scale == 0) return chunk;
    const auto exponent = [&](u32 i) { return (x[i] - chunk.top.key) * how.scale; };
    if (!truncates(how)) {
        const uint4 four = philox_four(row, id / EACH);
        const u32 words[EACH] = {four.x, four.y, four.z, four.w};
        float keys[EACH];
        for (u32 i = 0; i < EACH; i++) keys[i] = exponent(i) + gumbel(words[i]);
        chunk.drawn = warp_best(keys, id);
    } else if (how.top_p < 1 && how.top_k == 0) {
        u64 weight = 0;
        // Where all of the chunk is excluded, −∞ − −∞ is NaN, which weighs nothing.
        for (u32 i = 0; i < EACH; i++) weight += weigh(fmaxf(exponent(i), -INFINITE));
        chunk.weight = warp_sum(weight);
    }
    return chunk;
}

// What another block wrote: past the first-level cache.
__device__ Best read(const Best* from) {
    const uint2 raw = __ldcg(reinterpret_cast<const uint2*>(from));
    return {__uint_as_float(raw.x), raw.y};
}

// The largest of the keys that look(i, best) shows, i below `count`, −∞ being none: the lowest id where several tie. In every
// thread; none may still look at what an earlier call found.
template <typename Look>
__device__ Best best_of(Shared& shared, u32 count, Look look) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    Best best = {-INFINITE, NOBODY};
    for (u32 i = threadIdx.x; i < count; i += THREADS) look(i, best);
    for (u32 distance = WARP / 2; distance > 0; distance /= 2) {
        const float key = __shfl_xor_sync(ALL_LANES, best.key, distance);
        best.take(key, __shfl_xor_sync(ALL_LANES, best.id, distance));
    }
    if (lane == 0) shared.keys[warp] = best.key, shared.ids[warp] = best.id;
    __syncthreads();
    best = {-INFINITE, NOBODY};
    for (u32 w = 0; w < WARPS; w++) best.take(shared.keys[w], shared.ids[w]);
    return best;
}

// The weights of what has a key that begins like `prefix`, by the digit of the key that follows, into shared.bins. An addition of
// 64 bits in shared memory is a loop in which warps wait for each other, and most tokens share their largest digits. So the lanes
// of a warp that have one digit add up first, and each lane holds back what it gets of the first digit whose home it is.
template <typename KeyOf, typename WeightOf>
__device__ void count_digit(Shared& shared, u32 count, u32 prefix, u32 shift, KeyOf key_of, WeightOf weight_of) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    for (u32 i = threadIdx.x; i < BINS; i += THREADS) shared.bins[i] = 0;
    __syncthreads();
    u32 held = NOBODY;
    u64 held_weight = 0;
    for (u32 first = warp * WARP; first < count; first += THREADS) {
        const u32 i = first + lane;
        const u32 key = i < count ? key_of(i) : 0;
        const bool begins = i < count && (shift + DIGIT == 32 || key >> (shift + DIGIT) == prefix);
        const u64 weight = begins ? weight_of(i, key) : 0;
        const u32 digit = (key >> shift) % BINS;
        // Small numbers above and below 0 differ in the largest bit: another home.
        const u32 tag = (digit ^ digit >> 3 & 16) % WARP * BINS + digit;
        for (u32 left = __ballot_sync(ALL_LANES, weight > 0); left;) {
            const u32 leader = __ffs(left) - 1;
            const u32 of_leader = __shfl_sync(ALL_LANES, tag, leader);
            const bool same = weight > 0 && tag == of_leader;
            const u64 sum = warp_sum(same ? weight : 0);
            if (lane == of_leader / BINS) {
                if (held == NOBODY) held = of_leader;
                if (held == of_leader) held_weight += sum;
                else atomicAdd(shared.bins + of_leader % BINS, sum);
            }
            left &= ~__ballot_sync(ALL_LANES, same);
        }
    }
    if (held != NOBODY) atomicAdd(shared.bins + held % BINS, held_weight);
    __syncthreads();
}

// Narrows `found` by the digit in which the threshold lies, into shared.found: by one warp, a lane for eight digits. enough_of(Σ)
// is asked for the first digit, with the weight of all.
template <typename EnoughOf>
__device__ void find_digit(Shared& shared, Threshold found, bool begins, EnoughOf enough_of) {
    constexpr u32 OWN = BINS / WARP;
    const u32 lane = threadIdx.x % WARP;
    const u64* bins = shared.bins + lane * OWN;
    u64 own = 0;
    for (u32 i = 0; i < OWN; i++) own += bins[i];
    u64 sum = own;
    for (u32 distance = 1; distance < WARP; distance *= 2) {
        const u64 other = __shfl_down_sync(ALL_LANES, sum, distance);
        if (lane + distance < WARP) sum += other;
    }
    // At least something, or a digit would be found where nothing weighs anything.
    if (begins) found.enough = max(enough_of(__shfl_sync(ALL_LANES, sum, 0)), 1ull);
    u64 above = found.above + sum - own;
    if (lane == 0 && above + own < found.enough) shared.found = {0, above + own, 0, found.enough};
    if (above >= found.enough || above + own < found.enough) return;
    u32 i = OWN - 1;
    while (above + bins[i] < found.enough) above += bins[i--];
    shared.found = {found.key << DIGIT | (lane * OWN + i), above, bins[i], found.enough};
}

// The threshold of `count` keys, where others weigh `above` and are larger. Digits below `last_shift` aren't looked for but 0, so
// that it is a little too low.
template <typename KeyOf, typename WeightOf, typename EnoughOf>
__device__ Threshold threshold(
    Shared& shared, u32 count, u32 last_shift, u64 above, KeyOf key_of, WeightOf weight_of, EnoughOf enough_of
) {
    Threshold found = {0, above, 0, 0};
#pragma unroll 1
    for (u32 shift = 32; shift > last_shift;) {
        shift -= DIGIT;
        count_digit(shared, count, found.key, shift, key_of, weight_of);
        if (threadIdx.x < WARP) find_digit(shared, found, shift + DIGIT == 32, enough_of);
        __syncthreads();
        found = shared.found;
        if (found.at == 0) break;
    }
    found.key <<= last_shift;
    return found;
}

// What is drawn from, and what is left out of it.
struct Draw {
    const float* x;   // (count,)
    const u32* ids;   // (count,), or null where all tokens are there
    u32 count;
    float top;        // max x
    float scale;      // 1 / τ
    float cut;        // the exponent at least: less isn't brought to shared memory
    double least;     // min-p: the exponent at least
    float floor;      // top-k: x at least
    u32 key;          // top-p: ordered(x) larger,
    u32 last;         // or equal, and the id at most this

    __device__ u32 id(u32 i) const { return ids ? ids[i] : i; }
    __device__ float exponent(float x) const { return (x - top) * scale; }
    __device__ bool may(float x) const { return x >= floor && exponent(x) >= cut; }
    __device__ u64 weight(float x) const { return x >= floor ? weigh(exponent(x)) : 0; }
    __device__ bool keeps(float x, u32 id) const {
        const u32 own = ordered(x);
        return x >= floor && (own > key || (own == key && id <= last)) && double(exponent(x)) >= least;
    }
};

// What is enough for top-p.
__device__ u64 share(const SampleRow& how, u64 all) { return u64(ceil(double(how.top_p) * double(all))); }

// Raises draw.floor to the x that top-k of `count` keys reach, if as many do: a little lower where digits are left out.
template <typename KeyOf>
__device__ void find_floor(Shared& shared, const SampleRow& how, u32 count, u32 last_shift, KeyOf key_of, Draw& draw) {
    const auto one = [&](u32, u32 key) { return u64(unordered(key) > -INFINITE); };
    const auto asked = [&](u64) { return u64(how.top_k); };
    const Threshold found = threshold(shared, count, last_shift, 0, key_of, one, asked);
    if (found.at > 0) draw.floor = unordered(found.key);
}

// What chunks alone tell of the borders. For top-k: an x that k of them reach, as draw.floor. For top-p over all tokens: the weight
// that is enough, and the exponent of the best token of the last chunk, where the chunks with the best tokens hold it; else −∞.
__device__ float look_ahead(Shared& shared, const SampleRow& how, const Chunk* chunks, u32 count, Draw& draw, u64& enough) {
    const auto key_of = [&](u32 c) { return ordered(read(&chunks[c].top).key); };
    if (how.top_k > 0) {
        find_floor(shared, how, count, 16, key_of, draw);
    } else if (how.top_p < 1) {
        const auto weight_of = [&](u32 c, u32 key) {
            const float top = unordered(key), factor = top > -INFINITE ? expf(draw.exponent(top)) : 0;
            return __double2ull_rn(double(__ldcg(&chunks[c].weight)) * double(factor));
        };
        const Threshold found = threshold(shared, count, 16, 0, key_of, weight_of, [&](u64 all) { return share(how, all); });
        enough = found.enough;
        return draw.exponent(unordered(found.key));
    }
    return -INFINITE;
}

// Brings what may be drawn to shared memory, in any order: shared.count tokens, or, where it has no room for them, a number above
// ROOM. shared.held is what they weigh, where it is asked for.
__device__ void gather(Shared& shared, const float* x, const Chunk* chunks, u32 count, const Draw& draw, bool weighs) {
    const u32 warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, before = (1u << lane) - 1;
    __syncthreads();
    if (threadIdx.x == 0) shared.count = 0, shared.held = 0;
    __syncthreads();
    u64 held = 0;
    bool full = false;
    for (u32 first = warp; first < count && !full; first += THREADS) {
        const u32 own = first + lane * WARPS;
        const bool may = own < count && draw.may(read(&chunks[own].top).key);
        for (u32 left = __ballot_sync(ALL_LANES, may); left && !full; left &= left - 1) {
            const u32 id = (first + (__ffs(left) - 1) * WARPS) * CHUNK + lane * EACH;
            const float4 four = __ldcg(reinterpret_cast<const float4*>(x + id));
            const float each[EACH] = {four.x, four.y, four.z, four.w};
            u32 found[EACH], all = 0;
            for (u32 i = 0; i < EACH; i++) found[i] = __ballot_sync(ALL_LANES, draw.may(each[i])), all += __popc(found[i]);
            u32 at = lane == 0 ? atomicAdd(&shared.count, all) : 0;
            at = __shfl_sync(ALL_LANES, at, 0);
            full = at + all > ROOM;
            for (u32 i = 0; i < EACH && !full; at += __popc(found[i++])) {
                if (!(found[i] >> lane & 1)) continue;
                const u32 to = at + __popc(found[i] & before);
                shared.x[to] = each[i], shared.tokens[to] = id + i;
                if (weighs) held += draw.weight(each[i]);
            }
        }
    }
    if (weighs) {
        // A lane may hold 2⁵²: too much for warp_sum.
        for (u32 distance = WARP / 2; distance > 0; distance /= 2) held += __shfl_xor_sync(ALL_LANES, held, distance);
        if (lane == 0 && held > 0) atomicAdd(&shared.held, held);
    }
    __syncthreads();
}

// Leaves out what top-k and top-p leave out.
__device__ void truncate(Shared& shared, const SampleRow& how, u64 enough, Draw& draw) {
    const auto key_of = [&](u32 i) { return ordered(draw.x[i]); };
    if (how.top_k > 0) find_floor(shared, how, draw.count, 0, key_of, draw);
    if (how.top_p == 1) return;
    const auto weight_of = [&](u32, u32 key) { return draw.weight(unordered(key)); };
    const auto asked = [&](u64 all) { return how.top_k > 0 ? share(how, all) : enough; };
    const Threshold found = threshold(shared, draw.count, 0, 0, key_of, weight_of, asked);
    draw.key = found.key;
    if (found.at > draw.weight(unordered(found.key))) {
        // Several tie for the last place: the lower ids come first.
        const auto tied = [&](u32 i, u32) { return key_of(i) == found.key ? draw.weight(draw.x[i]) : 0; };
        const auto before = [&](u32 i) { return ~draw.id(i); };
        const auto rest = [&](u64) { return found.enough; };
        draw.last = ~threshold(shared, draw.count, 0, found.above, before, tied, rest).key;
    }
}

// The token that is drawn where none is left out: one of those that chunks drew.
__device__ Best draw_any(Shared& shared, const SampleRow& how, const Chunk* chunks, u32 count, float top) {
    __syncthreads();
    return best_of(shared, count, [&](u32 c, Best& best) {
        const Best of_chunk = read(&chunks[c].top), drawn = read(&chunks[c].drawn);
        const float key = (of_chunk.key - top) * how.scale + drawn.key;
        if (key > -INFINITE) best.take(key, drawn.id);
    });
}

// The token that is drawn from x (vocab_size,) of `count` chunks, of which the largest is `top`, where some are left out.
__device__ Best draw_some(
    Shared& shared, const FuseRow& row, const SampleRow& how, const float* x, u32 vocab_size, const Chunk* chunks, u32 count,
    float top
) {
    // What isn't excluded is as large.
    constexpr float LOWEST = -3.40282347e38f;
    Draw draw = {shared.x, shared.tokens, 0, top, how.scale, 0, log(double(how.min_p)), LOWEST, 0, NOBODY};
    u64 enough = 0;
    const float likely = look_ahead(shared, how, chunks, count, draw, enough);
    // No noise is below −3.13 or above 22.875: below this no token beats the largest. Top-p adds up all of top-k, though.
    const float sure = how.top_k > 0 && how.top_p < 1 ? -INFINITE : fmaxf(__double2float_rd(draw.least), -26.1f);
    // Tokens that are little less probable than the best of the last chunk weigh enough, if likely ones don't stand together.
    bool done = false;
    for (float margin = 2; !done; margin *= 2) {
        draw.cut = fmaxf(likely - margin, sure);
        gather(shared, x, chunks, count, draw, enough > 0);
        draw.count = shared.count;
        done = draw.cut == sure || draw.count > ROOM || shared.held >= enough;
    }
    if (draw.count > ROOM) draw.x = x, draw.ids = nullptr, draw.count = vocab_size;
    truncate(shared, how, enough, draw);
    return best_of(shared, draw.count, [&](u32 i, Best& best) {
        const float exponent = draw.exponent(draw.x[i]);
        const u32 id = draw.id(i);
        // No g is larger.
        if (!draw.keeps(draw.x[i], id) || exponent + 22.875f < best.key) return;
        const float key = exponent + gumbel(philox(row, id));
        if (key > -INFINITE) best.take(key, id);
    });
}

// token[row] = argmax (x − max x) / τ + g over the tokens that are kept, or argmax x where τ is 0; NOBODY where all are
// excluded. And what each model gave for it.
//
// grid   (slices, rows) × 512 threads: a slice is 2048 ids, whatever the rows
// shared 34 KiB: x of a slice, then the tokens that may be drawn, 4096 at most
// bytes  a row's logits of every model once, and the history once a slice; where tokens are left out, x is written once, and of it
//        those chunks are read that have a token that may be drawn, or, where these are too many, all of it, 4 to 8 times for
//        each of top-k and top-p; 16 bytes a chunk, written once and read a few times
// bound  latency: of a slice, and of the last block's digits
// needs  results of the same rows, by `fuse`; an id at most once among the biases; tickets zero before the first launch;
//        history and biases as long as they say; room for x and chunks 16-byte aligned
extern "C" __global__ __launch_bounds__(THREADS, 2) void sample(const SampleArgs args) {
    __shared__ Shared shared;
    const u32 slices = gridDim.x, row_index = blockIdx.y, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    prepare(args, shared, row_index);
    const SampleRow& how = shared.how;
    if (!how.active) return;
    const FuseRow& row = args.rows[row_index];
    FuseResult& result = args.results[row_index];
    float* of_row = args.fused + u64(row_index) * slices * SLICE;
    Chunk* chunks = args.chunks + u64(row_index) * slices * WARPS;
    const u32 first = blockIdx.x * SLICE, id = first + threadIdx.x * EACH;
    float x[EACH];
    fuse_four(shared, id, args.vocab_size, x);
    change(shared, how, first, min(SLICE, args.vocab_size - first), x);
    if (how.scale > 0 && truncates(how)) *reinterpret_cast<float4*>(of_row + id) = {x[0], x[1], x[2], x[3]};
    const Chunk chunk = describe(how, row, id, x);
    if (lane == 0) chunks[blockIdx.x * WARPS + warp] = chunk;
    // As in `fuse`: to thread 0, from there to the last block, and back.
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        shared.ticket = atomicAdd(args.tickets + row_index, 1);
        __threadfence();
    }
    __syncthreads();
    if (shared.ticket != slices - 1) return;
    if (threadIdx.x == 0) args.tickets[row_index] = 0;

    const u32 count = slices * WARPS;
    Best best = best_of(shared, count, [&](u32 c, Best& best) {
        const Best top = read(&chunks[c].top);
        if (top.key > -INFINITE) best.take(top.key, top.id);
    });
    // A bias may have made one infinite: nothing is as probable.
    if (how.scale > 0 && best.id != NOBODY && best.key < INFINITE) {
        best = truncates(how) ? draw_some(shared, row, how, of_row, args.vocab_size, chunks, count, best.key)
                              : draw_any(shared, how, chunks, count, best.key);
    }
    const u64 at = u64(row.slot) * args.vocab_stride + min(best.id, args.vocab_size - 1);
    if (threadIdx.x < 2 + row.experts) tell(row, args.models, at, args.small_model, args.first_expert, result, threadIdx.x);
    if (threadIdx.x == 0) {
        result.token = best.id;
        if (args.stamps) result.done = now();
    }
}
