//! Activations: rows of f32, and how the tasks of a region share them.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use bytemuck::{Pod, Zeroable};

use super::simd::{LANES, Vector, padded};

/// f32 from the start of a cache line on: no register lies in two.
#[derive(Debug)]
pub(crate) struct Aligned(Vec<Line>);

/// A cache line.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C, align(64))]
struct Line(Vector);

impl Aligned {
    /// At least `len` zeros, up to whole vectors.
    pub(crate) fn zeros(len: usize) -> Self {
        Self(vec![Line([0.0; LANES]); len.div_ceil(LANES)])
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        bytemuck::cast_slice(&self.0)
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// The distance between rows of `cols` numbers that several rows are read of at once: whole vectors, and an odd number
/// of them, so that rows don't meet in the same sets of a cache.
pub(crate) const fn stride(cols: usize) -> usize {
    padded(cols) | LANES
}

/// Rows of f32, each followed by zeros up to whole vectors: kernels never need a tail in k.
#[derive(Debug)]
pub(crate) struct Matrix {
    data: Aligned,
    cols: usize,
}

impl Matrix {
    /// Zeros, `(rows, cols)`.
    pub(crate) fn new(rows: usize, cols: usize) -> Self {
        Self { data: Aligned::zeros(rows * stride(cols)), cols }
    }

    /// Numbers in a row.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The distance between rows.
    pub(crate) fn stride(&self) -> usize {
        stride(self.cols)
    }

    /// All rows with their padding.
    pub(crate) fn data(&self) -> &[f32] {
        &self.data
    }

    /// All rows with their padding; the padding stays zero.
    pub(crate) fn data_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }

    /// One row without its padding.
    pub(crate) fn row(&self, row: usize) -> &[f32] {
        let start = row * self.stride();
        &self.data[start..start + self.cols]
    }

    /// The matrix for tasks that write disjoint parts of it.
    pub(crate) fn shared(&mut self) -> Shared<'_> {
        Shared::new(&mut self.data)
    }
}

/// Numbers that the tasks of a region write in disjoint parts.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a part is reached only through `part`, whose caller promises that no two overlap.
unsafe impl Sync for Shared<'_> {}
// SAFETY: as above.
unsafe impl Send for Shared<'_> {}

impl<'a> Shared<'a> {
    /// Shares `data`.
    pub(crate) fn new(data: &'a mut [f32]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), borrow: PhantomData }
    }

    /// The part of `len` numbers from `start` on.
    ///
    /// # Safety
    /// No other reference to any of these numbers may be alive while this one is.
    #[allow(clippy::mut_from_ref, reason = "the caller promises that parts are disjoint")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &'a mut [f32] {
        assert!(start <= self.len && len <= self.len - start, "a part lies inside");
        // SAFETY: inside the borrowed slice, and not aliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}
