//! The backend for NVIDIA GPUs: hand-written kernels, prebuilt images of them, and the driver, which is looked for
//! when the program runs.
//!
//! ```text
//! device    one GPU, and the one way to call the driver
//! memory    device memory, and the ways to and from it
//! images    the kernels, embedded
//! kernels   what each kernel takes
//! weights   the weights of a group in one arena; upload, lora
//! plan      the rows of a turn, as the kernels read them
//! forward   the layers, in the order of the paper
//! fusion    the search for α and the choice of the token, in one launch
//! ```

mod device;
mod forward;
mod fusion;
mod images;
mod kernels;
mod lora;
mod memory;
mod plan;
mod upload;
mod weights;

pub use device::{Gpu, device_count};

use std::sync::Arc;
use std::time::{Duration, Instant};

use forward::{Group, LogitsPlace};
use fusion::{DeviceFuser, is_on_device};
use memory::Buffer;
use weights::stride;

use super::check::Checker;
use super::cpu::fuse::{Fuser, sequential};
use super::{Backend, Batch, ForwardTime, FuseRow, Limits};
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};
use crate::fusion::{Decision, Logits};
use crate::model::Role;

/// How a [`CudaBackend`] is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// The GPU's number.
    pub ordinal: usize,
    /// What it can hold.
    pub limits: Limits,
}

/// Runs an ensemble on one NVIDIA GPU.
///
/// Weights lie on the GPU as stored; activations, cache, logits and sums are f32, as on the CPU. Memory besides the
/// weights is the cache, the logits, and activations of at most 512 rows.
pub struct CudaBackend {
    ensemble: Arc<Ensemble>,
    limits: Limits,
    gpu: Arc<Gpu>,
    checker: Checker,
    /// `(models, slots, vocab_stride)`
    logits: Buffer<f32>,
    place: LogitsPlace,
    stream: Arc<cudarc::driver::CudaStream>,
    large: Option<Group>,
    small: Option<Group>,
    device_fuser: DeviceFuser,
    /// For the rows that the kernel doesn't decide by itself.
    fuser: Fuser,
}

impl CudaBackend {
    /// Copies the weights of `ensemble` to the GPU and reserves its memory; `progress` gets the bytes that went up.
    ///
    /// # Errors
    /// [`Error::Device`] where there is no such GPU, or too little memory on it; [`Error::Cuda`].
    pub fn new(
        ensemble: Arc<Ensemble>,
        options: CudaOptions,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self> {
        let CudaOptions { ordinal, limits } = options;
        let gpu = Gpu::open(ordinal)?;
        let models = ensemble.models();
        let of_role = |large: bool| {
            let roles = models.iter().enumerate();
            roles.filter(move |(_, model)| (model.role == Role::Large) == large).map(|(index, _)| index)
        };
        let stream = gpu.stream()?;
        let logits =
            gpu.zeros(&stream, models.len() * limits.slots * stride(ensemble.vocab_size()), "logits")?;
        gpu.synchronize(&stream)?;
        let large = Group::new(&gpu, &ensemble, of_role(true), limits, progress)?;
        let small = Group::new(&gpu, &ensemble, of_role(false), limits, progress)?;
        for group in [&large, &small].into_iter().flatten() {
            gpu.synchronize(group.stream())?;
        }
        let vocab_size = ensemble.vocab_size();
        let place = LogitsPlace {
            address: logits.address(),
            vocab_size,
            vocab_stride: stride(vocab_size),
            slots: limits.slots,
        };
        let device_fuser = DeviceFuser::new(&gpu, &stream, &ensemble, place)?;
        gpu.synchronize(&stream)?;
        Ok(Self {
            checker: Checker::default(),
            limits,
            logits,
            place,
            stream,
            large,
            small,
            device_fuser,
            fuser: Fuser::new(),
            ensemble,
            gpu,
        })
    }

    /// The logits of `model` in `slot`.
    fn read(&self, model: usize, slot: usize) -> Result<Vec<f32>> {
        if model >= self.ensemble.models().len() || slot >= self.limits.slots {
            return Err(Error::Parameter {
                name: "slot",
                expected: format!(
                    "a model below {} and a slot below {}",
                    self.ensemble.models().len(),
                    self.limits.slots
                ),
                found: format!("model {model}, slot {slot}"),
            });
        }
        let place = self.place;
        let mut logits = vec![0.0; place.vocab_size];
        let at = (model * place.slots + slot) * place.vocab_stride;
        self.gpu.read(&self.stream, &self.logits, at, &mut logits)?;
        Ok(logits)
    }
}

impl CudaBackend {
    fn fuse_on_host(&mut self, rows: &[FuseRow<'_>]) -> Result<Vec<Result<Decision>>> {
        let mut all = Vec::with_capacity(rows.len());
        for row in rows {
            let models = 0..self.ensemble.models().len();
            all.push(models.map(|model| self.read(model, row.slot)).collect::<Result<Vec<_>>>()?);
        }
        let ensemble = &self.ensemble;
        let row_logits = |row: usize| {
            let mut of_row = Logits::default();
            for (model, logits) in ensemble.models().iter().zip(&all[row]) {
                match model.role {
                    Role::Large => of_row.large = Some(logits),
                    Role::Small => of_row.small = Some(logits),
                    Role::Expert(_) => of_row.experts.push(logits),
                }
            }
            of_row
        };
        let mut decisions = Vec::with_capacity(rows.len());
        self.fuser.fuse(&mut sequential, rows, &row_logits, &mut decisions);
        Ok(decisions)
    }
}

impl Backend for CudaBackend {
    fn limits(&self) -> Limits {
        self.limits
    }

    /// The two groups run side by side, each in its stream; the time is until both are done.
    fn forward(&mut self, batch: &Batch<'_>) -> Result<ForwardTime> {
        self.checker.check(&self.ensemble, self.limits, batch)?;
        let place = self.place;
        let started = Instant::now();
        for group in [&mut self.large, &mut self.small].into_iter().flatten() {
            group.forward(batch, place)?;
        }
        let wait = |group: &Option<Group>| match group {
            Some(group) => self.gpu.synchronize(group.stream()).map(|()| started.elapsed()),
            None => Ok(Duration::ZERO),
        };
        let large = wait(&self.large)?;
        let small = wait(&self.small)?;
        Ok(ForwardTime { large, small: small.saturating_sub(large) })
    }

    /// One launch for all rows that are decided over a grid or at a given α, greedily, by temperature or by force; the
    /// others (refined search, truncation, penalties, bans) are decided on the host, from the same logits.
    fn fuse(&mut self, rows: &[FuseRow<'_>], decisions: &mut Vec<Result<Decision>>) -> Result<()> {
        let (device, host): (Vec<FuseRow<'_>>, Vec<FuseRow<'_>>) =
            rows.iter().partition(|row| is_on_device(row));
        let on_device = self.device_fuser.fuse(&self.gpu, &self.stream, &self.ensemble, &device)?;
        let on_host = self.fuse_on_host(&host)?;
        let (mut on_device, mut on_host) = (on_device.into_iter(), on_host.into_iter());
        decisions.clear();
        for row in rows {
            let decision = if is_on_device(row) { on_device.next() } else { on_host.next() };
            match decision {
                // The host says which value it is, and that is worth a copy of the row.
                Some(Err(Error::NotFinite { .. })) => decisions.extend(self.fuse_on_host(&[*row])?),
                Some(decision) => decisions.push(decision),
                None => {}
            }
        }
        Ok(())
    }

    fn logits(&self, model: usize, slot: usize) -> Result<Vec<f32>> {
        self.read(model, slot)
    }
}

#[cfg(test)]
mod tests;
