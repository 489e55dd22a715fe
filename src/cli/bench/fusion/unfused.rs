//! The search for α as a tensor framework runs it on a GPU, launch by launch: the kernels of
//! benches/kernels/unfused.cu, which are in the binary for this alone.

use std::sync::Arc;

use cudarc::driver::{CudaStream, DeviceRepr};

use super::{Case, Order};
use crate::backend::cuda::{Buffer, Gpu, Grid, Kernel};
use crate::error::Result;

/// Name and PTX.
const IMAGES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/bench_images.rs"));

const MODULE: &str = "unfused";

/// Numbers of a block of an operation that works number by number.
const BLOCK: usize = 1024;

/// `TensorArgs` in unfused.cu.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct TensorArgs {
    x: u64,
    y: u64,
    alpha: u64,
    choice: u64,
    out: u64,
    cols: u32,
    stride: u32,
    x_per: u32,
    y_per: u32,
}

/// `LossArgs` in unfused.cu.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct LossArgs {
    forward: u64,
    reverse: u64,
    targets: u64,
    losses: u64,
    rows: u32,
    per: u32,
    batch: u32,
    experts: u32,
    first: u32,
    stride: u32,
}

// SAFETY: plain numbers in the layout of C, which is that of the kernels' structs.
unsafe impl DeviceRepr for TensorArgs {}
// SAFETY: as above.
unsafe impl DeviceRepr for LossArgs {}

struct Kernels {
    subtract: Kernel,
    tilt: Kernel,
    tilt_chosen: Kernel,
    kl_terms: Kernel,
    log_softmax: Kernel,
    row_sum: Kernel,
    loss: Kernel,
    argmin: Kernel,
    argmax: Kernel,
}

/// A tensor of rows, or a part of one: the address of its first number.
#[derive(Clone, Copy)]
struct Rows(u64);

/// Rows of an operand, and how many rows of the result one of them is for.
type Operand = (Rows, usize);

/// The search over logits that lie on a GPU, and its intermediate tensors.
pub(super) struct Unfused {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    kernels: Kernels,
    case: Case,
    order: Order,
    /// From row to row of every tensor, in numbers.
    stride: usize,
    /// From row to row of the losses.
    loss_stride: usize,
    /// `(2 + experts, batch, stride)`: of the large model, the small one, the experts.
    logits: Rows,
    /// `(experts, candidates)`
    alpha: Buffer<f32>,
    /// `(2 + experts, batch, stride)`
    log_probs: Buffer<f32>,
    /// `(experts, batch, stride)`
    differences: Buffer<f32>,
    /// `(batch · candidates at once, stride)`, three times: fused logits, their log-probabilities, terms of a sum.
    fused: [Buffer<f32>; 3],
    /// `(2, experts, batch)`: KL(Q_t‖Q), then KL(Q‖Q_t).
    targets: Buffer<f32>,
    /// `(2, batch · candidates at once)`: KL(P̃‖P), then KL(P‖P̃).
    divergences: Buffer<f32>,
    /// `(batch, loss_stride)`
    losses: Buffer<f32>,
    /// `(batch,)`: candidate k of expert t is t · candidates + k.
    choice: Buffer<u32>,
    /// `(batch,)`
    token: Buffer<u32>,
}

/// What was found for a row of the batch.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Found {
    pub(super) expert: usize,
    pub(super) candidate: usize,
    pub(super) loss: f32,
    pub(super) token: u32,
}

/// From row to row of tensors whose rows are `numbers` long: loads of sixteen bytes stay aligned.
pub(super) fn stride(numbers: usize) -> usize {
    numbers.next_multiple_of(4)
}

impl Unfused {
    /// Room for the tensors. `logits` is where the logits lie, `(2 + experts, batch, stride(vocab))` f32; `candidates`
    /// are those of each expert.
    ///
    /// # Errors
    /// Where the GPU has too little memory, or fails.
    pub(super) fn new(
        (gpu, stream): (&Arc<Gpu>, &Arc<CudaStream>),
        logits: u64,
        (case, candidates): (Case, &[f64]),
        order: Order,
    ) -> Result<Self> {
        let Case { vocab, experts, batch, .. } = case;
        let image = IMAGES.iter().find(|(name, _)| *name == MODULE).map(|&(_, image)| image);
        let kernel = |symbol| {
            let kernel = gpu.kernel_of(MODULE, image, symbol)?;
            // Launches may be recorded, and while they are nothing can be loaded.
            gpu.load(&kernel)?;
            Result::Ok(kernel)
        };
        let kernels = Kernels {
            subtract: kernel("subtract")?,
            tilt: kernel("tilt")?,
            tilt_chosen: kernel("tilt_chosen")?,
            kl_terms: kernel("kl_terms")?,
            log_softmax: kernel("log_softmax")?,
            row_sum: kernel("row_sum")?,
            loss: kernel("loss")?,
            argmin: kernel("argmin")?,
            argmax: kernel("argmax")?,
        };
        let (stride, rows) = (stride(vocab), batch * order.at_once(case));
        let what = "the unfused search";
        let f32s = |numbers: usize| gpu.zeros::<f32>(stream, numbers, what);
        let alpha: Vec<f32> =
            candidates.iter().map(|&alpha| alpha as f32).cycle().take(experts * case.candidates).collect();
        let loss_stride = self::stride(experts * case.candidates);
        Ok(Self {
            kernels,
            case,
            order,
            stride,
            loss_stride,
            logits: Rows(logits),
            alpha: gpu.upload(stream, &alpha, what)?,
            log_probs: f32s((2 + experts) * batch * stride)?,
            differences: f32s(experts * batch * stride)?,
            fused: [f32s(rows * stride)?, f32s(rows * stride)?, f32s(rows * stride)?],
            targets: f32s(2 * experts * batch)?,
            divergences: f32s(2 * rows)?,
            losses: f32s(batch * loss_stride)?,
            choice: gpu.zeros(stream, batch, what)?,
            token: gpu.zeros(stream, batch, what)?,
            gpu: Arc::clone(gpu),
            stream: Arc::clone(stream),
        })
    }

    /// Puts all launches into the stream.
    ///
    /// # Safety
    /// The logits must lie where they were.
    pub(super) unsafe fn launch(&self) -> Result<()> {
        let Case { experts, candidates, batch, .. } = self.case;
        let [log_p, log_q] = [0, 1].map(|model| self.row(Rows(self.log_probs.address()), model * batch));
        let log_qt = |t: usize| self.row(log_p, (2 + t) * batch);
        let difference = |t: usize| self.row(Rows(self.differences.address()), t * batch);
        for model in 0..2 + experts {
            let [logits, log_probs] = [self.logits, log_p].map(|rows| self.row(rows, model * batch));
            self.log_softmax(logits, log_probs, batch)?;
        }
        for t in 0..experts {
            let expert = self.row(self.logits, (2 + t) * batch);
            self.subtract(expert, self.row(self.logits, batch), difference(t), batch)?;
        }
        for t in 0..experts {
            let target =
                |direction: usize| self.targets.address() + 4 * ((direction * experts + t) * batch) as u64;
            self.kl((log_qt(t), 1), (log_q, 1), batch, target(0))?;
            self.kl((log_q, 1), (log_qt(t), 1), batch, target(1))?;
        }
        let at_once = self.order.at_once(self.case);
        let rows = batch * at_once;
        let [x, log_fused] = [0, 1].map(|n: usize| Rows(self.fused[n].address()));
        let [forward, reverse] = [0, rows].map(|at| self.divergences.address() + 4 * at as u64);
        for t in 0..experts {
            for first in (0..candidates).step_by(at_once) {
                self.tilt(difference(t), t * candidates + first, x)?;
                self.log_softmax(x, log_fused, rows)?;
                self.kl((log_fused, 1), (log_p, at_once), rows, forward)?;
                self.kl((log_p, at_once), (log_fused, 1), rows, reverse)?;
                self.loss((forward, reverse), t * candidates + first)?;
            }
        }
        self.choose(x)
    }

    /// What the launches found; waits for them.
    #[cfg(test)]
    pub(super) fn found(&self) -> Result<Vec<Found>> {
        let Case { batch, candidates, .. } = self.case;
        let (mut choices, mut tokens) = (vec![0_u32; batch], vec![0_u32; batch]);
        let mut losses = vec![0.0_f32; batch * self.loss_stride];
        self.gpu.read(&self.stream, &self.choice, 0, &mut choices)?;
        self.gpu.read(&self.stream, &self.token, 0, &mut tokens)?;
        self.gpu.read(&self.stream, &self.losses, 0, &mut losses)?;
        let all = choices.iter().zip(&tokens).zip(losses.chunks(self.loss_stride));
        Ok(all
            .map(|((&choice, &token), losses)| Found {
                expert: choice as usize / candidates,
                candidate: choice as usize % candidates,
                loss: losses[choice as usize],
                token,
            })
            .collect())
    }

    fn row(&self, rows: Rows, index: usize) -> Rows {
        Rows(rows.0 + 4 * (index * self.stride) as u64)
    }

    fn args(&self) -> TensorArgs {
        let (cols, stride) = (self.case.vocab as u32, self.stride as u32);
        TensorArgs { cols, stride, x_per: 1, y_per: 1, ..TensorArgs::default() }
    }

    /// An operation that works number by number.
    fn by_number(&self, kernel: &Kernel, rows: usize, args: TensorArgs) -> Result<()> {
        let blocks = (args.cols as usize).div_ceil(BLOCK) as u32;
        self.enqueue(kernel, (blocks, rows as u32), 256, &args)
    }

    /// A reduction.
    fn by_row(&self, kernel: &Kernel, rows: usize, args: TensorArgs) -> Result<()> {
        self.enqueue(kernel, (rows as u32, 1), 1024, &args)
    }

    fn enqueue<A: DeviceRepr>(
        &self,
        kernel: &Kernel,
        (x, y): (u32, u32),
        threads: u32,
        args: &A,
    ) -> Result<()> {
        let grid = Grid { blocks: (x, y, 1), threads: (threads, 1, 1), shared: 0 };
        // SAFETY: every tensor named in the arguments has as many rows as `launch` lays out above, at a multiple of
        // the stride; the logits are there by the promise of its caller.
        unsafe { self.gpu.launch(&self.stream, kernel, grid, args) }
    }

    fn log_softmax(&self, x: Rows, out: Rows, rows: usize) -> Result<()> {
        self.by_row(&self.kernels.log_softmax, rows, TensorArgs { x: x.0, out: out.0, ..self.args() })
    }

    fn subtract(&self, x: Rows, y: Rows, out: Rows, rows: usize) -> Result<()> {
        let args = TensorArgs { x: x.0, y: y.0, out: out.0, ..self.args() };
        self.by_number(&self.kernels.subtract, rows, args)
    }

    /// L + α D for as many candidates as go at once, from number `first` on.
    fn tilt(&self, difference: Rows, first: usize, out: Rows) -> Result<()> {
        let at_once = self.order.at_once(self.case);
        let args = TensorArgs {
            x: self.logits.0,
            y: difference.0,
            alpha: self.alpha.address() + 4 * first as u64,
            out: out.0,
            y_per: at_once as u32,
            ..self.args()
        };
        self.by_number(&self.kernels.tilt, self.case.batch * at_once, args)
    }

    /// KL(x‖y) of each row.
    fn kl(&self, x: Operand, y: Operand, rows: usize, out: u64) -> Result<()> {
        let terms = self.fused[2].address();
        let (x_per, y_per) = (x.1 as u32, y.1 as u32);
        let args = TensorArgs { x: x.0.0, y: y.0.0, out: terms, x_per, y_per, ..self.args() };
        self.by_number(&self.kernels.kl_terms, rows, args)?;
        self.by_row(&self.kernels.row_sum, rows, TensorArgs { x: terms, out, ..self.args() })
    }

    fn loss(&self, (forward, reverse): (u64, u64), first: usize) -> Result<()> {
        let at_once = self.order.at_once(self.case);
        let rows = self.case.batch * at_once;
        let args = LossArgs {
            forward,
            reverse,
            targets: self.targets.address(),
            losses: self.losses.address(),
            rows: rows as u32,
            per: at_once as u32,
            batch: self.case.batch as u32,
            experts: self.case.experts as u32,
            first: first as u32,
            stride: self.loss_stride as u32,
        };
        self.enqueue(&self.kernels.loss, (rows.div_ceil(256) as u32, 1), 256, &args)
    }

    /// The candidate of the least loss, its fused logits once more, and the token.
    fn choose(&self, x: Rows) -> Result<()> {
        let Case { experts, candidates, batch, .. } = self.case;
        let losses = TensorArgs {
            x: self.losses.address(),
            out: self.choice.address(),
            cols: (experts * candidates) as u32,
            stride: self.loss_stride as u32,
            ..self.args()
        };
        self.by_row(&self.kernels.argmin, batch, losses)?;
        let chosen = TensorArgs {
            x: self.logits.0,
            y: self.differences.address(),
            alpha: self.alpha.address(),
            choice: self.choice.address(),
            out: x.0,
            x_per: candidates as u32,
            y_per: batch as u32,
            ..self.args()
        };
        self.by_number(&self.kernels.tilt_chosen, batch, chosen)?;
        self.by_row(
            &self.kernels.argmax,
            batch,
            TensorArgs { x: x.0, out: self.token.address(), ..self.args() },
        )
    }

    /// Bytes of device memory that one search reads and writes: tensors as wide as the vocabulary, each number as often
    /// as it is loaded or stored. Numbers by the row are left out.
    pub(super) fn bytes(case: Case) -> usize {
        // Reads and writes of a row: a log-softmax two and one, an operation on two operands two and one, a sum one.
        const LOG_SOFTMAX: usize = 3;
        const PAIRWISE: usize = 3;
        const REDUCE: usize = 1;
        const KL: usize = PAIRWISE + REDUCE;
        let models = (2 + case.experts) * LOG_SOFTMAX + case.experts * (PAIRWISE + 2 * KL);
        let candidates = case.experts * case.candidates * (PAIRWISE + LOG_SOFTMAX + 2 * KL);
        let choice = PAIRWISE + REDUCE;
        (models + candidates + choice) * case.batch * case.vocab * size_of::<f32>()
    }
}

#[cfg(test)]
mod tests;
