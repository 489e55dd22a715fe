//! What is done to one row at a time: RMSNorm, rotation, SiLU.

use super::simd::{Element, Kernel, Simd, exp};

/// RMSNorm: y = w · x / √(mean(x²) + ε).
pub(crate) struct RmsNorm<'a, E> {
    /// A row, followed by zeros up to whole vectors.
    pub(crate) x: &'a [f32],
    /// As many weights as the row has numbers.
    pub(crate) weight: &'a [E],
    /// ε.
    pub(crate) eps: f32,
    /// A row with room for whole vectors; zeros are stored past its end.
    pub(crate) y: &'a mut [f32],
}

impl<E: Element> Kernel for RmsNorm<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let mut squares = simd.zero();
        let xs = S::parts(self.x.as_chunks().0);
        for x in xs {
            let x = simd.load(x);
            squares = simd.fma(x, x, squares);
        }
        let mean = simd.sum(squares) / self.weight.len() as f32;
        let scale = simd.splat(1.0 / (mean + self.eps).sqrt());
        let rows = xs.iter().zip(S::parts_mut(self.y.as_chunks_mut().0));
        for ((x, y), weight) in rows.zip(self.weight.chunks(S::LANES)) {
            simd.store(y, simd.mul(E::load_padded(simd, weight), simd.mul(simd.load(x), scale)));
        }
    }
}

/// gate ← silu(gate) · up, with silu(x) = x / (1 + e⁻ˣ).
pub(crate) struct SiluMul<'a> {
    /// Whole vectors.
    pub(crate) gate: &'a mut [f32],
    /// As many.
    pub(crate) up: &'a [f32],
}

impl Kernel for SiluMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let (gate, up) = (S::parts_mut(self.gate.as_chunks_mut().0), S::parts(self.up.as_chunks().0));
        for (gate, up) in gate.iter_mut().zip(up) {
            let x = simd.load(gate);
            let denominator = simd.add(simd.splat(1.0), exp(simd, simd.sub(simd.zero(), x)));
            let silu = simd.div(x, denominator);
            simd.store(gate, simd.mul(silu, simd.load(up)));
        }
    }
}

/// y ← y + x, of any length.
pub(crate) struct Add<'a> {
    /// y
    pub(crate) y: &'a mut [f32],
    /// At least as many numbers.
    pub(crate) x: &'a [f32],
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        self.y.iter_mut().zip(self.x).for_each(|(y, x)| *y += x);
    }
}

/// y ← y + scale · x
pub(crate) struct AddScaled<'a> {
    /// Whole vectors.
    pub(crate) y: &'a mut [f32],
    /// As many.
    pub(crate) x: &'a [f32],
    /// The factor.
    pub(crate) scale: f32,
}

impl Kernel for AddScaled<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let scale = simd.splat(self.scale);
        let (y, x) = (S::parts_mut(self.y.as_chunks_mut().0), S::parts(self.x.as_chunks().0));
        for (y, x) in y.iter_mut().zip(x) {
            simd.store(y, simd.fma(scale, simd.load(x), simd.load(y)));
        }
    }
}

/// Rotates a head: dimension i and i + head_dim/2 are a pair that turns by the angle of frequency i.
///
/// `to` gets the rotated numbers times `scale`.
pub(crate) fn rotate(from: &[f32], cos: &[f32], sin: &[f32], scale: f32, to: &mut [f32]) {
    let (left, right) = from.split_at(cos.len());
    let (to_left, to_right) = to.split_at_mut(cos.len());
    for i in 0..cos.len() {
        to_left[i] = (left[i] * cos[i] - right[i] * sin[i]) * scale;
        to_right[i] = (right[i] * cos[i] + left[i] * sin[i]) * scale;
    }
}
