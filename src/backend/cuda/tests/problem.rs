//! A projection's problem: what the four kernels of projections.cuh share, on the GPU and as plain f64 sums.

use half::{bf16, f16};

use super::bed::{Arena, Bed, Found, Output, ROUNDING, Rng, Sum, firsts, padded, sets_of};
use crate::backend::cuda::device::Grid;
use crate::backend::cuda::kernels::{
    Kernels, MOST_ROWS, OUTPUTS, PANEL, Product, Projections, SPLIT_WARPS, SplitArgs, Tiling, WARPS,
    WIDE_ROWS, WIDE_UNITS, split_words, staging,
};
use crate::backend::cuda::memory::Buffer;
use crate::backend::cuda::weights::stride;
use crate::weights::Dtype;

const NO_ADAPTER: u32 = u32::MAX;
/// ε of a set; no two have the same, and none is too small to be seen.
fn eps(set: usize) -> f32 {
    1e-5 + set as f32
}

/// What tensor cores lose of an f32 weight, in roundings: its last bit, 2⁻²³; and the product of both low halves, of which
/// neither is more than 2⁻¹¹ of its number, is left out.
const LOST_OF_W: usize = 2 + 4;

/// What a projection is given.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) dtype: Dtype,
    /// Of each set.
    pub(super) rows: &'static [usize],
    pub(super) cols: usize,
    pub(super) bias: bool,
    /// Of two adapters, which rows have by turns; 0 for none.
    pub(super) rank: usize,
}

/// One set's tensors as they are stored.
struct Set {
    weights: Vec<f32>,
    bias: Vec<f32>,
    norm: Vec<f32>,
}

/// One adapter: A, `(segments · rank, cols)`, and B, `(n, rank)`.
struct Lora {
    a: Vec<f32>,
    b: Vec<f32>,
}

/// A case on the GPU, and in numbers.
pub(super) struct Problem {
    pub(super) case: Case,
    segments: usize,
    norm: bool,
    x: Vec<f32>,
    sets: Vec<Set>,
    pub(super) set_of: Vec<usize>,
    /// The rows that are computed, set by set.
    pub(super) indices: Vec<u32>,
    /// Of the set that has the most of them.
    pub(super) most: usize,
    adapter: Vec<u32>,
    lora: Vec<Lora>,
    lora_t: Output,
    pub(super) product: Product,
    pub(super) rng: Rng,
    /// What the addresses in `product` are of.
    _alive: (Buffer<u8>, [Buffer<f32>; 2], [Buffer<u32>; 3]),
}

impl Problem {
    /// `n` outputs of `segments` stacked projections.
    pub(super) fn new(bed: &Bed, case: Case, (n, segments, norm): (usize, usize, bool)) -> Self {
        let Case { dtype, rows, cols, bias, rank } = case;
        let mut rng = Rng((n * 7919 + cols * 31 + rank) as u64 + rows.len() as u64);
        let (mut arena, mut sets, mut places) = (Arena::default(), Vec::new(), [0; 3]);
        for set in 0..rows.len() {
            let (weights, biases, norms) = (
                arena.matrix(&mut rng, dtype, n, cols),
                arena.vector(&mut rng, n),
                arena.vector(&mut rng, cols),
            );
            arena.bytes.extend(eps(set).to_le_bytes());
            arena.end();
            if set == 0 {
                places = [weights.0, biases.0, norms.0];
            }
            sets.push(Set { weights: weights.1, bias: biases.1, norm: norms.1 });
        }
        let set_stride = arena.bytes.len() / rows.len();
        let set_of = sets_of(rows);
        let indices = (0..set_of.len() as u32).collect();
        let most = rows.iter().max().copied().unwrap_or(0);
        let x = rng.numbers(set_of.len() * cols);
        let lora: Vec<Lora> = (0..2)
            .map(|_| Lora { a: rng.numbers(segments * rank * cols), b: rng.numbers(n * rank) })
            .collect();
        let lora_t = bed.fresh(set_of.len() * segments * rank);
        // A of an adapter and then its B, as `DeviceAdapters` lays them out.
        let a_len = segments * rank * stride(cols);
        let loras: Vec<f32> =
            lora.iter().flat_map(|lora| [padded(&lora.a, cols, 0.0), lora.b.clone()].concat()).collect();
        let adapter: Vec<u32> = (0..set_of.len()).map(|row| [1, NO_ADAPTER, 0][row % 3]).collect();
        let bytes = bed.put(&arena.bytes);
        let f32s = [bed.put(&padded(&x, cols, 0.0)), bed.put(&loras)];
        let u32s = [bed.put(&firsts(rows)), bed.put(&adapter), bed.put(&vec![0; 2 * rows.len()])];
        let product = Product {
            x: f32s[0].address(),
            weights: bytes.address() + places[0],
            bias: if bias { bytes.address() + places[1] } else { 0 },
            norm: if norm { bytes.address() + places[2] } else { 0 },
            set_first: u32s[0].address(),
            rows: 0,
            lora_b: if rank > 0 { f32s[1].address() + (a_len * size_of::<f32>()) as u64 } else { 0 },
            lora_t: lora_t.address(),
            adapter: u32s[1].address(),
            set_stride: set_stride as u64,
            lora_stride: ((a_len + n * rank) * size_of::<f32>()) as u64,
            n: n as u32,
            cols: cols as u32,
            stride: stride(cols) as u32,
            chunk: 0,
            rank: rank as u32,
            segments: segments as u32,
            producers: 0,
            lora_a: f32s[1].address(),
            progress: u32s[2].address(),
            ranges: 1,
            range_sums: 0,
        };
        let _alive = (bytes, f32s, u32s);
        Self {
            case,
            segments,
            norm,
            x,
            sets,
            set_of,
            indices,
            most,
            adapter,
            lora,
            lora_t,
            product,
            rng,
            _alive,
        }
    }

    /// The same of the absolute values of the first set's weights and of x: sums that only grow.
    pub(super) fn without_signs(mut self, bed: &Bed) -> Self {
        let cols = self.case.cols;
        for numbers in [&mut self.x, &mut self.sets[0].weights] {
            numbers.iter_mut().for_each(|number| *number = number.abs());
        }
        let weights = padded(&self.sets[0].weights, cols, 0.0);
        let bytes: Vec<u8> = match self.case.dtype {
            Dtype::F32 => weights.iter().flat_map(|w| w.to_le_bytes()).collect(),
            Dtype::F16 => weights.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes()).collect(),
            Dtype::Bf16 => weights.iter().flat_map(|&w| bf16::from_f32(w).to_le_bytes()).collect(),
        };
        let at = (self.product.weights - self._alive.0.address()) as usize;
        bed.gpu.write(&bed.stream, &mut self._alive.0, at, &bytes).unwrap();
        bed.gpu.write(&bed.stream, &mut self._alive.1[0], 0, &padded(&self.x, cols, 0.0)).unwrap();
        self
    }

    pub(super) fn rows(&self) -> usize {
        self.set_of.len()
    }

    /// Whether tensor cores compute it.
    pub(super) fn is_wide(&self) -> bool {
        self.most > MOST_ROWS
    }

    /// w · x, or w · rms_norm(x), of a row.
    fn dot(&self, row: usize, w: &[f32]) -> Sum {
        let cols = self.case.cols;
        let x = &self.x[row * cols..][..cols];
        let (mut sum, mut squares) = (Sum::default(), 0.0);
        for ((x, w), norm) in x.iter().zip(w).zip(&self.sets[self.set_of[row]].norm) {
            let (x, norm) = (f64::from(*x), if self.norm { f64::from(*norm) } else { 1.0 });
            sum.add(x * f64::from(*w) * norm);
            squares += x * x;
        }
        let eps = f64::from(eps(self.set_of[row]));
        if self.norm { sum.times((squares / cols as f64 + eps).sqrt().recip()) } else { sum }
    }

    fn lora(&self, row: usize) -> Option<&Lora> {
        self.lora.get(self.adapter[row] as usize)
    }

    /// Number `j` of A x of a row; `None` where it has no adapter.
    fn t(&self, row: usize, j: usize) -> Option<Sum> {
        let cols = self.case.cols;
        self.lora(row).map(|lora| self.dot(row, &lora.a[j * cols..][..cols]))
    }

    /// Output `n` of a row, which belongs to this segment.
    pub(super) fn y(&self, row: usize, n: usize, segment: usize) -> Sum {
        let (cols, rank) = (self.case.cols, self.case.rank);
        let set = &self.sets[self.set_of[row]];
        let mut sum = self.dot(row, &set.weights[n * cols..][..cols]);
        if let Some(lora) = self.lora(row) {
            for (j, b) in lora.b[n * rank..][..rank].iter().enumerate() {
                let t = self.t(row, segment * rank + j).unwrap_or_default();
                sum = sum.plus(t.times(f64::from(*b)));
            }
        }
        if self.case.bias {
            sum.add(f64::from(set.bias[n]));
        }
        sum
    }

    /// Roundings of a term on its way into t: four products each 128 columns along a lane, five steps over the lanes;
    /// x · norm; the squares, four and one each 128 columns and five, halved by the root; mean, ε, root, reciprocal, the
    /// scaling.
    fn roundings_of_t(&self) -> usize {
        let steps = self.case.cols.div_ceil(128);
        4 * steps + 5 + 1 + (5 * steps + 5).div_ceil(2) + 5
    }

    /// Roundings of a term on its way into y: eight products a panel along a lane, five steps over the lanes; x · norm;
    /// the squares, whose relative error is halved by the root (eight a panel half, five over the lanes, one a panel);
    /// mean, ε, root, reciprocal, the scaling; or those of t, and of B t, whose lanes are summed; two more additions.
    ///
    /// On tensor cores: a sum of each step's columns, 32 of them or 16 in f32, and within a step four sums, which may be cut
    /// off instead of rounded, or in f32 one such sum and one that is rounded, and two of small numbers, 2⁻¹⁰ of the others;
    /// what the halves lose; the squares along 128 lanes; B t in one go; and the rest as above. Where ranges of columns are
    /// summed apart, some 512 or more of them each, a range has fewer steps, by more than the ranges that are added.
    pub(super) fn roundings(&self) -> usize {
        let Case { dtype, cols, rank, .. } = self.case;
        if self.is_wide() {
            let sums = if dtype == Dtype::F32 {
                cols.div_ceil(16) + 2 + 1 + 1 + LOST_OF_W
            } else {
                cols.div_ceil(32) + 8
            };
            let of_w = sums + self.lost() + 1 + (4 * cols.div_ceil(512) + 8) / 2 + 5;
            return of_w.max(self.roundings_of_t() + rank) + 2;
        }
        let panels = cols.div_ceil(PANEL);
        let of_w = 8 * panels + 5 + 1 + (8 + 5 + panels) / 2 + 5;
        of_w.max(self.roundings_of_t() + rank.div_ceil(32) + 5) + 2
    }

    /// What the halves of an activation lose, in roundings: 2⁻¹⁶ in bf16, 2⁻²² in f16, 2⁻²³ in f32, of which tensor cores
    /// see eleven bits each, rounded.
    fn lost(&self) -> usize {
        match self.case.dtype {
            Dtype::Bf16 => 256,
            Dtype::F16 => 4,
            Dtype::F32 => 2,
        }
    }

    /// What `Group::project` launches; A x, which it leaves behind, is checked.
    pub(super) fn project<A: cudarc::driver::DeviceRepr>(
        &self,
        bed: &Bed,
        projections: &Projections,
        units: usize,
        args: impl Fn(Product) -> A,
    ) -> Found {
        self.launch(bed, projections, units, args)?;
        let (segments, rank) = (self.segments, self.case.rank);
        self.lora_t.check(bed, &self.case, |at| {
            let t = self.t(at / (segments * rank), at % (segments * rank))?;
            Some(t.rounded(self.roundings_of_t()))
        })
    }

    pub(super) fn launch<A: cudarc::driver::DeviceRepr>(
        &self,
        bed: &Bed,
        projections: &Projections,
        units: usize,
        args: impl Fn(Product) -> A,
    ) -> Found {
        let (mut product, sets) = (self.product, self.sets.len() as u32);
        if let Some(kernel) = projections.wide(self.most) {
            let split = bed.fresh(self.indices.len() * split_words(self.case.dtype, product.stride as usize));
            let blocks = (self.indices.len() as u32, 1 + product.low_rank().div_ceil(SPLIT_WARPS), 1);
            let grid = Grid { blocks, threads: (128, 1, 1), shared: 0 };
            let split_rows = self.kernels(bed).split_rows;
            bed.launch(&split_rows, grid, &SplitArgs { product, to: split.address() })?;
            self.check_split(&split.numbers(bed)?)?;
            product.x = split.address();
            let tiling = Tiling::new(self.most, units, product.cols as usize, sets as usize);
            let (grid, ranges) = (tiling.grid(), tiling.ranges);
            let blocks = (grid.blocks.0 * grid.blocks.1 * grid.blocks.2) as usize;
            // A word more, so that none of them is no buffer.
            let tickets = bed.put(&vec![0_u32; blocks / ranges + 1]);
            let sums = bed.fresh(blocks * WIDE_ROWS * WIDE_UNITS * OUTPUTS);
            product.ranges = ranges as u32;
            product.progress = tickets.address();
            product.range_sums = if ranges > 1 { sums.address() } else { 0 };
            bed.launch(kernel, grid, &args(product))?;
            sums.numbers(bed)?;
            let left = bed.back(&tickets)?;
            if left.iter().any(|&ticket| ticket != 0) {
                return Err(format!("{:?}: tickets are left at {left:?}", self.case));
            }
            return Ok(());
        }
        let tiles = units.div_ceil(WARPS);
        let (kernel, most) = projections.few(self.most);
        let (chunk, shared) = staging(most, product.stride as usize);
        product.chunk = chunk as u32;
        product.producers = product.producers_for(self.most, bed.gpu.multiprocessors());
        let blocks = tiles.min(2 * bed.gpu.multiprocessors()).max(1);
        let grid = Grid {
            blocks: (blocks as u32 + product.producers, 1, sets),
            threads: (WARPS as u32 * 32, 1, 1),
            shared: shared as u32,
        };
        bed.launch(kernel, grid, &args(product))
    }

    /// What `split_rows` wrote for each index: (high + low) · factor is the row, normalised.
    fn check_split(&self, split: &[f32]) -> Found {
        let (cols, width) = (self.case.cols, self.product.stride as usize);
        let words = split_words(self.case.dtype, width);
        for (&row, split) in self.indices.iter().zip(split.chunks(words)) {
            let halves: Vec<f64> = split.iter().flat_map(|&word| self.halves(word)).collect();
            let factor = f64::from(split[words - 4]);
            let x = &self.x[row as usize * cols..][..cols];
            let squares: f64 = x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
            let eps = f64::from(eps(self.set_of[row as usize]));
            let scale = (squares / cols as f64 + eps).sqrt().recip();
            let exact = |k: usize| match (x.get(k), self.norm) {
                (None, _) => 0.0,
                (Some(x), false) => f64::from(*x),
                (Some(x), true) => {
                    f64::from(*x) * f64::from(self.sets[self.set_of[row as usize]].norm[k]) * scale
                }
            };
            // What the low half loses of a number, or of the row's largest in f16, whose smallest step is 2⁻²⁴ where the
            // largest number is 2¹⁴; and the roundings of x · norm and of the factor, as in `roundings`.
            let largest = (0..cols).map(|k| exact(k).abs()).fold(0.0, f64::max);
            let roundings = self.lost() as f64 + 1.0 + (4 * cols.div_ceil(512) + 8) as f64 / 2.0 + 5.0;
            for k in 0..width {
                let found = (halves[k] + halves[width + k]) * factor;
                let most = roundings * ROUNDING * exact(k).abs() + largest * 2.0_f64.powi(-38);
                let near = (found - exact(k)).abs() <= most;
                if !near {
                    return Err(format!(
                        "{:?}: split {k} of row {row} is {found}, not {}",
                        self.case,
                        exact(k)
                    ));
                }
            }
        }
        Ok(())
    }

    /// The numbers that lie where an f32 would: one as tensor cores see it, or two of 16 bits.
    fn halves(&self, word: f32) -> Vec<f64> {
        let bits = word.to_bits();
        let pair = [bits as u16, (bits >> 16) as u16];
        match self.case.dtype {
            Dtype::F32 => vec![f64::from(f32::from_bits(bits & !0x1FFF))],
            Dtype::F16 => pair.map(|bits| f16::from_bits(bits).to_f64()).to_vec(),
            Dtype::Bf16 => pair.map(|bits| bf16::from_bits(bits).to_f64()).to_vec(),
        }
    }

    pub(super) fn kernels(&self, bed: &Bed) -> Kernels {
        Kernels::new(&bed.gpu, self.case.dtype, 1, 64).unwrap()
    }
}
