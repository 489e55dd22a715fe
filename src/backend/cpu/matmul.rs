//! y = x Wᵀ, from one row to a long prompt, with the same bits.
//!
//! Every output is one accumulator of a register's lanes that runs over k in steps of as many, then one sum of its lanes:
//! neither the number of rows, nor the tile an output falls into, nor the thread changes its rounding. Weights are
//! row-major as stored, `(out, in)`, so both operands are contiguous in k.

use half::{bf16, f16};

use super::packed::{BLOCK_ROWS, Pack};
use super::simd::{Element, Isa, Kernel, Simd, padded};

/// Activation rows of a tile.
const TILE_ROWS: usize = 3;

/// Weight rows of a tile of several activation rows: with three twelve accumulators, three registers of x and one of w
/// fill sixteen registers, and seven loads feed twelve multiplications.
const TILE_COLS: usize = 4;

/// As [`TILE_ROWS`], where there are 32 registers: a 16-bit weight is converted for six products.
const TALL_TILE_ROWS: usize = 6;

/// How far ahead weights are asked for where they come from memory, in bytes, unless a tile is longer.
pub(crate) const AHEAD: usize = 8 << 10;

/// Bytes that memory delivers together.
pub(crate) const CACHE_LINE: usize = 64;

/// y\[r\]\[c\] = Σ_k x\[r\]\[k\] · w\[c\]\[k\]
pub(crate) struct MatMul<'a, E> {
    /// `(rows, k)`, rows `x_stride` apart, each followed by zeros up to whole vectors.
    pub(crate) x: &'a [f32],
    /// At least `k` rounded up to whole vectors.
    pub(crate) x_stride: usize,
    /// At most [`BLOCK_ROWS`].
    pub(crate) rows: usize,
    /// `(cols, k)`, rows `w_stride` apart.
    pub(crate) w: &'a [E],
    /// At least `k`.
    pub(crate) w_stride: usize,
    /// The terms of each sum.
    pub(crate) k: usize,
    /// Outputs of a row.
    pub(crate) cols: usize,
    /// `(rows, cols)`, rows `y_stride` apart.
    pub(crate) y: &'a mut [f32],
    /// At least `cols`.
    pub(crate) y_stride: usize,
}

impl<E: Element> Kernel for MatMul<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        if self.rows == 0 || self.cols == 0 {
            return;
        }
        // What the unchecked loads and stores below rest on.
        assert!(self.rows <= BLOCK_ROWS && padded(self.k) <= self.x_stride);
        assert!(self.k <= self.w_stride && self.cols <= self.y_stride);
        assert!((self.rows - 1) * self.x_stride + padded(self.k) <= self.x.len());
        assert!((self.cols - 1) * self.w_stride + self.k <= self.w.len());
        assert!((self.rows - 1) * self.y_stride + self.cols <= self.y.len());
        let mut this = self;
        match (this.rows, size_of::<E>()) {
            (1, 4) => this.tiles::<S, 1>(simd),
            (1, _) => this.tiles::<S, 2>(simd),
            _ => this.tiles::<S, TILE_COLS>(simd),
        }
    }
}

impl<E: Element> MatMul<'_, E> {
    /// All outputs, in tiles of `N` columns.
    ///
    /// One activation row has its weights from memory, and memory is read fastest in the order of its addresses: a tile
    /// is one row of f32, whose sum depends on itself from step to step only as fast as memory gives. Twice as many
    /// 16-bit weights come in the same time, and two rows a tile hide that.
    #[inline(always)]
    fn tiles<S: Simd, const N: usize>(&mut self, simd: S) {
        let mut col = 0;
        while col < self.cols {
            col += match self.cols - col {
                left if left >= N => self.columns::<S, N>(simd, col),
                _ => self.columns::<S, 1>(simd, col),
            };
        }
    }

    /// All rows of `N` columns from `col` on; returns `N`.
    #[inline(always)]
    fn columns<S: Simd, const N: usize>(&mut self, simd: S, col: usize) -> usize {
        // The first tile reads its weights from memory, later ones from a cache.
        let mut row = self.rows_from::<S, N, true>(simd, 0, col);
        while row < self.rows {
            row += self.rows_from::<S, N, false>(simd, row, col);
        }
        N
    }

    /// The highest tile of `N` columns that rows from `row` on fill; returns its rows.
    #[inline(always)]
    fn rows_from<S: Simd, const N: usize, const STREAM: bool>(
        &mut self,
        simd: S,
        row: usize,
        col: usize,
    ) -> usize {
        match self.rows - row {
            1 => self.tile::<S, 1, N, STREAM>(simd, row, col),
            2 => self.tile::<S, 2, N, STREAM>(simd, row, col),
            4 if S::MANY_REGISTERS => self.tile::<S, 4, N, STREAM>(simd, row, col),
            5 if S::MANY_REGISTERS => self.tile::<S, 5, N, STREAM>(simd, row, col),
            TALL_TILE_ROWS.. if S::MANY_REGISTERS => {
                self.tile::<S, TALL_TILE_ROWS, N, STREAM>(simd, row, col)
            }
            _ => self.tile::<S, TILE_ROWS, N, STREAM>(simd, row, col),
        }
    }

    /// A tile of `M` rows and `N` columns; returns `M`.
    ///
    /// With `STREAM`, the weights of a later tile are asked for in the order they lie in memory: a tile reads
    /// short rows, several at once, which the hardware doesn't see coming.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize, const STREAM: bool>(
        &mut self,
        simd: S,
        row: usize,
        col: usize,
    ) -> usize {
        let mut acc = [[simd.zero(); N]; M];
        // SAFETY: `run` asserted that `x` holds `rows` rows of whole vectors and `w` `cols` rows of k; row + M is
        // at most `rows` and col + N at most `cols`.
        let (x, w) =
            unsafe { (self.x.as_ptr().add(row * self.x_stride), self.w.as_ptr().add(col * self.w_stride)) };
        let ahead = AHEAD.max(N * self.w_stride * size_of::<E>());
        let mut k = 0;
        while k + S::LANES <= self.k {
            if STREAM {
                let next = w.wrapping_add(N * k).cast::<u8>().wrapping_add(ahead);
                for line in (0..N * S::LANES * size_of::<E>()).step_by(CACHE_LINE) {
                    simd.prefetch(next.wrapping_add(line));
                }
            }
            let mut xs = [simd.zero(); M];
            for (i, x_row) in xs.iter_mut().enumerate() {
                // SAFETY: as above; k + S::LANES is at most `self.k`.
                *x_row = unsafe { simd.load_at(x.add(i * self.x_stride + k)) };
            }
            for j in 0..N {
                // SAFETY: as above.
                let w_row = unsafe { E::load_at(simd, w.add(j * self.w_stride + k)) };
                for (acc, &x_row) in acc.iter_mut().zip(&xs) {
                    acc[j] = simd.fma(x_row, w_row, acc[j]);
                }
            }
            k += S::LANES;
        }
        if k < self.k {
            for j in 0..N {
                let start = (col + j) * self.w_stride;
                let w_row = E::load_padded(simd, &self.w[start + k..start + self.k]);
                for (i, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: as above; `x` has zeros up to whole vectors.
                    let x_row = unsafe { simd.load_at(x.add(i * self.x_stride + k)) };
                    acc[j] = simd.fma(x_row, w_row, acc[j]);
                }
            }
        }
        self.finish(simd, &acc, row, col);
        M
    }

    /// Sums the lanes of a tile and stores it.
    #[inline(always)]
    fn finish<S: Simd, const N: usize>(&mut self, simd: S, acc: &[[S::V; N]], row: usize, col: usize) {
        for (i, acc) in acc.iter().enumerate() {
            let start = (row + i) * self.y_stride + col;
            let (fours, rest) = self.y[start..start + N].as_chunks_mut();
            let (acc_fours, acc_rest) = acc.as_chunks();
            for (y, &acc) in fours.iter_mut().zip(acc_fours) {
                *y = simd.sum4(acc);
            }
            for (y, &acc) in rest.iter_mut().zip(acc_rest) {
                *y = simd.sum(acc);
            }
        }
    }
}

/// A row as f32.
struct Convert<'a, E> {
    from: &'a [E],
    /// As many.
    to: &'a mut [f32],
}

impl<E: Element> Kernel for Convert<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        for (to, &from) in self.to.iter_mut().zip(self.from) {
            *to = from.get();
        }
    }
}

/// The numbers of a tensor or of a part of it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Numbers<'a> {
    /// f32.
    F32(&'a [f32]),
    /// f16.
    F16(&'a [f16]),
    /// bf16.
    Bf16(&'a [bf16]),
}

impl<'a> Numbers<'a> {
    /// The numbers of `tensor`.
    pub(crate) fn of(tensor: &'a crate::weights::Tensor) -> Self {
        match tensor.data() {
            crate::weights::TensorData::F32(x) => Self::F32(x),
            crate::weights::TensorData::F16(x) => Self::F16(x),
            crate::weights::TensorData::Bf16(x) => Self::Bf16(x),
        }
    }

    /// A part.
    pub(crate) fn part(self, range: std::ops::Range<usize>) -> Self {
        match self {
            Self::F32(x) => Self::F32(&x[range]),
            Self::F16(x) => Self::F16(&x[range]),
            Self::Bf16(x) => Self::Bf16(&x[range]),
        }
    }

    /// The numbers as f32, into as many.
    pub(crate) fn convert(self, isa: Isa, to: &mut [f32]) {
        match self {
            Self::F32(from) => isa.run(Convert { from, to }),
            Self::F16(from) => isa.run(Convert { from, to }),
            Self::Bf16(from) => isa.run(Convert { from, to }),
        }
    }

    /// Packs rows of `k` numbers, contiguous, into [`packed_len`](super::packed::packed_len) floats.
    pub(crate) fn pack(self, isa: Isa, rows: usize, k: usize, to: &mut [f32]) {
        match self {
            Self::F32(from) => isa.run(Pack { from, stride: k, rows, k, to }),
            Self::F16(from) => isa.run(Pack { from, stride: k, rows, k, to }),
            Self::Bf16(from) => isa.run(Pack { from, stride: k, rows, k, to }),
        }
    }

    /// One number as f32.
    pub(crate) fn get(self, index: usize) -> f32 {
        match self {
            Self::F32(x) => x[index],
            Self::F16(x) => x[index].get(),
            Self::Bf16(x) => x[index].get(),
        }
    }
}
