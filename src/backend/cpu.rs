//! The CPU backend: threads and SIMD.
//!
//! ```text
//! pool        the threads; one region of tasks at a time
//! simd        registers of each instruction set, and the mathematics that all kernels share
//! matmul      y = x Wᵀ with the same bits for one row and for many
//! projection  the products of one stage, for all models that run together
//! attention   causal attention over the paged cache
//! forward     the layers, in the order of the paper
//! bandwidth   what memory gives: the limit of decoding
//! ```
//!
//! A row's logits are the same to the bit whatever else is in the batch, however a prompt is cut, and on any
//! number of threads: every sum has one order, fixed by the shape of the model and the position alone.

mod attention;
#[cfg(feature = "cli")]
mod bandwidth;
mod cache;
mod caller;
mod forward;
pub mod fuse;
mod matmul;
mod matrix;
mod packed;
mod pool;
mod projection;
mod rowwise;
mod simd;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use attention::AttentionScratch;
#[cfg(feature = "cli")]
pub(crate) use bandwidth::bandwidth;
use cache::{KvCache, Lazy};
pub use caller::CpuFusion;
#[cfg(feature = "cuda")]
pub(crate) use caller::check_row;
use forward::{Group, Machine, most_rows};
use fuse::Fuser;
use matrix::Aligned;
use pool::Pool;
use projection::{TileScratch, packed_floats};
use simd::Isa;

use super::check::Checker;
use super::{Backend, Batch, ForwardTime, FuseRow, Limits};
use crate::config::LlamaConfig;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::{Decision, Logits};
use crate::model::Role;

/// One thread a core, as far as the system tells.
pub fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// How a [`CpuBackend`] is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the caller's included; at least 1.
    pub threads: usize,
    /// What it can hold.
    pub limits: Limits,
}

/// Runs an ensemble on this machine's cores.
///
/// Weights are used as stored, f32, f16 or bf16; all arithmetic is f32. Memory besides the weights is the cache,
/// `2 · layers · num_key_value_heads · head_dim · 4` bytes a position and model, the logits, `slots · vocab_size · 4`
/// bytes a model, and activations of at most 512 rows, the widest of them twice. Cache and logits cost nothing before they are used.
pub struct CpuBackend {
    ensemble: Arc<Ensemble>,
    limits: Limits,
    isa: Isa,
    pool: Pool,
    scratch: Vec<Mutex<Scratch>>,
    /// Activations in the layout of products of many rows.
    packed: Aligned,
    fuser: Fuser,
    caches: Vec<KvCache>,
    /// `(models, slots, vocab_size)`
    logits: Lazy,
    large: Option<Group>,
    small: Option<Group>,
    checker: Checker,
}

/// What each thread works with: no other thread asks for it.
struct Scratch {
    tile: TileScratch,
    attention: AttentionScratch,
    /// One head.
    head: Vec<f32>,
}

/// Locks in spite of a panic elsewhere: working memory is written anew before it is read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The logits of `model` in `slot`, of all `logits`; the fused step reads them in place.
fn slot_of<'a>(
    logits: &'a [f32],
    ensemble: &Ensemble,
    limits: &Limits,
    model: usize,
    slot: usize,
) -> Option<&'a [f32]> {
    if model >= ensemble.models().len() || slot >= limits.slots {
        return None;
    }
    let vocab_size = ensemble.vocab_size();
    let start = (model * limits.slots + slot) * vocab_size;
    logits.get(start..start + vocab_size)
}

impl CpuBackend {
    /// Prepares to run `ensemble`: starts the threads and reserves memory.
    ///
    /// # Errors
    /// [`Error::Parameter`] where there are no threads, [`Error::Device`] where the system refuses a thread or the
    /// memory.
    pub fn new(ensemble: Arc<Ensemble>, options: CpuOptions) -> Result<Self> {
        Self::with_isa(ensemble, options, Isa::detect())
    }

    /// As [`new`](Self::new), for instructions that the machine is known to have.
    fn with_isa(ensemble: Arc<Ensemble>, options: CpuOptions, isa: Isa) -> Result<Self> {
        let CpuOptions { threads, limits } = options;
        let pool = Pool::new(threads)?;
        let models = ensemble.models();
        let configs = || models.iter().map(|model| &*model.config);
        // What rows of weights may have.
        let inputs = |config: &LlamaConfig| {
            let queries = config.num_attention_heads * config.head_dim;
            config.hidden_size.max(config.intermediate_size).max(queries)
        };
        let widest = configs().map(inputs).max().unwrap_or(1);
        let scratch = || {
            Mutex::new(Scratch {
                tile: TileScratch::new(widest),
                attention: AttentionScratch::new(configs()),
                head: vec![0.0; configs().map(|config| config.head_dim).max().unwrap_or(1)],
            })
        };
        let of_role = |large: bool| {
            let roles = models.iter().enumerate();
            roles.filter(move |(_, model)| (model.role == Role::Large) == large).map(|(index, _)| index)
        };
        Ok(Self {
            isa,
            pool,
            limits,
            fuser: Fuser::with_isa(isa),
            scratch: (0..threads).map(|_| scratch()).collect(),
            packed: Aligned::zeros(packed_floats(most_rows(limits.rows, models.len()), widest)),
            caches: configs().map(|config| KvCache::new(config, limits.blocks)).collect::<Result<_>>()?,
            logits: Lazy::new(&[models.len(), limits.slots, ensemble.vocab_size()], "logits")?,
            large: Group::new(&ensemble, of_role(true), limits.rows),
            small: Group::new(&ensemble, of_role(false), limits.rows),
            checker: Checker::default(),
            ensemble,
        })
    }
}

impl Backend for CpuBackend {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// # Errors
    /// [`Error::Parameter`] where a row names a model, table, block, token or slot that doesn't exist, or two rows
    /// the same slot: bugs of the caller that must not reach memory.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<ForwardTime> {
        self.checker.check(&self.ensemble, self.limits, batch)?;
        let mut machine = Machine {
            ensemble: &self.ensemble,
            pool: &mut self.pool,
            isa: self.isa,
            scratch: &self.scratch,
            packed: &mut self.packed,
            caches: &mut self.caches,
            logits: self.logits.get_mut(),
            slots: self.limits.slots,
        };
        let mut time = |group: &mut Option<Group>| {
            let Some(group) = group else { return Duration::ZERO };
            let start = Instant::now();
            group.forward(&mut machine, batch);
            start.elapsed()
        };
        Ok(ForwardTime { large: time(&mut self.large), small: time(&mut self.small) })
    }

    fn fuse(&mut self, rows: &[FuseRow<'_>], decisions: &mut Vec<Result<Decision>>) -> Result<Duration> {
        let start = Instant::now();
        let Self { ensemble, fuser, pool, logits, limits, .. } = self;
        let logits = logits.get();
        let row_logits = |row: usize| {
            let mut of_row = Logits::default();
            for (index, model) in ensemble.models().iter().enumerate() {
                let Some(logits) = slot_of(logits, ensemble, limits, index, rows[row].slot) else { continue };
                match model.role {
                    Role::Large => of_row.large = Some(logits),
                    Role::Small => of_row.small = Some(logits),
                    Role::Expert(_) => of_row.experts.push(logits),
                }
            }
            of_row
        };
        let mut parallel =
            |tasks: usize, task: &(dyn Fn(usize) + Sync)| pool.run(tasks, |_, index| task(index));
        fuser.fuse(&mut parallel, rows, &row_logits, decisions);
        Ok(start.elapsed())
    }

    fn launches(&self) -> u64 {
        0
    }

    fn logits(&self, model: usize, slot: usize) -> Result<Vec<f32>> {
        let logits = slot_of(self.logits.get(), &self.ensemble, &self.limits, model, slot);
        logits.map(<[f32]>::to_vec).ok_or_else(|| Error::Parameter {
            name: "slot",
            expected: format!("a model below {} and a slot below {}", self.caches.len(), self.limits.slots),
            found: format!("model {model}, slot {slot}"),
        })
    }
}

#[cfg(test)]
mod tests;
