//! AVX2, FMA and F16C.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, Simd};

/// The proof that this machine has AVX2, FMA and F16C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The token, where the machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    /// Compiles `kernel` for these instructions and runs it.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn compiled<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: the token exists only where the instructions do.
        unsafe { compiled(self, kernel) }
    }
}

/// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇)) of each.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn sum4(v: [__m256; 4]) -> [f32; 4] {
    let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    let (low, high) = (_mm256_castps256_ps128(pairs), _mm256_extractf128_ps::<1>(pairs));
    // SAFETY: both are 16 bytes, and every bit pattern is an f32.
    unsafe { std::mem::transmute(_mm_add_ps(low, high)) }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;
    type V = __m256;
    type Part = [f32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        intrinsic!(_mm256_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's, and the token.
        unsafe { _mm256_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16_at(self, p: *const f16) -> __m256 {
        // SAFETY: the caller's, and the token.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16_at(self, p: *const bf16) -> __m256 {
        // SAFETY: the caller's, and the token.
        let wide = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) };
        intrinsic!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
    }

    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller's, and the token.
        unsafe { _mm256_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_NTA>(p.cast()))
    }

    lanewise! { __m256:
        add(a, b) = _mm256_add_ps,
        sub(a, b) = _mm256_sub_ps,
        mul(a, b) = _mm256_mul_ps,
        div(a, b) = _mm256_div_ps,
        fma(a, b, c) = _mm256_fmadd_ps,
        max(a, b) = _mm256_max_ps,
        min(a, b) = _mm256_min_ps,
    }

    #[inline(always)]
    fn keep_from(self, a: __m256, x: __m256, limit: __m256) -> __m256 {
        intrinsic!(_mm256_and_ps(a, _mm256_cmp_ps::<_CMP_GE_OQ>(x, limit)))
    }

    #[inline(always)]
    fn scale_by_power(self, a: __m256, n: __m256) -> __m256 {
        intrinsic!({
            let exponent = _mm256_slli_epi32::<23>(_mm256_castps_si256(n));
            _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent))
        })
    }

    #[inline(always)]
    fn fold(self, v: __m256) -> [f32; 8] {
        // SAFETY: both are 32 bytes, and every bit pattern is an f32.
        unsafe { std::mem::transmute(v) }
    }

    #[inline(always)]
    fn transpose(self, mut square: [__m256; LANES]) -> [__m256; LANES] {
        // Each 128-bit half: squares of four lanes.
        for i in [0, 4] {
            let [a, b, c, d] = [square[i], square[i + 1], square[i + 2], square[i + 3]];
            let (ab, cd) = intrinsic!((_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d)));
            let (ab_high, cd_high) = intrinsic!((_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d)));
            square[i] = intrinsic!(_mm256_shuffle_ps::<0x44>(ab, cd));
            square[i + 1] = intrinsic!(_mm256_shuffle_ps::<0xee>(ab, cd));
            square[i + 2] = intrinsic!(_mm256_shuffle_ps::<0x44>(ab_high, cd_high));
            square[i + 3] = intrinsic!(_mm256_shuffle_ps::<0xee>(ab_high, cd_high));
        }
        for i in 0..4 {
            let (a, b) = (square[i], square[i + 4]);
            square[i] = intrinsic!(_mm256_permute2f128_ps::<0x20>(a, b));
            square[i + 4] = intrinsic!(_mm256_permute2f128_ps::<0x31>(a, b));
        }
        square
    }

    #[inline(always)]
    fn sum4(self, v: [__m256; 4]) -> [f32; 4] {
        intrinsic!(sum4(v))
    }
}
