//! Logits from the GPU of the small model and its experts to that of the large one, which fuses.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::device::Gpu;
use super::forward::{Group, LogitsPlace};
use super::memory::Buffer;
use crate::backend::Batch;
use crate::error::Result;

/// The logits of one GPU, on their way to another.
pub(crate) struct Relay {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    /// Laid out as one half of those they go to.
    logits: Buffer<f32>,
    /// Where they lie.
    pub(crate) place: LogitsPlace,
    /// On the host.
    row: Vec<f32>,
}

impl Relay {
    /// Room for `numbers` logits on `gpu`, laid out as `place`.
    pub(crate) fn new(gpu: &Arc<Gpu>, place: LogitsPlace, numbers: usize) -> Result<Self> {
        let stream = gpu.stream()?;
        let logits = gpu.zeros(&stream, numbers, "logits")?;
        gpu.synchronize(&stream)?;
        let place = LogitsPlace { address: logits.address(), ..place };
        Ok(Self { gpu: Arc::clone(gpu), stream, logits, place, row: vec![0.0; place.vocab_size] })
    }

    /// Kernels launched on this GPU.
    pub(crate) fn launches(&self) -> u64 {
        self.gpu.launches()
    }

    /// Copies what the rows of `batch` left here, once `group` was waited for.
    ///
    /// By way of the host: a row is a few hundred kilobytes, and not every pair of GPUs can reach the other.
    pub(crate) fn bring(
        &mut self,
        batch: &Batch<'_>,
        group: &Group,
        (gpu, stream, to): (&Gpu, &Arc<CudaStream>, &mut Buffer<f32>),
    ) -> Result<()> {
        for row in batch.rows.iter().filter(|row| group.has(row.model)) {
            let Some(slot) = row.slot else { continue };
            let at = (row.model * self.place.slots + slot) * self.place.vocab_stride;
            self.gpu.read(&self.stream, &self.logits, at, &mut self.row)?;
            gpu.write(stream, to, at, &self.row)?;
        }
        Ok(())
    }
}
