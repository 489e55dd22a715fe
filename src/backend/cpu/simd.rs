//! Registers of eight or sixteen f32, and the mathematics that every kernel shares.
//!
//! A kernel is written once, generic over [`Simd`], and compiled for each instruction set; [`Isa::run`] picks one
//! at run time, and is the only place where code compiled for more than the baseline is entered. On one machine sums
//! have one order whatever the size of a tile, so a number never depends on how the work was cut.

/// An intrinsic without pointers.
#[cfg(target_arch = "x86_64")]
macro_rules! intrinsic {
    ($e:expr) => {
        // SAFETY: only a holder of the token gets here, and it exists only where the instructions do.
        unsafe { $e }
    };
}

/// Methods of [`Simd`] that are one intrinsic each.
#[cfg(target_arch = "x86_64")]
macro_rules! lanewise {
    ($v:ty: $($name:ident($($operand:ident),+) = $intrinsic:ident,)+) => {$(
        #[inline(always)]
        fn $name(self, $($operand: $v),+) -> $v {
            intrinsic!($intrinsic($($operand),+))
        }
    )+};
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod exp;
mod portable;
#[cfg(test)]
mod tests;

use bytemuck::Pod;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use portable::Portable;

pub(crate) use exp::{exp, exp_scaled, exp_weight};

/// Numbers of a vector in memory: as many as the widest register holds.
pub(crate) const LANES: usize = 16;

/// A vector in memory: one register, or several.
pub(crate) type Vector = [f32; LANES];

/// `n` rounded up to whole vectors.
pub(crate) const fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// Registers of f32. The value is a token: who holds one may use the instructions. Every operation is lane by lane
/// and IEEE but where it says otherwise.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Lanes of a register; a divisor of [`LANES`](self::LANES), at least eight.
    const LANES: usize;
    /// Whether there are 32 registers, not 16.
    const MANY_REGISTERS: bool;
    /// A register.
    type V: Copy;
    /// A register in memory: `[f32; LANES]`.
    type Part: Pod;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Loads `LANES` f32.
    ///
    /// # Safety
    /// `p` must be valid for reading `LANES` f32; any alignment.
    unsafe fn load_at(self, p: *const f32) -> Self::V;
    /// Loads `LANES` f16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading `LANES` f16; any alignment.
    unsafe fn load_f16_at(self, p: *const f16) -> Self::V;
    /// Loads `LANES` bf16 as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading `LANES` bf16; any alignment.
    unsafe fn load_bf16_at(self, p: *const bf16) -> Self::V;
    /// Stores `LANES` f32.
    ///
    /// # Safety
    /// `p` must be valid for writing `LANES` f32; any alignment.
    unsafe fn store_at(self, p: *mut f32, v: Self::V);
    /// Asks for the cache line of `p`, which may point anywhere, to be read once.
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
    /// Eight lanes; of sixteen, each of the upper half is added to its counterpart in the lower.
    fn fold(self, v: Self::V) -> [f32; 8];
    /// The first `LANES` registers as a square matrix, transposed.
    fn transpose(self, square: [Self::V; LANES]) -> [Self::V; LANES];
    /// [`sum`](Self::sum) of four registers.
    fn sum4(self, v: [Self::V; 4]) -> [f32; 4];

    /// Vectors as what registers hold.
    #[inline(always)]
    fn parts(vectors: &[Vector]) -> &[Self::Part] {
        bytemuck::cast_slice(vectors)
    }

    /// Vectors as what registers hold.
    #[inline(always)]
    fn parts_mut(vectors: &mut [Vector]) -> &mut [Self::Part] {
        bytemuck::cast_slice_mut(vectors)
    }

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }

    /// Loads a register.
    #[inline(always)]
    fn load(self, from: &Self::Part) -> Self::V {
        // SAFETY: a part has `LANES` f32.
        unsafe { self.load_at((&raw const *from).cast()) }
    }

    /// Stores a register.
    #[inline(always)]
    fn store(self, to: &mut Self::Part, v: Self::V) {
        // SAFETY: a part has `LANES` f32.
        unsafe { self.store_at((&raw mut *to).cast(), v) }
    }

    /// The lanes, in order, followed by zeros.
    #[inline(always)]
    fn lanes(self, v: Self::V) -> Vector {
        let mut lanes = [0.0; LANES];
        // SAFETY: a register has no more lanes than a vector.
        unsafe { self.store_at(lanes.as_mut_ptr(), v) }
        lanes
    }

    /// ((v₀ + v₁) + (v₂ + v₃)) + ((v₄ + v₅) + (v₆ + v₇)) of what [`fold`](Self::fold) gives.
    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let v = self.fold(v);
        ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]))
    }

    /// ((v₀ + v₄) + (v₂ + v₆)) + ((v₁ + v₅) + (v₃ + v₇)) in f64, of sixteen lanes with vᵢ₊₈ added to vᵢ before.
    #[inline(always)]
    fn sum_f64(self, v: Self::V) -> f64 {
        let v = self.lanes(v);
        let v: [f64; 8] = std::array::from_fn(|i| f64::from(v[i]) + f64::from(v[i + 8]));
        ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]))
    }

    /// The smallest lane; a NaN lane counts as ∞.
    #[inline(always)]
    fn smallest(self, v: Self::V) -> f32 {
        self.lanes(v)[..Self::LANES].iter().copied().fold(f32::INFINITY, f32::min)
    }

    /// The largest lane; a NaN lane counts as −∞.
    #[inline(always)]
    fn largest(self, v: Self::V) -> f32 {
        self.lanes(v)[..Self::LANES].iter().copied().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// A number as a tensor stores it.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Loads a register of them as f32.
    ///
    /// # Safety
    /// `p` must be valid for reading `S::LANES` elements; any alignment.
    unsafe fn load_at<S: Simd>(simd: S, p: *const Self) -> S::V;

    /// One as f32.
    fn get(self) -> f32;

    /// Up to a register of them as f32; the lanes past the end are 0.
    #[inline(always)]
    fn load_padded<S: Simd>(simd: S, elements: &[Self]) -> S::V {
        if elements.len() >= S::LANES {
            // SAFETY: enough elements.
            return unsafe { Self::load_at(simd, elements.as_ptr()) };
        }
        let mut lanes = [0.0; LANES];
        for (lane, &element) in lanes.iter_mut().zip(elements) {
            *lane = element.get();
        }
        // SAFETY: a register has no more lanes than a vector.
        unsafe { simd.load_at(lanes.as_ptr()) }
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

    /// Computes. Implementations are `#[inline(always)]`, as is everything that they call with registers: only what
    /// ends up inside [`Isa::run`] is compiled for its instructions. Nothing forces a closure inside, so registers are
    /// no closure's business.
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
    /// AVX-512: its foundation, and what all processors with AVX-512 since Skylake add.
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// Those that this machine has, from the plainest to the best.
    pub(crate) fn every() -> impl DoubleEndedIterator<Item = Self> {
        let every = [Some(Self::Portable)];
        #[cfg(target_arch = "x86_64")]
        let every = [every[0], Avx2::detect().map(Self::Avx2), Avx512::detect().map(Self::Avx512)];
        every.into_iter().flatten()
    }

    /// The best one that this machine has.
    pub(crate) fn detect() -> Self {
        Self::every().next_back().unwrap_or(Self::Portable)
    }

    /// The name.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "AVX-512",
        }
    }

    /// Runs `kernel` with these instructions.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => kernel.run(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(token) => token.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(token) => token.run(kernel),
        }
    }
}
