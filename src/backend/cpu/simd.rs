//! Eight f32 lanes, and the mathematics that every kernel shares.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each instruction set; [`Isa::run`] picks one
//! at run time. Sums have one order whatever the instruction set or the size of a tile, so a number never depends
//! on how the work was cut.

use half::{bf16, f16};

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// `n` rounded up to whole vectors.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// Eight f32 lanes. The value is a token: who holds one may use the instructions.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Eight f32.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Loads eight f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight f32; any alignment.
    unsafe fn load(self, p: *const f32) -> Self::V;
    /// Loads eight f16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight f16; any alignment.
    unsafe fn load_f16(self, p: *const f16) -> Self::V;
    /// Loads eight bf16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight bf16; any alignment.
    unsafe fn load_bf16(self, p: *const bf16) -> Self::V;
    /// Stores eight f32.
    ///
    /// # Safety
    /// `p` must be valid for writing eight f32; any alignment.
    unsafe fn store(self, p: *mut f32, v: Self::V);
    /// Asks for the cache line of `p`, which may point anywhere.
    fn prefetch(self, p: *const u8);
    /// a + b
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// a − b
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a / b
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// a · b + c, rounded once where the hardware can.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// a where a > b, else b: `b` also where one is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// a where a < b, else b: `b` also where one is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// The nearest whole number; |x| < 2²².
    fn round(self, x: Self::V) -> Self::V;
    /// x · 2ⁿ for whole n from −150 to 128, rounded once.
    fn scale(self, x: Self::V, n: Self::V) -> Self::V;
    /// The lanes, in order.
    fn lanes(self, v: Self::V) -> [f32; LANES];
    /// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇)) of four vectors.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇))
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let v = self.lanes(v);
        ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
    }

    /// The largest lane.
    #[inline(always)]
    fn max_lane(self, v: Self::V) -> f32 {
        self.lanes(v).into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }

    /// eˣ within 2 ulp: exactly 0 below −104, +inf above 88.73, NaN for NaN.
    ///
    /// x = n ln 2 + r with |r| ≤ ln 2 / 2, and eʳ by the polynomial of Cephes' `expf`.
    #[inline(always)]
    fn exp(self, x: Self::V) -> Self::V {
        // NaN passes as the second operand. e⁻¹⁰⁴ is less than half the smallest subnormal, e⁸⁹ overflows.
        let x = self.max(self.splat(-104.0), self.min(self.splat(89.0), x));
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        // The high part of ln 2 has nine bits: n times it is exact, with or without FMA.
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let p = self.splat(1.987_569_1e-4);
        let p = self.fma(p, r, self.splat(1.398_199_9e-3));
        let p = self.fma(p, r, self.splat(8.333_452e-3));
        let p = self.fma(p, r, self.splat(4.166_579_6e-2));
        let p = self.fma(p, r, self.splat(1.666_666_5e-1));
        let p = self.fma(p, r, self.splat(0.5));
        let p = self.fma(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.scale(p, n)
    }
}

/// A number as a tensor stores it.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Loads eight as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight elements; any alignment.
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V;

    /// One as f32.
    fn get(self) -> f32;

    /// The first lanes from `elements`, the others 0.
    #[inline(always)]
    fn load_partial<S: Simd>(simd: S, elements: &[Self]) -> S::V {
        let mut lanes = [0.0; LANES];
        for (lane, &element) in lanes.iter_mut().zip(elements) {
            *lane = element.get();
        }
        // SAFETY: `lanes` has eight f32.
        unsafe { simd.load(lanes.as_ptr()) }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load(p) }
    }

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_f16(p) }
    }

    #[inline(always)]
    fn get(self) -> f32 {
        f32_from_f16(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_bf16(p) }
    }

    #[inline(always)]
    fn get(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// f16 → f32 in plain arithmetic, so that the compiler can vectorise it: exponents are rebiased by a
/// multiplication, which also normalises subnormals.
#[inline(always)]
fn f32_from_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let rebiased = (f32::from_bits(magnitude) * f32::from_bits(0x7780_0000)).to_bits();
    let special = if magnitude >= 0x0f80_0000 { 0x7f80_0000 } else { 0 };
    f32::from_bits(rebiased | special | (bits & 0x8000) << 16)
}

/// A computation that runs on any instruction set.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Computes. Implementations are `#[inline(always)]`, to be compiled for the instructions of their caller.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The instruction set, chosen once when a backend is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What the target guarantees.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
}

impl Isa {
    /// The best one that this machine has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = avx2::Avx2::detect() {
            return Self::Avx2(token);
        }
        Self::Portable
    }

    /// Runs `kernel` with these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(token) => token.run(kernel),
        }
    }
}

/// Plain arrays, which the compiler turns into whatever vectors the target has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Lanes of [`Portable`], aligned like a vector.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Lanes([f32; LANES]);

/// One operation on each lane.
#[inline(always)]
fn map2(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    Lanes(std::array::from_fn(|i| f(a.0[i], b.0[i])))
}

impl Simd for Portable {
    type V = Lanes;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        Lanes([x; LANES])
    }

    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16(self, p: *const f16) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[f16; LANES]>().read_unaligned() }.map(Element::get))
    }

    #[inline(always)]
    unsafe fn load_bf16(self, p: *const bf16) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[bf16; LANES]>().read_unaligned() }.map(Element::get))
    }

    #[inline(always)]
    unsafe fn store(self, p: *mut f32, v: Lanes) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; LANES]>().write_unaligned(v.0) }
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}

    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        // Without the instruction, `mul_add` is a slow call.
        let fused = cfg!(any(target_arch = "aarch64", target_feature = "fma"));
        Lanes(std::array::from_fn(|i| {
            if fused { a.0[i].mul_add(b.0[i], c.0[i]) } else { a.0[i] * b.0[i] + c.0[i] }
        }))
    }

    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        map2(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, x: Lanes) -> Lanes {
        // Above 1.5 · 2²³ the spacing of f32 is 1.
        Lanes(x.0.map(|x| (x + 12_582_912.0) - 12_582_912.0))
    }

    #[inline(always)]
    fn scale(self, x: Lanes, n: Lanes) -> Lanes {
        // Two factors, because 2ⁿ alone may not be a normal number.
        let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
        map2(x, n, |x, n| {
            let n = n as i32;
            let half = n >> 1;
            x * power(half) * power(n - half)
        })
    }

    #[inline(always)]
    fn lanes(self, v: Lanes) -> [f32; LANES] {
        v.0
    }

    #[inline(always)]
    fn sum4(self, v: [Lanes; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
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

    /// An intrinsic without pointers.
    macro_rules! intrinsic {
        ($e:expr) => {
            // SAFETY: only a holder of the token gets here, and it exists only where the instructions do.
            unsafe { $e }
        };
    }

    impl Simd for Avx2 {
        type V = __m256;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            intrinsic!(_mm256_set1_ps(x))
        }

        #[inline(always)]
        unsafe fn load(self, p: *const f32) -> __m256 {
            // SAFETY: the caller's, and the token.
            unsafe { _mm256_loadu_ps(p) }
        }

        #[inline(always)]
        unsafe fn load_f16(self, p: *const f16) -> __m256 {
            // SAFETY: the caller's, and the token.
            unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) }
        }

        #[inline(always)]
        unsafe fn load_bf16(self, p: *const bf16) -> __m256 {
            // SAFETY: the caller's, and the token.
            let wide = unsafe { _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())) };
            intrinsic!(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide)))
        }

        #[inline(always)]
        unsafe fn store(self, p: *mut f32, v: __m256) {
            // SAFETY: the caller's, and the token.
            unsafe { _mm256_storeu_ps(p, v) }
        }

        #[inline(always)]
        fn prefetch(self, p: *const u8) {
            intrinsic!(_mm_prefetch::<_MM_HINT_T0>(p.cast()))
        }

        #[inline(always)]
        fn add(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_add_ps(a, b))
        }

        #[inline(always)]
        fn sub(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_sub_ps(a, b))
        }

        #[inline(always)]
        fn mul(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_mul_ps(a, b))
        }

        #[inline(always)]
        fn div(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_div_ps(a, b))
        }

        #[inline(always)]
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
            intrinsic!(_mm256_fmadd_ps(a, b, c))
        }

        #[inline(always)]
        fn max(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_max_ps(a, b))
        }

        #[inline(always)]
        fn min(self, a: __m256, b: __m256) -> __m256 {
            intrinsic!(_mm256_min_ps(a, b))
        }

        #[inline(always)]
        fn round(self, x: __m256) -> __m256 {
            intrinsic!(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
        }

        #[inline(always)]
        fn scale(self, x: __m256, n: __m256) -> __m256 {
            // Two factors, because 2ⁿ alone may not be a normal number.
            intrinsic!({
                let n = _mm256_cvtps_epi32(n);
                let half = _mm256_srai_epi32::<1>(n);
                let rest = _mm256_sub_epi32(n, half);
                let bias = _mm256_set1_epi32(127);
                let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
                let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
                _mm256_mul_ps(_mm256_mul_ps(x, _mm256_castsi256_ps(first)), _mm256_castsi256_ps(second))
            })
        }

        #[inline(always)]
        fn lanes(self, v: __m256) -> [f32; LANES] {
            let mut lanes = [0.0; LANES];
            // SAFETY: `lanes` has eight f32; the token.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), v) };
            lanes
        }

        #[inline(always)]
        fn sum4(self, v: [__m256; 4]) -> [f32; 4] {
            let mut sums = [0.0; 4];
            // SAFETY: `sums` has four f32; the token.
            unsafe {
                let pairs = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
                let low = _mm256_castps256_ps128(pairs);
                let high = _mm256_extractf128_ps::<1>(pairs);
                _mm_storeu_ps(sums.as_mut_ptr(), _mm_add_ps(low, high));
            }
            sums
        }
    }
}

#[cfg(test)]
mod tests;
