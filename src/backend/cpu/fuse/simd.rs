//! Eight f32 lanes: one small vocabulary of operations, once in AVX2 and once in plain Rust.
//!
//! The mathematics is written once, over [`Simd`]. A value of the implementing type is the proof that the CPU
//! has the instructions, so the operations are safe; [`dispatch`] is the only place where code compiled for
//! more than the baseline is entered.

use std::array;

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// Which instructions are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    /// What the target's baseline has.
    Portable,
}

impl Level {
    /// The best that this CPU has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = Avx2::detect() {
            return Self::Avx2(avx2);
        }
        Self::Portable
    }
}

/// Work that is generic over the instructions. `run` must be `#[inline(always)]`, as must everything it calls
/// that touches vectors: only what ends up inside [`dispatch`] is compiled for the wider instructions.
pub(crate) trait Kernel {
    /// What the work returns.
    type Output;
    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Runs `kernel` with the instructions of `level`.
pub(crate) fn dispatch<K: Kernel>(level: Level, kernel: K) -> K::Output {
    match level {
        #[cfg(target_arch = "x86_64")]
        Level::Avx2(avx2) => {
            #[target_feature(enable = "avx2,fma")]
            fn enter<K: Kernel>(simd: Avx2, kernel: K) -> K::Output {
                kernel.run(simd)
            }
            // SAFETY: a value of `Avx2` exists only where the CPU has AVX2 and FMA.
            unsafe { enter(avx2, kernel) }
        }
        Level::Portable => kernel.run(Portable),
    }
}

/// Eight f32 lanes. Every operation is lane by lane and IEEE but where it says otherwise.
pub(crate) trait Simd: Copy {
    /// The vector.
    type F32: Copy;

    /// `x` in all lanes.
    fn splat(self, x: f32) -> Self::F32;
    /// The eight values.
    fn load(self, values: &[f32; LANES]) -> Self::F32;
    /// The eight lanes.
    fn store(self, a: Self::F32, values: &mut [f32; LANES]);
    /// a + b
    fn add(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a − b
    fn sub(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a·b
    fn mul(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// a·b + c; rounded once where the CPU has such an instruction.
    fn mul_add(self, a: Self::F32, b: Self::F32, c: Self::F32) -> Self::F32;
    /// The larger one, or `b` where either is NaN.
    fn max(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// The smaller one, or `b` where either is NaN.
    fn min(self, a: Self::F32, b: Self::F32) -> Self::F32;
    /// `a` where `x` is at least `limit`, elsewhere (and where `x` is NaN) 0.
    fn keep_from(self, a: Self::F32, x: Self::F32, limit: Self::F32) -> Self::F32;
    /// a·2ⁿ where the low bits of `n` hold the integer n in two's complement, and the result is normal.
    fn scale_by_power(self, a: Self::F32, n: Self::F32) -> Self::F32;

    /// The lanes.
    #[inline(always)]
    fn to_array(self, a: Self::F32) -> [f32; LANES] {
        let mut values = [0.0; LANES];
        self.store(a, &mut values);
        values
    }

    /// The sum of the lanes, in f64 and in a fixed order.
    #[inline(always)]
    fn sum(self, a: Self::F32) -> f64 {
        let v = self.to_array(a).map(f64::from);
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    /// The smallest lane; a NaN lane counts as ∞.
    #[inline(always)]
    fn smallest(self, a: Self::F32) -> f32 {
        self.to_array(a).into_iter().fold(f32::INFINITY, f32::min)
    }

    /// The largest lane; a NaN lane counts as −∞.
    #[inline(always)]
    fn largest(self, a: Self::F32) -> f32 {
        self.to_array(a).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Plain Rust: the compiler makes of it what the target's baseline has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Eight f32 side by side.
#[derive(Clone, Copy, Debug)]
#[repr(align(32))]
pub(crate) struct Eight([f32; LANES]);

impl Eight {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Simd for Portable {
    type F32 = Eight;

    #[inline(always)]
    fn splat(self, x: f32) -> Eight {
        Eight([x; LANES])
    }
    #[inline(always)]
    fn load(self, values: &[f32; LANES]) -> Eight {
        Eight(*values)
    }
    #[inline(always)]
    fn store(self, a: Eight, values: &mut [f32; LANES]) {
        *values = a.0;
    }
    #[inline(always)]
    fn add(self, a: Eight, b: Eight) -> Eight {
        a.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Eight, b: Eight) -> Eight {
        a.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Eight, b: Eight) -> Eight {
        a.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn mul_add(self, a: Eight, b: Eight, c: Eight) -> Eight {
        // Where there is no instruction for it, `f32::mul_add` is a slow call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            Eight(array::from_fn(|i| a.0[i].mul_add(b.0[i], c.0[i])))
        } else {
            Eight(array::from_fn(|i| a.0[i] * b.0[i] + c.0[i]))
        }
    }
    #[inline(always)]
    fn max(self, a: Eight, b: Eight) -> Eight {
        a.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Eight, b: Eight) -> Eight {
        a.zip(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn keep_from(self, a: Eight, x: Eight, limit: Eight) -> Eight {
        Eight(array::from_fn(|i| if x.0[i] >= limit.0[i] { a.0[i] } else { 0.0 }))
    }
    #[inline(always)]
    fn scale_by_power(self, a: Eight, n: Eight) -> Eight {
        a.zip(n, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::is_x86_feature_detected;
    use std::arch::x86_64::*;

    use super::{LANES, Simd};

    /// The proof that this CPU has AVX2 and FMA: [`detect`](Self::detect) alone makes one.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) struct Avx2(());

    impl Avx2 {
        pub(crate) fn detect() -> Option<Self> {
            (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")).then_some(Self(()))
        }
    }

    macro_rules! intrinsic {
        ($call:expr) => {
            // SAFETY: a value of `Avx2` exists only where the CPU has AVX2 and FMA; loads and stores are
            // unaligned ones through references to exactly eight values.
            unsafe { $call }
        };
    }

    impl Simd for Avx2 {
        type F32 = __m256;

        #[inline(always)]
        fn splat(self, x: f32) -> __m256 {
            intrinsic!(_mm256_set1_ps(x))
        }
        #[inline(always)]
        fn load(self, values: &[f32; LANES]) -> __m256 {
            intrinsic!(_mm256_loadu_ps(values.as_ptr()))
        }
        #[inline(always)]
        fn store(self, a: __m256, values: &mut [f32; LANES]) {
            intrinsic!(_mm256_storeu_ps(values.as_mut_ptr(), a));
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
        fn mul_add(self, a: __m256, b: __m256, c: __m256) -> __m256 {
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
    }
}
