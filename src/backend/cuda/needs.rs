//! What memory a GPU must have, before anything goes there.

use std::ops::Add;

use super::buffers::memory_of;
use super::device::Gpu;
use super::lora::bytes_of;
use super::memory::mib;
use super::plan::Members;
use super::weights::Layout;
use crate::backend::Limits;
use crate::ensemble::Ensemble;
use crate::error::{Error, Result};

/// The kernels' machine code, of which most is loaded when it is first launched: some 3 MB, in pieces of up to 2 MiB
/// for each of two or three dozen kernels.
const CODE: usize = 64 << 20;

/// Bytes, by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    weights: usize,
    cache: usize,
    activations: usize,
    logits: usize,
}

impl Needs {
    /// Of some models of an ensemble (indices), which run as one group.
    pub(crate) fn of(ensemble: &Ensemble, models: impl Iterator<Item = usize>, limits: Limits) -> Self {
        let members = Members::new(ensemble, models);
        let all = ensemble.models();
        let Some(&first) = members.models.first() else { return Self::default() };
        let config = &all[first].config;
        let sets: Vec<_> = members.owners.iter().map(|&owner| &*all[owner].weights).collect();
        let layout = Layout::new(config, &sets, ensemble.vocab_size());
        let adapters: Vec<_> =
            members.models.iter().filter_map(|&model| all[model].adapter.as_deref()).collect();
        let weights = layout.bytes * sets.len() + bytes_of(config, &adapters);
        let (cache, activations) = memory_of(ensemble, &members, limits, layout.dtype);
        Self { weights, cache, activations, logits: 0 }
    }

    /// With the logits that the GPU holds.
    pub(crate) fn with_logits(self, logits: usize) -> Self {
        Self { logits, ..self }
    }

    /// Refuses a GPU that has not so much free.
    ///
    /// # Errors
    /// [`Error::Device`] with what is needed for what, and what there is.
    pub(crate) fn check(self, gpu: &Gpu) -> Result<()> {
        let Self { weights, cache, activations, logits } = self;
        let needed = weights + cache + activations + logits + CODE;
        let (free, total) = gpu.memory()?;
        if needed <= free {
            return Ok(());
        }
        Err(Error::Device {
            requested: format!("cuda:{}", gpu.ordinal()),
            reason: format!(
                "{} is needed (weights {}, key-value cache {}, activations {}, logits {}, \
                 kernels {}), and {} of {} is free; \
                 fewer or shorter sequences need less cache",
                mib(needed),
                mib(weights),
                mib(cache),
                mib(activations),
                mib(logits),
                mib(CODE),
                mib(free),
                mib(total)
            ),
        })
    }
}

impl Add for Needs {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            weights: self.weights + other.weights,
            cache: self.cache + other.cache,
            activations: self.activations + other.activations,
            logits: self.logits + other.logits,
        }
    }
}
