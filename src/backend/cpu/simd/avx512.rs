//! AVX-512, with the parts that all such processors have had since Skylake.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Kernel, LANES, Simd, avx2};

/// The proof that this machine has AVX-512 F, BW, DQ and VL, and what [`Avx2`](super::Avx2) needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token, where the machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        super::Avx2::detect().filter(|_| found).map(|_| Self(()))
    }

    /// Compiles `kernel` for these instructions and runs it.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
        fn compiled<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
            kernel.run(token)
        }
        // SAFETY: the token exists only where the instructions do.
        unsafe { compiled(self, kernel) }
    }
}

/// The upper half added to the lower.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn folded(v: __m512) -> __m256 {
    _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps::<1>(v))
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const MANY_REGISTERS: bool = true;
    type V = __m512;
    type Part = [f32; 16];

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        intrinsic!(_mm512_set1_ps(x))
    }

    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's, and the token.
        unsafe { _mm512_loadu_ps(p) }
    }

    #[inline(always)]
    unsafe fn load_f16_at(self, p: *const f16) -> __m512 {
        // SAFETY: the caller's, and the token.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16_at(self, p: *const bf16) -> __m512 {
        // SAFETY: the caller's, and the token.
        let wide = unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) };
        intrinsic!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide)))
    }

    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller's, and the token.
        unsafe { _mm512_storeu_ps(p, v) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        intrinsic!(_mm_prefetch::<_MM_HINT_NTA>(p.cast()))
    }

    lanewise! { __m512:
        add(a, b) = _mm512_add_ps,
        sub(a, b) = _mm512_sub_ps,
        mul(a, b) = _mm512_mul_ps,
        div(a, b) = _mm512_div_ps,
        fma(a, b, c) = _mm512_fmadd_ps,
        max(a, b) = _mm512_max_ps,
        min(a, b) = _mm512_min_ps,
    }

    #[inline(always)]
    fn keep_from(self, a: __m512, x: __m512, limit: __m512) -> __m512 {
        intrinsic!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_GE_OQ>(x, limit), a))
    }

    #[inline(always)]
    fn scale_by_power(self, a: __m512, n: __m512) -> __m512 {
        intrinsic!({
            let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(n));
            _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent))
        })
    }

    #[inline(always)]
    fn fold(self, v: __m512) -> [f32; 8] {
        // SAFETY: the token; both are 32 bytes, and every bit pattern is an f32.
        unsafe { std::mem::transmute(folded(v)) }
    }

    #[inline(always)]
    fn transpose(self, mut square: [__m512; LANES]) -> [__m512; LANES] {
        // Each 128-bit part: squares of four lanes.
        for i in [0, 4, 8, 12] {
            let [a, b, c, d] = [square[i], square[i + 1], square[i + 2], square[i + 3]];
            let (ab, cd) = intrinsic!((_mm512_unpacklo_ps(a, b), _mm512_unpacklo_ps(c, d)));
            let (ab_high, cd_high) = intrinsic!((_mm512_unpackhi_ps(a, b), _mm512_unpackhi_ps(c, d)));
            square[i] = intrinsic!(_mm512_shuffle_ps::<0x44>(ab, cd));
            square[i + 1] = intrinsic!(_mm512_shuffle_ps::<0xee>(ab, cd));
            square[i + 2] = intrinsic!(_mm512_shuffle_ps::<0x44>(ab_high, cd_high));
            square[i + 3] = intrinsic!(_mm512_shuffle_ps::<0xee>(ab_high, cd_high));
        }
        // The square of four such parts.
        for i in 0..4 {
            let [a, b, c, d] = [square[i], square[i + 4], square[i + 8], square[i + 12]];
            let (ab, cd) =
                intrinsic!((_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)));
            let (ab_odd, cd_odd) =
                intrinsic!((_mm512_shuffle_f32x4::<0xdd>(a, b), _mm512_shuffle_f32x4::<0xdd>(c, d)));
            square[i] = intrinsic!(_mm512_shuffle_f32x4::<0x88>(ab, cd));
            square[i + 4] = intrinsic!(_mm512_shuffle_f32x4::<0x88>(ab_odd, cd_odd));
            square[i + 8] = intrinsic!(_mm512_shuffle_f32x4::<0xdd>(ab, cd));
            square[i + 12] = intrinsic!(_mm512_shuffle_f32x4::<0xdd>(ab_odd, cd_odd));
        }
        square
    }

    #[inline(always)]
    fn sum4(self, v: [__m512; 4]) -> [f32; 4] {
        intrinsic!(avx2::sum4([folded(v[0]), folded(v[1]), folded(v[2]), folded(v[3])]))
    }
}
