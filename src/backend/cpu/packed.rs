//! y = x Wᵀ for many rows: both operands packed, so that no register's lanes are ever summed.
//!
//! A register holds neighbouring outputs of one row. [`MatMul`](super::matmul::MatMul) defines the bits: an output is
//! the sum, in a fixed order, of what the lanes of an accumulator gathered, each over the k that fall to it. So the
//! product is computed one such lane at a time, in the order in which lanes meet: its accumulators are added to those
//! that wait for them, and wait themselves for the next. A lane's share of the weights is small enough for a cache
//! whatever k is, and all rows use it before the next lane's turn.
//!
//! Packed rows lie in groups of `S::LANES`: for each turn of a lane, for each step of k, one register with a number of
//! each row. The group that starts at row r starts at number r · [`padded`]`(k)`.

use super::matmul::CACHE_LINE;
use super::simd::{Element, Kernel, LANES, Simd, padded};

/// The most activation rows of one [`PackedMatMul`].
pub(crate) const BLOCK_ROWS: usize = 48;

/// Outputs that tiles of every instruction set divide.
pub(crate) const PANEL_COLS: usize = 48;

/// Activation rows and registers of outputs of a tile where there are 32 registers: beside 24 accumulators there are
/// three registers of w and one of x, and eleven loads feed 24 multiplications.
const WIDE_TILE: (usize, usize) = (8, 3);

/// As [`WIDE_TILE`], where there are 16: beside twelve accumulators there are two registers of x and one of w, and eight
/// loads feed twelve multiplications.
const TILE: (usize, usize) = (2, 6);

/// The lanes whose sums wait at once: one for each level of the tree above sixteen lanes.
const LEVELS: usize = LANES.ilog2() as usize;

/// Floats that [`PackedMatMul`] needs to work with.
pub(crate) const WAITING: usize = LEVELS * BLOCK_ROWS * PANEL_COLS;

/// Floats of `rows` packed rows of `k` numbers.
pub(crate) fn packed_len(rows: usize, k: usize) -> usize {
    padded(rows) * padded(k)
}

/// The lane that comes `turn`-th when lanes are visited in the order in which [`Simd::sum`] adds them up: its sums are
/// those of a complete binary tree whose leaves these are.
fn lane_of<S: Simd>(turn: usize) -> usize {
    let folded = S::LANES / 8;
    turn % folded * 8 + turn / folded
}

/// Packs rows as f32; what is missing of whole registers becomes 0.
pub(crate) struct Pack<'a, E> {
    /// `(rows, k)`, rows `stride` apart.
    pub(crate) from: &'a [E],
    /// At least `k`.
    pub(crate) stride: usize,
    /// Rows.
    pub(crate) rows: usize,
    /// Numbers of a row.
    pub(crate) k: usize,
    /// At least [`packed_len`] floats.
    pub(crate) to: &'a mut [f32],
}

impl<E: Element> Kernel for Pack<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        let turn_len = padded(self.k);
        let groups = self.to.chunks_exact_mut(S::LANES * turn_len);
        for (first, to) in (0..self.rows).step_by(S::LANES).zip(groups) {
            let rows = S::LANES.min(self.rows - first);
            let next = self.from.as_ptr().wrapping_add((first + S::LANES) * self.stride);
            for k in (0..turn_len).step_by(S::LANES) {
                let later = next.wrapping_add(S::LANES * k).cast::<u8>();
                for line in (0..S::LANES * S::LANES * size_of::<E>()).step_by(CACHE_LINE) {
                    simd.prefetch(later.wrapping_add(line));
                }
                let mut square = [simd.zero(); LANES];
                for (i, row) in square.iter_mut().enumerate().take(rows) {
                    let start = (first + i) * self.stride;
                    let row_of = &self.from[start + k.min(self.k)..start + self.k];
                    *row = E::load_padded(simd, row_of);
                }
                let square = simd.transpose(square);
                for turn in 0..S::LANES {
                    let start = turn * turn_len + k;
                    let to = &mut to[start..start + S::LANES];
                    // SAFETY: `to` has that many.
                    unsafe { simd.store_at(to.as_mut_ptr(), square[lane_of::<S>(turn)]) };
                }
            }
        }
    }
}

/// y\[r\]\[c\] = Σ_k x\[r\]\[k\] · w\[c\]\[k\], with the bits of [`MatMul`](super::matmul::MatMul).
pub(crate) struct PackedMatMul<'a> {
    /// Packed rows of activations, the first of a group first.
    pub(crate) x: &'a [f32],
    /// At most [`BLOCK_ROWS`].
    pub(crate) rows: usize,
    /// Packed rows of weights.
    pub(crate) w: &'a [f32],
    /// Outputs of a row.
    pub(crate) cols: usize,
    /// The terms of each sum.
    pub(crate) k: usize,
    /// `(rows, padded(cols))`, contiguous; what pads a row means nothing.
    pub(crate) y: &'a mut [f32],
    /// [`WAITING`] floats.
    pub(crate) waiting: &'a mut [f32],
}

impl Kernel for PackedMatMul<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) {
        // What the unchecked loads and stores below rest on.
        assert!(self.rows <= BLOCK_ROWS && self.waiting.len() >= WAITING);
        assert!(
            self.x.len() >= packed_len(self.rows, self.k) && self.w.len() >= packed_len(self.cols, self.k)
        );
        assert!(self.y.len() >= self.rows * padded(self.cols));
        let mut this = self;
        if S::MANY_REGISTERS {
            this.panels::<S, { WIDE_TILE.0 }, { WIDE_TILE.1 }>(simd);
        } else {
            this.panels::<S, { TILE.0 }, { TILE.1 }>(simd);
        }
    }
}

impl PackedMatMul<'_> {
    /// All outputs, in panels of `N` registers.
    #[inline(always)]
    fn panels<S: Simd, const M: usize, const N: usize>(&mut self, simd: S) {
        assert!(S::LANES.is_multiple_of(M) && BLOCK_ROWS.is_multiple_of(M) && N * S::LANES <= PANEL_COLS);
        let mut col = 0;
        while col < self.cols {
            col += match (self.cols - col).div_ceil(S::LANES) {
                left if left >= N => self.panel::<S, M, N>(simd, col),
                left if left >= 2 => self.panel::<S, M, 2>(simd, col),
                _ => self.panel::<S, M, 1>(simd, col),
            };
        }
    }

    /// All rows of the `N` registers of outputs from `col` on; returns how many outputs these are.
    #[inline(always)]
    fn panel<S: Simd, const M: usize, const N: usize>(&mut self, simd: S, col: usize) -> usize {
        for turn in 0..S::LANES {
            for row in (0..self.rows).step_by(M) {
                self.tile::<S, M, N>(simd, turn, row, col);
            }
        }
        N * S::LANES
    }

    /// What one lane adds to a tile of `M` rows and `N` registers.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        turn: usize,
        row: usize,
        col: usize,
    ) {
        let turn_len = padded(self.k);
        let group_len = S::LANES * turn_len;
        // SAFETY: `run` asserted that `x` and `w` hold whole groups of all rows and columns; row + M ends in row's
        // group, since M divides its rows, and there are N groups from `col` on.
        let (x, w) = unsafe {
            (
                self.x.as_ptr().add(row / S::LANES * group_len + turn * turn_len + row % S::LANES),
                self.w.as_ptr().add(col / S::LANES * group_len + turn * turn_len),
            )
        };
        let mut acc = [[simd.zero(); N]; M];
        for k in (0..turn_len).step_by(S::LANES) {
            // SAFETY: as above.
            let (x, w) = unsafe { (x.add(k), w.add(k)) };
            // The fewer registers are loaded first, and held.
            if N <= M {
                let mut ws = [simd.zero(); N];
                for (j, w_group) in ws.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *w_group = unsafe { simd.load_at(w.add(j * group_len)) };
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: as above.
                    let x_row = simd.splat(unsafe { *x.add(i) });
                    for (acc, &w_group) in acc.iter_mut().zip(&ws) {
                        *acc = simd.fma(x_row, w_group, *acc);
                    }
                }
            } else {
                let mut xs = [simd.zero(); M];
                for (i, x_row) in xs.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *x_row = simd.splat(unsafe { *x.add(i) });
                }
                for j in 0..N {
                    // SAFETY: as above.
                    let w_group = unsafe { simd.load_at(w.add(j * group_len)) };
                    for (acc, &x_row) in acc.iter_mut().zip(&xs) {
                        acc[j] = simd.fma(x_row, w_group, acc[j]);
                    }
                }
            }
        }
        // No slice of all of `acc` from here on: one would keep it in memory throughout.
        let levels = turn.trailing_ones() as usize;
        for level in 0..levels {
            let waiting = self.waiting::<S, M, N>(level, row).as_ptr();
            for (i, acc) in acc.iter_mut().enumerate() {
                for (j, acc) in acc.iter_mut().enumerate() {
                    // SAFETY: `waiting` has M · N registers.
                    let earlier = unsafe { simd.load_at(waiting.add((i * N + j) * S::LANES)) };
                    *acc = simd.add(earlier, *acc);
                }
            }
        }
        if turn + 1 == S::LANES {
            return self.store(simd, acc, row, col);
        }
        let waiting = self.waiting::<S, M, N>(levels, row).as_mut_ptr();
        for (i, acc) in acc.into_iter().enumerate() {
            for (j, acc) in acc.into_iter().enumerate() {
                // SAFETY: as above.
                unsafe { simd.store_at(waiting.add((i * N + j) * S::LANES), acc) };
            }
        }
    }

    /// Where the accumulators of the tile at `row` wait at a level of the tree.
    #[inline(always)]
    fn waiting<S: Simd, const M: usize, const N: usize>(&mut self, level: usize, row: usize) -> &mut [f32] {
        let tile = M * N * S::LANES;
        let start = (level * BLOCK_ROWS + row) * N * S::LANES;
        &mut self.waiting[start..start + tile]
    }

    /// Stores the rows of a finished tile that exist.
    #[inline(always)]
    fn store<S: Simd, const M: usize, const N: usize>(
        &mut self,
        simd: S,
        acc: [[S::V; N]; M],
        row: usize,
        col: usize,
    ) {
        let stride = padded(self.cols);
        for (i, acc) in acc.into_iter().enumerate().take(self.rows - row) {
            let start = (row + i) * stride + col;
            let y = &mut self.y[start..start + N * S::LANES];
            for (acc, y) in acc.into_iter().zip(y.chunks_exact_mut(S::LANES)) {
                // SAFETY: a chunk is a register.
                unsafe { simd.store_at(y.as_mut_ptr(), acc) };
            }
        }
    }
}
