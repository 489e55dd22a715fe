//! Eight f32 lanes, and the mathematics that every kernel shares.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each instruction set; [`Isa::run`] picks one
//! at run time, and is the only place where code compiled for more than the baseline is entered. Sums have one order whatever the instruction set or the size of a tile, so a number never depends
//! on how the work was cut.

#[cfg(target_arch = "x86_64")]
mod avx2;
mod exp;
mod portable;
#[cfg(test)]
mod tests;

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
use portable::Portable;

pub(crate) use exp::{exp, exp_scaled, exp_weight};

/// Lanes of a vector.
pub(crate) const LANES: usize = 8;

/// A vector in memory.
pub(crate) type Vector = [f32; LANES];

/// `n` rounded up to whole vectors.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// Eight f32 lanes. The value is a token: who holds one may use the instructions. Every operation is lane by lane
/// and IEEE but where it says otherwise.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Eight f32.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Loads eight f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight f32; any alignment.
    unsafe fn load_at(self, p: *const f32) -> Self::V;
    /// Loads eight f16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight f16; any alignment.
    unsafe fn load_f16_at(self, p: *const f16) -> Self::V;
    /// Loads eight bf16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight bf16; any alignment.
    unsafe fn load_bf16_at(self, p: *const bf16) -> Self::V;
    /// Stores eight f32.
    ///
    /// # Safety
    /// `p` must be valid for writing eight f32; any alignment.
    unsafe fn store_at(self, p: *mut f32, v: Self::V);
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
    /// a where x ≥ limit, elsewhere (and where x is NaN) 0.
    fn keep_from(self, a: Self::V, x: Self::V, limit: Self::V) -> Self::V;
    /// a · 2ⁿ, where the low nine bits of `n` hold the integer n in two's complement; a and the result are normal.
    fn scale_by_power(self, a: Self::V, n: Self::V) -> Self::V;
    /// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇)) of four vectors.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Loads eight f32.
    #[inline(always)]
    fn load(self, from: &Vector) -> Self::V {
        // SAFETY: eight f32.
        unsafe { self.load_at(from.as_ptr()) }
    }

    /// Stores eight f32.
    #[inline(always)]
    fn store(self, to: &mut Vector, v: Self::V) {
        // SAFETY: eight f32.
        unsafe { self.store_at(to.as_mut_ptr(), v) }
    }

    /// The lanes, in order.
    #[inline(always)]
    fn lanes(self, v: Self::V) -> Vector {
        let mut lanes = [0.0; LANES];
        self.store(&mut lanes, v);
        lanes
    }

    /// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇))
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let v = self.lanes(v);
        ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
    }

    /// ((v₀ + v₄) + (v₂ + v₆)) + ((v₁ + v₅) + (v₃ + v₇)) in f64.
    #[inline(always)]
    fn sum_f64(self, v: Self::V) -> f64 {
        let v = self.lanes(v).map(f64::from);
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    /// The smallest lane; a NaN lane counts as ∞.
    #[inline(always)]
    fn smallest(self, v: Self::V) -> f32 {
        self.lanes(v).into_iter().fold(f32::INFINITY, f32::min)
    }

    /// The largest lane; a NaN lane counts as −∞.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        self.lanes(v).into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// A number as a tensor stores it.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Loads eight as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading eight elements; any alignment.
    unsafe fn load_at<S: Simd>(simd: S, p: *const Self) -> S::V;

    /// One as f32.
    fn get(self) -> f32;

    /// Up to eight as f32; the lanes past the end are 0.
    #[inline(always)]
    fn load_padded<S: Simd>(simd: S, elements: &[Self]) -> S::V {
        if elements.len() >= LANES {
            // SAFETY: eight elements.
            return unsafe { Self::load_at(simd, elements.as_ptr()) };
        }
        let mut lanes = [0.0; LANES];
        for (lane, &element) in lanes.iter_mut().zip(elements) {
            *lane = element.get();
        }
        simd.load(&lanes)
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load_at<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_at(p) }
    }

    #[inline(always)]
    fn get(self) -> f32 {
        self
    }
}

impl Element for f16 {
    #[inline(always)]
    unsafe fn load_at<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_f16_at(p) }
    }

    #[inline(always)]
    fn get(self) -> f32 {
        f32_from_f16(self)
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load_at<S: Simd>(simd: S, p: *const Self) -> S::V {
        // SAFETY: the caller's.
        unsafe { simd.load_bf16_at(p) }
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

    /// Computes. Implementations are `#[inline(always)]`, as is everything that they call with vectors: only what
    /// ends up inside [`Isa::run`] is compiled for its instructions.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// The instruction set, chosen once when a backend is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    /// What the target guarantees.
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
}

impl Isa {
    /// The best one that this machine has.
    pub(crate) fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(token) = Avx2::detect() {
            return Self::Avx2(token);
        }
        Self::Portable
    }

    /// Every one that this machine has.
    #[cfg(test)]
    pub(crate) fn every() -> Vec<Self> {
        let mut every = vec![Self::Portable];
        every.extend(Some(Self::detect()).filter(|&isa| isa != Self::Portable));
        every
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
