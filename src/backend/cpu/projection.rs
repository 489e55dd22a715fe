//! A region of projections: the products of one stage, for all models that run together, cut into tasks.
//!
//! A task is a few weight rows times all activation rows that use them. Bias, low-rank update, residual and SiLU
//! are applied before the result leaves the cache.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::matmul::{BLOCK_ROWS, MatMul, Numbers, convert_rows};
use super::matrix::{Aligned, Matrix, Shared, stride};
use super::pool::Pool;
use super::rowwise::{AddScaled, SiluMul};
use super::simd::{Isa, LANES, padded};
use crate::adapter::{LoraDelta, Projection};
use crate::model::MAX_EXPERTS;
use crate::weights::{Linear, Tensor};

/// Models that run together: the small one and the experts.
pub(crate) const MAX_GROUP: usize = MAX_EXPERTS + 1;

/// Products of one region: q, k and v of every model.
pub(crate) const MAX_PRODUCTS: usize = 3 * MAX_GROUP;

/// Floats of copied weights that stay in an L2 of 512 KiB while blocks of activations pass.
const PANEL_FLOATS: usize = 40 << 10;

/// Floats of a task's results before they are stored.
const TILE_FLOATS: usize = 4096;

/// Tasks a thread gets of a region, so that the last ones end together.
const TASKS_PER_THREAD: usize = 16;

/// The least and the most weight rows of a task. Sixteen rows of 16-bit weights are some 20 KiB: a few
/// microseconds of memory bandwidth, many times what it costs to claim them.
const TASK_COLS: Range<usize> = 16..512;

/// What becomes of x Wᵀ + b.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Epilogue {
    /// It is stored.
    Store,
    /// It is added to what is there: the residual.
    Add,
    /// silu(x Wᵀ) · (x W₂ᵀ) is stored.
    SiluMul,
}

/// A weight matrix with its bias.
#[derive(Clone, Copy)]
pub(crate) struct Weight<'a> {
    /// `(out, in)`.
    pub(crate) weight: &'a Tensor,
    /// `(out,)`.
    pub(crate) bias: Option<&'a Tensor>,
    /// Which low-rank updates belong to it.
    pub(crate) projection: Option<Projection>,
}

impl<'a> Weight<'a> {
    /// The weights of a layer's projection.
    pub(crate) fn of(linear: &'a Linear, projection: Projection) -> Self {
        Self { weight: &linear.weight, bias: linear.bias.as_ref(), projection: Some(projection) }
    }

    /// A matrix alone.
    pub(crate) fn bare(weight: &'a Tensor) -> Self {
        Self { weight, bias: None, projection: None }
    }
}

/// One weight matrix, or the pair of gate and up, for the rows that use it.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// W.
    pub(crate) first: Weight<'a>,
    /// W₂, for [`Epilogue::SiluMul`].
    pub(crate) second: Option<Weight<'a>>,
    /// Activation rows.
    pub(crate) rows: (usize, usize),
    /// Weight rows, from the first on.
    pub(crate) cols: usize,
    /// Where in an output row they go.
    pub(crate) column: usize,
}

/// The low-rank update of one projection for the rows of one model.
#[derive(Clone, Copy)]
pub(crate) struct Delta<'a> {
    /// Which projection.
    pub(crate) projection: Projection,
    /// Activation rows.
    pub(crate) rows: (usize, usize),
    /// A, B and the scale.
    pub(crate) delta: &'a LoraDelta,
    /// Where in a row of `low_rank` A x lies.
    pub(crate) column: usize,
}

/// All deltas of one region.
pub(crate) type Deltas<'a> = ArrayVec<Delta<'a>, MAX_PRODUCTS>;

/// The products of one stage.
pub(crate) struct Region<'a> {
    /// The instruction set.
    pub(crate) isa: Isa,
    /// Activations.
    pub(crate) x: &'a Matrix,
    /// What is computed.
    pub(crate) products: &'a [Product<'a>],
    /// Low-rank updates.
    pub(crate) deltas: &'a [Delta<'a>],
    /// A x of the low-rank updates, in the same rows as `x`.
    pub(crate) low_rank: &'a Matrix,
    /// What becomes of the results.
    pub(crate) epilogue: Epilogue,
    /// Where they go.
    pub(crate) out: Shared<'a>,
    /// The distance between output rows.
    pub(crate) out_stride: usize,
    /// The output row of each activation row, where they differ.
    pub(crate) out_rows: Option<&'a [usize]>,
}

/// What a thread needs to run a task.
pub(crate) struct TileScratch {
    /// Converted weight rows, of the first and of the second matrix.
    panels: [Aligned; 2],
    /// Results of the first matrix, of the second, and of a low-rank update.
    tiles: [Aligned; 3],
}

impl TileScratch {
    /// For sums of up to `k` terms.
    pub(crate) fn new(k: usize) -> Self {
        let panel = PANEL_FLOATS.max(8 * stride(k));
        Self {
            panels: std::array::from_fn(|_| Aligned::zeros(panel)),
            tiles: std::array::from_fn(|_| Aligned::zeros(TILE_FLOATS)),
        }
    }
}

/// How a product is cut.
#[derive(Clone, Copy)]
struct Cut {
    cols: usize,
    rows: usize,
    tasks: usize,
}

impl Region<'_> {
    /// Computes all products.
    pub(crate) fn run(&self, pool: &mut Pool, scratch: &[std::sync::Mutex<super::Scratch>]) {
        let wanted = TASKS_PER_THREAD * pool.threads();
        let all_cols: usize = self.products.iter().map(|product| product.cols).sum();
        let cuts: ArrayVec<Cut, MAX_PRODUCTS> =
            self.products.iter().map(|product| self.cut(product, all_cols, wanted)).collect();
        let tasks = cuts.iter().map(|cut| cut.tasks).sum();
        pool.run(tasks, |thread, mut index| {
            for (product, cut) in self.products.iter().zip(&cuts) {
                if index < cut.tasks {
                    let mut scratch = super::lock(&scratch[thread]);
                    return self.task(&mut scratch.tile, product, cut, index);
                }
                index -= cut.tasks;
            }
        });
    }

    /// Cuts a product so that the region has about `wanted` tasks, and each fits the scratch memory.
    fn cut(&self, product: &Product<'_>, all_cols: usize, wanted: usize) -> Cut {
        let rows = product.rows.1 - product.rows.0;
        let k = self.k(product);
        let mut cols = all_cols.div_ceil(wanted).next_multiple_of(8).clamp(TASK_COLS.start, TASK_COLS.end);
        let mut most_rows = rows;
        cols = cols.min(TILE_FLOATS / rows.clamp(1, BLOCK_ROWS) / LANES * LANES);
        if rows >= convert_rows(self.isa) {
            let matrices = 1 + usize::from(product.second.is_some());
            let fit = PANEL_FLOATS / matrices / stride(k);
            cols = cols.min((fit - fit % 8).max(8));
            // Few columns and many threads: cut the rows, too, but never below what pays for a conversion.
            let columns = product.cols.div_ceil(cols);
            most_rows = rows.div_ceil((wanted / 2).div_ceil(columns)).next_multiple_of(BLOCK_ROWS);
        }
        Cut { cols, rows: most_rows, tasks: product.cols.div_ceil(cols) * rows.div_ceil(most_rows.max(1)) }
    }

    /// The terms of a product's sums.
    fn k(&self, product: &Product<'_>) -> usize {
        product.first.weight.shape().last().copied().unwrap_or(1)
    }

    /// Computes part `index` of `product`.
    fn task(&self, scratch: &mut TileScratch, product: &Product<'_>, cut: &Cut, index: usize) {
        let columns = product.cols.div_ceil(cut.cols);
        let col = index % columns * cut.cols;
        let cols = cut.cols.min(product.cols - col);
        let first_row = product.rows.0 + index / columns * cut.rows;
        let last_row = product.rows.1.min(first_row + cut.rows);
        let k = self.k(product);
        let TileScratch { panels: [panel, panel2], tiles: [tile, tile2, low] } = scratch;
        let convert = last_row - first_row >= convert_rows(self.isa);
        let first = Panel::new(self.isa, product.first.weight, k, col..col + cols, convert, panel);
        let second =
            product.second.map(|w| (w, Panel::new(self.isa, w.weight, k, col..col + cols, convert, panel2)));
        let mut row = first_row;
        while row < last_row {
            let end = last_row.min(row + BLOCK_ROWS);
            self.block(&first, &product.first, row..end, col, cols, tile, low);
            if let Some((weight, second)) = &second {
                self.block(second, weight, row..end, col, cols, tile2, low);
            }
            self.store(row..end, product.column + col, cols, tile, tile2);
            row = end;
        }
    }

    /// x Wᵀ + b and the low-rank updates, into `tile`.
    #[allow(clippy::too_many_arguments, reason = "a rectangle, its operands and its scratch")]
    fn block(
        &self,
        panel: &Panel<'_>,
        weight: &Weight<'_>,
        rows: Range<usize>,
        col: usize,
        cols: usize,
        tile: &mut [f32],
        low: &mut [f32],
    ) {
        let stride = padded(cols);
        panel.multiply(self.isa, self.x, 0, rows.clone(), cols, tile);
        if let Some(bias) = weight.bias.map(Numbers::of) {
            for y in tile.chunks_mut(stride).take(rows.len()) {
                for (i, y) in y[..cols].iter_mut().enumerate() {
                    *y += bias.get(col + i);
                }
            }
        }
        let Some(projection) = weight.projection else { return };
        for delta in self.deltas.iter().filter(|delta| delta.projection == projection) {
            let updated = rows.start.max(delta.rows.0)..rows.end.min(delta.rows.1);
            if updated.is_empty() {
                continue;
            }
            let r = delta.delta.b.shape().last().copied().unwrap_or(1);
            let panel = Panel::stored(&delta.delta.b, r, col..col + cols);
            panel.multiply(self.isa, self.low_rank, delta.column, updated.clone(), cols, low);
            let start = (updated.start - rows.start) * stride;
            let len = updated.len() * stride;
            self.isa.run(AddScaled {
                y: &mut tile[start..start + len],
                x: &low[..len],
                scale: delta.delta.scale,
            });
        }
    }

    /// Applies the epilogue and stores a block.
    fn store(&self, rows: Range<usize>, column: usize, cols: usize, tile: &mut [f32], tile2: &[f32]) {
        let stride = padded(cols);
        for (i, row) in rows.enumerate() {
            let out_row = self.out_rows.map_or(row, |map| map[row]);
            // SAFETY: tasks are disjoint rectangles of rows and columns, and `out_rows` has no row twice.
            let out = unsafe { self.out.part(out_row * self.out_stride + column, cols) };
            let y = &mut tile[i * stride..(i + 1) * stride];
            match self.epilogue {
                Epilogue::Store => out.copy_from_slice(&y[..cols]),
                Epilogue::Add => out.iter_mut().zip(&*y).for_each(|(out, y)| *out += y),
                Epilogue::SiluMul => {
                    self.isa.run(SiluMul { gate: &mut *y, up: &tile2[i * stride..(i + 1) * stride] });
                    out.copy_from_slice(&y[..cols]);
                }
            }
        }
    }
}

/// Weight rows as a task reads them.
struct Panel<'a> {
    w: Numbers<'a>,
    stride: usize,
    k: usize,
}

impl<'a> Panel<'a> {
    /// Rows of `weight` as stored.
    fn stored(weight: &'a Tensor, k: usize, rows: Range<usize>) -> Self {
        Self { w: Numbers::of(weight).part(rows.start * k..rows.end * k), stride: k, k }
    }

    /// Rows of `weight`, copied as f32 into `scratch` where `convert` says that it pays: 16-bit weights are converted
    /// once, and rows lie where they don't meet in a cache.
    fn new(
        isa: Isa,
        weight: &'a Tensor,
        k: usize,
        rows: Range<usize>,
        convert: bool,
        scratch: &'a mut [f32],
    ) -> Self {
        let count = rows.len();
        let stored = Self::stored(weight, k, rows);
        if !convert {
            return stored;
        }
        let stride = stride(k);
        let panel = &mut scratch[..count * stride];
        stored.w.convert(isa, k, panel, stride);
        Self { w: Numbers::F32(panel), stride, k }
    }

    /// The products of `rows` of `x`, whose terms start at `column`, with `cols` weight rows.
    fn multiply(&self, isa: Isa, x: &Matrix, column: usize, rows: Range<usize>, cols: usize, y: &mut [f32]) {
        let (x_stride, count, y_stride) = (x.stride(), rows.len(), padded(cols));
        let x = &x.data()[rows.start * x_stride + column..];
        let (k, w_stride, rows) = (self.k, self.stride, count);
        match self.w {
            Numbers::F32(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
            Numbers::F16(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
            Numbers::Bf16(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
        }
    }
}
