// Gumbel noise for each token id of one step: g = −ln(−ln u), the same whoever draws it.
#pragma once

#include "fusion.cuh"

// Ten rounds of Philox4x32 at counter (quarter, step, 0): a word for each of the tokens from 4 · quarter on.
__device__ inline uint4 philox_four(const FuseRow& row, u32 quarter) {
    u32 c0 = quarter, c1 = row.step[0], c2 = row.step[1], c3 = 0;
    u32 k0 = row.seed[0], k1 = row.seed[1];
#pragma unroll
    for (u32 round = 0; round < 10; round++) {
        const u32 low_a = 0xD2511F53u * c0, high_a = __umulhi(0xD2511F53u, c0);
        const u32 low_b = 0xCD9E8D57u * c2, high_b = __umulhi(0xCD9E8D57u, c2);
        c0 = high_b ^ c1 ^ k0, c1 = low_b, c2 = high_a ^ c3 ^ k1, c3 = low_a;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// The word of one token.
__device__ inline u32 philox(const FuseRow& row, u32 id) {
    const uint4 words = philox_four(row, id / 4);
    return id % 4 == 0 ? words.x : id % 4 == 1 ? words.y : id % 4 == 2 ? words.z : words.w;
}

// −ln(−ln u), u = (w + ½) / 2³²; near 1 the distance from 1 is what counts.
__device__ inline float gumbel(u32 word) {
    const float step = 2.3283064365386963e-10f;
    const float inner = word < 0x80000000u ? -logf((float(word) + 0.5f) * step) : -log1pf(-(float(~word) + 0.5f) * step);
    return -logf(inner);
}
