//! The seam between what is computed and where: a backend runs rows through the models of one ensemble and
//! fuses their logits.
//!
//! A step is two calls. [`Backend::forward`] takes a ragged batch of rows: decoding is one row a sequence,
//! prefill is many, scoring is many that all want their logits. [`Backend::fuse`] turns the logits that
//! `forward` left in numbered slots into decisions. Nothing above knows of threads or launches, nothing below
//! knows of prompts.

mod check;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::{Decision, FusionRule};
use crate::kv_cache::BlockTable;
use crate::sampling::SamplingParams;

/// One position of one sequence in one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The model: an index into [`Ensemble::models`](crate::Ensemble::models).
    pub model: usize,
    /// The block table of this row's sequence in this model: an index into [`Batch::tables`].
    pub table: usize,
    /// The position, counted from 0. Its keys and values are appended to the cache.
    pub position: usize,
    /// The token at that position.
    pub token: u32,
    /// Where the logits of this row are kept until the next `forward` that writes the same slot; `None` where
    /// nobody wants them, and the output projection is skipped.
    pub slot: Option<usize>,
}

/// The rows of one [`Backend::forward`].
///
/// Rows are ordered by model, then by table, then by position, and the rows of one table have consecutive
/// positions. Every earlier position of a table is in the cache already or is a row of the same batch, and its
/// blocks are allocated up to the last row's position. Two tables may share blocks of a common prefix, whose
/// rows then stand in the batch once at most.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    /// The rows.
    pub rows: &'a [Row],
    /// The block tables that the rows name.
    pub tables: &'a [BlockTable],
}

/// How the token of a row is chosen.
#[derive(Clone, Copy, Debug)]
pub enum Choice<'a> {
    /// From the fused distribution.
    Sample {
        /// Temperature, truncation, penalties, bans.
        params: &'a SamplingParams,
        /// The tokens before this one, prompt included, that penalties look at: those of the large model where
        /// there is one.
        history: &'a [u32],
        /// How many of `history` were generated: presence and frequency penalties count only those.
        generated: usize,
        /// Ids that must not be chosen at this step (end-of-sequence before `min_new_tokens`).
        banned: &'a [u32],
    },
    /// It is given: its log-probabilities are wanted.
    Forced(u32),
}

/// One row of [`Backend::fuse`].
#[derive(Clone, Copy, Debug)]
pub struct FuseRow<'a> {
    /// The slot that holds this row's logits, the same in every model that the rule uses.
    pub slot: usize,
    /// The step, counted from the first token after the prompt: it keys the sampler's noise and names errors.
    pub step: usize,
    /// How logits are combined.
    pub rule: &'a FusionRule,
    /// The active expert and its α where the dynamic rule holds an earlier choice instead of searching.
    pub held: Option<(usize, f64)>,
    /// How the token is chosen.
    pub choice: Choice<'a>,
}

/// What a backend can hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Rows of one model in one [`Batch`].
    pub rows: usize,
    /// Logit slots.
    pub slots: usize,
    /// Blocks of [`BLOCK_SIZE`](crate::kv_cache::BLOCK_SIZE) positions in the cache of each model.
    pub blocks: usize,
}

impl Limits {
    /// Limits for `sequences` sequences decoded together over `vocab_size` ids, with `blocks` blocks a model.
    ///
    /// A prompt is read 512 tokens at a time. Logits take at most 8 MiB a model, unless the sequences need more.
    pub fn for_vocabulary(vocab_size: usize, sequences: usize, blocks: usize) -> Self {
        const LOGIT_BYTES: usize = 8 << 20;
        const MOST_SLOTS: usize = 64;
        let affordable = LOGIT_BYTES / (size_of::<f32>() * vocab_size.max(1));
        let sequences = sequences.max(1);
        Self { rows: sequences.max(512), slots: affordable.clamp(1, MOST_SLOTS).max(sequences), blocks }
    }
}

/// Where to compute.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first NVIDIA GPU that this engine runs on, or the CPU where there is none: see [`passed_over`](Self::passed_over).
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
    /// The large model on one NVIDIA GPU, the small one and its experts on another.
    Split {
        /// The GPU of the large model, which also fuses.
        large: usize,
        /// The GPU of the small model and its experts.
        small: usize,
    },
}

impl Device {
    /// The GPU of the large model, which also fuses, and that of the small one and its experts; `None` for the CPU.
    pub(crate) fn gpus(self) -> Option<(usize, usize)> {
        match self {
            Self::Cpu => None,
            Self::Auto => first_gpu().ok().flatten().map(|ordinal| (ordinal, ordinal)),
            Self::Cuda(ordinal) => Some((ordinal, ordinal)),
            Self::Split { large, small } => Some((large, small)),
        }
    }

    /// Why [`Auto`](Self::Auto) is the CPU though there is a GPU: it, or its driver, is too old. `None` where there is
    /// nothing to tell.
    pub fn passed_over(self) -> Option<String> {
        if self == Self::Auto { first_gpu().err() } else { None }
    }
}

impl FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = match text {
            "auto" => return Ok(Self::Auto),
            "cpu" => return Ok(Self::Cpu),
            "cuda" => Some(0),
            _ => text.strip_prefix("cuda:").and_then(|number| number.parse().ok()),
        };
        number.map(Self::Cuda).ok_or_else(|| Error::Parameter {
            name: "device",
            expected: "auto, cpu, cuda or cuda:N".to_owned(),
            found: format!("{text:?}"),
        })
    }
}

/// How to open a backend.
#[derive(Clone, Copy, Debug)]
pub struct BackendOptions {
    /// Where to compute.
    pub device: Device,
    /// Threads of the CPU backend; `None` is one a core.
    pub threads: Option<usize>,
    /// What it must hold.
    pub limits: Limits,
    /// Whether the CUDA backend launches every kernel by itself, on demand, instead of a graph for each step: slower,
    /// to the same bits.
    pub eager: bool,
}

impl BackendOptions {
    /// On one thread a core or with graphs, as the device has it.
    pub fn new(device: Device, limits: Limits) -> Self {
        Self { device, threads: None, limits, eager: false }
    }

    /// Opens the backend for an ensemble.
    ///
    /// # Errors
    /// [`Error::Device`] where the device can't be used.
    pub fn open(self, ensemble: Arc<Ensemble>) -> Result<Box<dyn Backend>> {
        self.open_with(ensemble, &mut |_| {})
    }

    /// Opens the backend for an ensemble; `progress` gets the bytes of weights that went to a GPU, piece by piece.
    ///
    /// # Errors
    /// [`Error::Device`] where the device can't be used.
    pub fn open_with(
        self,
        ensemble: Arc<Ensemble>,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Box<dyn Backend>> {
        match self.device.gpus() {
            None => self.open_cpu(ensemble),
            Some(gpus) => self.open_cuda(ensemble, gpus, progress),
        }
    }

    fn open_cpu(self, ensemble: Arc<Ensemble>) -> Result<Box<dyn Backend>> {
        let threads = self.threads.unwrap_or_else(cpu::available_threads);
        Ok(Box::new(cpu::CpuBackend::new(ensemble, cpu::CpuOptions { threads, limits: self.limits })?))
    }

    #[cfg(feature = "cuda")]
    fn open_cuda(
        self,
        ensemble: Arc<Ensemble>,
        gpus: (usize, usize),
        progress: &mut dyn FnMut(usize),
    ) -> Result<Box<dyn Backend>> {
        Ok(Box::new(cuda::CudaBackend::new(ensemble, self.cuda(gpus), progress)?))
    }

    /// On these GPUs.
    #[cfg(feature = "cuda")]
    pub(crate) fn cuda(self, (ordinal, small_ordinal): (usize, usize)) -> cuda::CudaOptions {
        cuda::CudaOptions { ordinal, small_ordinal, limits: self.limits, graphs: !self.eager }
    }

    #[cfg(not(feature = "cuda"))]
    fn open_cuda(
        self,
        _: Arc<Ensemble>,
        (ordinal, _): (usize, usize),
        _: &mut dyn FnMut(usize),
    ) -> Result<Box<dyn Backend>> {
        Err(Error::Device {
            requested: format!("cuda:{ordinal}"),
            reason: "this build has no CUDA backend (feature `cuda`); use --device cpu".to_owned(),
        })
    }
}

/// The GPU that [`Device::Auto`] is, if any, or why none of those that there are will do.
fn first_gpu() -> Result<Option<usize>, String> {
    #[cfg(feature = "cuda")]
    return cuda::first_usable();
    #[cfg(not(feature = "cuda"))]
    Ok(None)
}

/// Where the time of one [`Backend::forward`] went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForwardTime {
    /// The large model.
    pub large: Duration,
    /// The group of the small model and its experts, which run in lockstep.
    pub small: Duration,
}

/// Runs the models of one ensemble.
pub trait Backend {
    /// What this backend was built to hold.
    fn limits(&self) -> Limits;

    /// Appends the rows' keys and values to the cache and leaves the logits that are wanted in their slots.
    ///
    /// A row's logits don't depend on which other rows are in the batch: on the CPU to the bit, on a GPU to the bit
    /// as long as no set of weights has more than 16 rows, and beyond that up to the rounding of sums.
    ///
    /// # Errors
    /// Only where the device fails; the rows were validated above.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<ForwardTime>;

    /// Fuses the logits of each row and chooses its token; `decisions` is cleared and gets one entry a row, so
    /// that one broken row doesn't cost the others theirs:
    /// [`Error::NotFinite`] where a model computed NaN or +inf,
    /// [`Error::NoCandidate`] where every token is excluded. Returns the time that it took.
    ///
    /// # Errors
    /// Only where the device fails.
    fn fuse(&mut self, rows: &[FuseRow<'_>], decisions: &mut Vec<Result<Decision>>) -> Result<Duration>;

    /// Whether the times that [`forward`](Self::forward) and [`fuse`](Self::fuse) return say anything about the device:
    /// one that is only imitated has no clock.
    fn has_clock(&self) -> bool {
        true
    }

    /// Kernels launched so far, those in graphs included; 0 where nothing is launched.
    fn launches(&self) -> u64;

    /// Copies the logits of `model` in `slot` over the shared vocabulary: `(vocab_size,)` f32.
    ///
    /// # Errors
    /// Only where the device fails.
    fn logits(&self, model: usize, slot: usize) -> Result<Vec<f32>>;
}
