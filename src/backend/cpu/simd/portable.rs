//! What the target guarantees.

use half::{bf16, f16};

use super::{Element, LANES, Simd};

/// Plain arrays, which the compiler turns into whatever vectors the target has.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

/// Eight f32, aligned like a vector.
#[derive(Clone, Copy)]
#[repr(align(32))]
pub(crate) struct Lanes([f32; 8]);

/// One operation on each lane.
#[inline(always)]
fn map2(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    Lanes(std::array::from_fn(|i| f(a.0[i], b.0[i])))
}

impl Simd for Portable {
    const LANES: usize = 8;
    const MANY_REGISTERS: bool = false;
    type V = Lanes;
    type Part = [f32; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        Lanes([x; 8])
    }

    #[inline(always)]
    unsafe fn load_at(self, p: *const f32) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_f16_at(self, p: *const f16) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[f16; 8]>().read_unaligned() }.map(Element::get))
    }

    #[inline(always)]
    unsafe fn load_bf16_at(self, p: *const bf16) -> Lanes {
        // SAFETY: the caller's.
        Lanes(unsafe { p.cast::<[bf16; 8]>().read_unaligned() }.map(Element::get))
    }

    #[inline(always)]
    unsafe fn store_at(self, p: *mut f32, v: Lanes) {
        // SAFETY: the caller's.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(v.0) }
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
    fn keep_from(self, a: Lanes, x: Lanes, limit: Lanes) -> Lanes {
        Lanes(std::array::from_fn(|i| if x.0[i] >= limit.0[i] { a.0[i] } else { 0.0 }))
    }

    #[inline(always)]
    fn scale_by_power(self, a: Lanes, n: Lanes) -> Lanes {
        map2(a, n, |a, n| f32::from_bits(a.to_bits().wrapping_add(n.to_bits() << 23)))
    }

    #[inline(always)]
    fn fold(self, v: Lanes) -> [f32; 8] {
        v.0
    }

    #[inline(always)]
    fn transpose(self, square: [Lanes; LANES]) -> [Lanes; LANES] {
        std::array::from_fn(|i| Lanes(std::array::from_fn(|j| square[j].0[i % 8])))
    }

    #[inline(always)]
    fn sum4(self, v: [Lanes; 4]) -> [f32; 4] {
        v.map(|v| self.sum(v))
    }
}
