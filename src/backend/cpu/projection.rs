//! A region of projections: the products of one stage, for all models that run together, cut into tasks.
//!
//! A task is a few weight rows times all activation rows that use them. Bias, low-rank update, residual and SiLU
//! are applied before the result leaves the cache.

use std::ops::Range;

use arrayvec::ArrayVec;

use super::matmul::{MatMul, Numbers};
use super::matrix::{Aligned, Matrix, Shared};
use super::packed::{BLOCK_ROWS, PANEL_COLS, Pack, PackedMatMul, WAITING, packed_len};
use super::pool::Pool;
use super::rowwise::{Add, AddScaled, SiluMul};
use super::simd::{Isa, LANES, padded};
use crate::adapter::{LoraDelta, Projection};
use crate::model::MAX_EXPERTS;
use crate::weights::{Linear, Tensor};

/// Models that run together: the small one and the experts.
pub(crate) const MAX_GROUP: usize = MAX_EXPERTS + 1;

/// Products of one region: q, k and v of every model.
pub(crate) const MAX_PRODUCTS: usize = 3 * MAX_GROUP;

/// The activation rows from which weights and activations are packed first: fewer don't pay for it.
const PACKED_ROWS: usize = 40;

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
    /// Packed weight rows, of the first and of the second matrix.
    panels: [Aligned; 2],
    /// Results of the first matrix, of the second, and of a low-rank update.
    tiles: [Aligned; 3],
    /// What [`PackedMatMul`] needs.
    waiting: Aligned,
}

impl TileScratch {
    /// For sums of up to `k` terms.
    pub(crate) fn new(k: usize) -> Self {
        Self {
            panels: std::array::from_fn(|_| Aligned::zeros(packed_len(PANEL_COLS, k))),
            tiles: std::array::from_fn(|_| Aligned::zeros(TILE_FLOATS)),
            waiting: Aligned::zeros(WAITING),
        }
    }
}

/// How a product is cut.
#[derive(Clone, Copy)]
struct Cut {
    cols: usize,
    rows: usize,
    tasks: usize,
    /// Where its activations lie packed, for products of many rows.
    packed: Option<usize>,
}

/// Activation rows that are packed: those of one product or more.
type Spans = ArrayVec<(usize, usize), MAX_GROUP>;

/// Floats of packed activations, for up to `rows` rows of up to `k` numbers.
pub(crate) fn packed_floats(rows: usize, k: usize) -> usize {
    if rows < PACKED_ROWS { 0 } else { packed_start(MAX_GROUP, rows, k) }
}

/// Where the `index`-th span, whose first row is `row`, lies packed: spans share no group.
fn packed_start(index: usize, row: usize, k: usize) -> usize {
    packed_len((row / LANES + index) * LANES, k)
}

impl Region<'_> {
    /// Computes all products. `packed` has [`packed_floats`] of all rows.
    pub(crate) fn run(
        &self,
        pool: &mut Pool,
        scratch: &[std::sync::Mutex<super::Scratch>],
        packed: &mut [f32],
    ) {
        let spans = self.pack(pool, packed);
        let packed = &*packed;
        let wanted = TASKS_PER_THREAD * pool.threads();
        let all_cols: usize = self.products.iter().map(|product| product.cols).sum();
        let cuts: ArrayVec<Cut, MAX_PRODUCTS> =
            self.products.iter().map(|product| self.cut(product, &spans, all_cols, wanted)).collect();
        let tasks = cuts.iter().map(|cut| cut.tasks).sum();
        pool.run(tasks, |thread, mut index| {
            for (product, cut) in self.products.iter().zip(&cuts) {
                if index < cut.tasks {
                    let mut scratch = super::lock(&scratch[thread]);
                    return self.task(&mut scratch.tile, product, cut, packed, index);
                }
                index -= cut.tasks;
            }
        });
    }

    /// Packs the activations that many rows of a product share weights with.
    fn pack(&self, pool: &mut Pool, packed: &mut [f32]) -> Spans {
        let mut spans = Spans::new();
        for product in self.products {
            if product.rows.1 - product.rows.0 >= PACKED_ROWS && !spans.contains(&product.rows) {
                spans.push(product.rows);
            }
        }
        let groups = |(start, end): (usize, usize)| (end - start).div_ceil(LANES);
        let (packed, k) = (Shared::new(packed), self.x.cols());
        pool.run(spans.iter().copied().map(groups).sum(), |_, mut index| {
            for (i, &span) in spans.iter().enumerate() {
                if index < groups(span) {
                    let (first, len) = (span.0 + index * LANES, packed_len(LANES, k));
                    // SAFETY: a group belongs to one task.
                    let to = unsafe { packed.part(packed_start(i, span.0, k) + index * len, len) };
                    let (stride, rows) = (self.x.stride(), LANES.min(span.1 - first));
                    return self.isa.run(Pack {
                        from: &self.x.data()[first * stride..],
                        stride,
                        rows,
                        k,
                        to,
                    });
                }
                index -= groups(span);
            }
        });
        spans
    }

    /// Cuts a product so that the region has about `wanted` tasks, and each fits the scratch memory.
    fn cut(&self, product: &Product<'_>, spans: &Spans, all_cols: usize, wanted: usize) -> Cut {
        let rows = product.rows.1 - product.rows.0;
        let span = spans.iter().position(|span| *span == product.rows);
        let packed = span.map(|index| packed_start(index, product.rows.0, self.x.cols()));
        let (mut cols, mut most_rows) = (PANEL_COLS, rows);
        if packed.is_some() {
            // Few columns and many threads: cut the rows, too, but never below what pays for packing.
            let columns = product.cols.div_ceil(cols).max(1);
            most_rows = rows.div_ceil((wanted / 4).div_ceil(columns)).next_multiple_of(BLOCK_ROWS);
        } else {
            cols = all_cols.div_ceil(wanted).next_multiple_of(8).clamp(TASK_COLS.start, TASK_COLS.end);
            cols = cols.min(TILE_FLOATS / rows.max(1) / LANES * LANES);
        }
        let tasks = product.cols.div_ceil(cols) * rows.div_ceil(most_rows.max(1));
        Cut { cols, rows: most_rows, tasks, packed }
    }

    /// Computes part `index` of `product`.
    fn task(
        &self,
        scratch: &mut TileScratch,
        product: &Product<'_>,
        cut: &Cut,
        packed: &[f32],
        index: usize,
    ) {
        let columns = product.cols.div_ceil(cut.cols);
        let col = index % columns * cut.cols;
        let cols = col..product.cols.min(col + cut.cols);
        let first_row = product.rows.0 + index / columns * cut.rows;
        let last_row = product.rows.1.min(first_row + cut.rows);
        let TileScratch { panels: [panel, panel2], tiles: [tile, tile2, low], waiting } = scratch;
        let x = cut.packed.map(|start| (&packed[start..], product.rows.0));
        let first = self.panel(product.first, x, cols.clone(), panel);
        let second = product.second.map(|weight| self.panel(weight, x, cols.clone(), panel2));
        let mut row = first_row;
        while row < last_row {
            let rows = row..last_row.min(row + BLOCK_ROWS);
            self.block(&first, rows.clone(), tile, low, waiting);
            if let Some(second) = &second {
                self.block(second, rows.clone(), tile2, low, waiting);
            }
            row = rows.end;
            self.store(rows, product.column + col, cols.len(), tile, tile2);
        }
    }

    /// The weight rows `cols`, packed into `scratch` where the activations are.
    fn panel<'p>(
        &self,
        weight: Weight<'p>,
        x: Option<(&'p [f32], usize)>,
        cols: Range<usize>,
        scratch: &'p mut [f32],
    ) -> Panel<'p> {
        let k = self.x.cols();
        let stored = stored(weight.weight, k, cols.clone());
        let operands = x.map_or(Operands::Stored(stored), |(x, first_row)| {
            stored.pack(self.isa, cols.len(), k, scratch);
            Operands::Packed { x, first_row, w: scratch }
        });
        Panel { weight, cols, operands }
    }

    /// x Wᵀ + b and the low-rank updates of up to [`BLOCK_ROWS`] rows, into `tile`.
    fn block(
        &self,
        panel: &Panel<'_>,
        rows: Range<usize>,
        tile: &mut [f32],
        low: &mut [f32],
        waiting: &mut [f32],
    ) {
        let (isa, k, cols) = (self.isa, self.x.cols(), panel.cols.clone());
        match panel.operands {
            Operands::Stored(w) => multiply(isa, self.x, 0..k, rows.clone(), w, cols.len(), tile),
            Operands::Packed { x, first_row, w } => {
                let x = &x[packed_len(rows.start - first_row, k)..];
                let (rows, cols) = (rows.len(), cols.len());
                isa.run(PackedMatMul { x, rows, w, cols, k, y: &mut *tile, waiting });
            }
        }
        let stride = padded(cols.len());
        if let Some(bias) = panel.weight.bias.map(Numbers::of) {
            for y in tile.chunks_mut(stride).take(rows.len()) {
                for (y, col) in y.iter_mut().zip(cols.clone()) {
                    *y += bias.get(col);
                }
            }
        }
        let Some(projection) = panel.weight.projection else { return };
        for delta in self.deltas.iter().filter(|delta| delta.projection == projection) {
            let updated = rows.start.max(delta.rows.0)..rows.end.min(delta.rows.1);
            if updated.is_empty() {
                continue;
            }
            let r = delta.delta.b.shape().last().copied().unwrap_or(1);
            let (start, len) = ((updated.start - rows.start) * stride, updated.len() * stride);
            let terms = delta.column..delta.column + r;
            let b = stored(&delta.delta.b, r, cols.clone());
            multiply(isa, self.low_rank, terms, updated, b, cols.len(), low);
            isa.run(AddScaled { y: &mut tile[start..start + len], x: &low[..len], scale: delta.delta.scale });
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
                Epilogue::Add => self.isa.run(Add { y: out, x: y }),
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
    weight: Weight<'a>,
    cols: Range<usize>,
    operands: Operands<'a>,
}

/// What is multiplied.
enum Operands<'a> {
    /// The region's activations, with weights as stored.
    Stored(Numbers<'a>),
    /// Packed activations from row `first_row` on, with packed weights.
    Packed { x: &'a [f32], first_row: usize, w: &'a [f32] },
}

/// Rows of `k` weights as stored.
fn stored(weight: &Tensor, k: usize, rows: Range<usize>) -> Numbers<'_> {
    Numbers::of(weight).part(rows.start * k..rows.end * k)
}

/// The products of the numbers `terms` of each of `rows` of `x` with `cols` weight rows of as many, into rows of
/// `padded(cols)`.
fn multiply(
    isa: Isa,
    x: &Matrix,
    terms: Range<usize>,
    rows: Range<usize>,
    w: Numbers<'_>,
    cols: usize,
    y: &mut [f32],
) {
    let (x_stride, w_stride, y_stride) = (x.stride(), terms.len(), padded(cols));
    let x = &x.data()[rows.start * x_stride + terms.start..];
    let (k, rows) = (terms.len(), rows.len());
    match w {
        Numbers::F32(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
        Numbers::F16(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
        Numbers::Bf16(w) => isa.run(MatMul { x, x_stride, rows, w, w_stride, k, cols, y, y_stride }),
    }
}
