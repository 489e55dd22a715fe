//! Fusion alone, over logits that the caller has on a GPU.

use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::device::Gpu;
use super::forward::LogitsPlace;
use super::fusion::{DeviceFuser, Roles};
use super::memory::Buffer;
use crate::backend::FuseRow;
use crate::backend::cpu::check_row;
use crate::error::{Error, Result};
use crate::fusion::{Decision, MAX_EXPERTS, ModelLogits};
use crate::model::Role;

/// How the logits of every model lie: `(rows, vocab_size)` f32, row `r` at `r · stride`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLogits {
    /// Rows of each model.
    pub rows: usize,
    /// The token ids that all models share.
    pub vocab_size: usize,
    /// From row to row, in numbers: at least `vocab_size`.
    pub stride: usize,
}

/// Fuses logits on a GPU that another engine computed there, in one launch (a second one where a row has biases, bans,
/// penalties or a truncated distribution): no model is run, and no logit leaves the GPU.
///
/// It works in the device's primary context, which is the one of the CUDA runtime and of PyTorch.
pub struct CudaFusion {
    pub(super) gpu: Arc<Gpu>,
    pub(super) stream: Arc<CudaStream>,
    pub(super) fuser: DeviceFuser,
    shape: DeviceLogits,
    experts: usize,
    /// Where the logits of each model lie.
    pub(super) table: Buffer<u64>,
}

impl CudaFusion {
    /// For logits of this shape, of a large model, a small one and `experts` experts, on GPU `ordinal`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a shape that can't be, [`Error::Device`], [`Error::Cuda`].
    pub fn new(ordinal: usize, experts: usize, shape: DeviceLogits) -> Result<Self> {
        let DeviceLogits { rows, vocab_size, stride } = shape;
        let fits = u32::try_from(vocab_size).is_ok() && u32::try_from(stride).is_ok();
        if rows == 0 || vocab_size == 0 || stride < vocab_size || !fits || experts > MAX_EXPERTS {
            return Err(Error::Parameter {
                name: "logits",
                expected: format!(
                    "rows of a vocabulary, a stride not below it, and at most {MAX_EXPERTS} experts"
                ),
                found: format!("{shape:?}, {experts} experts"),
            });
        }
        let gpu = Gpu::open(ordinal)?;
        let stream = gpu.stream()?;
        let table = gpu.zeros(&stream, 2 + experts, "fusion")?;
        let roles =
            Roles([Role::Large, Role::Small].into_iter().chain((0..experts).map(Role::Expert)).collect());
        let place =
            LogitsPlace { address: 0, table: table.address(), vocab_size, vocab_stride: stride, slots: rows };
        let fuser = DeviceFuser::new(&gpu, &stream, roles, place)?;
        gpu.synchronize(&stream)?;
        Ok(Self { gpu, stream, fuser, shape, experts, table })
    }

    /// Decides each of `rows` behind what is in `after`, a stream of the caller (a `CUstream` or `cudaStream_t`; null
    /// is the default one), and waits for the decisions: [`FuseRow::slot`] is the row of the logits. `decisions` is
    /// cleared and gets one entry a row.
    ///
    /// # Errors
    /// [`Error::Parameter`] where a row isn't there; those of [`FusionRule::check`](crate::FusionRule::check);
    /// [`Error::Cuda`].
    ///
    /// # Safety
    /// The addresses must be those of device memory of this GPU with as many rows as this was made for, which nobody
    /// writes until this returns, but for work in `after` that is there already; `after` must be a stream of the
    /// device's primary context.
    pub unsafe fn fuse(
        &mut self,
        logits: &ModelLogits<u64>,
        after: *mut c_void,
        rows: &[FuseRow<'_>],
        decisions: &mut Vec<Result<Decision>>,
    ) -> Result<()> {
        decisions.clear();
        if logits.experts.len() != self.experts {
            return Err(Error::Parameter {
                name: "logits",
                expected: format!("{} experts", self.experts),
                found: logits.experts.len().to_string(),
            });
        }
        for row in rows {
            check_row(row, logits, self.shape.rows)?;
        }
        let Self { gpu, stream, fuser, table, .. } = self;
        let address = |model: &Option<u64>| model.unwrap_or_default();
        let addresses: Vec<u64> = [address(&logits.large), address(&logits.small)]
            .into_iter()
            .chain(logits.experts.iter().copied())
            .collect();
        let ready = gpu.call(|| "cuEventCreate".to_owned(), || gpu.context().new_event(None))?;
        let operation = || "cuEventRecord in the caller's stream".to_owned();
        gpu.call(operation, || {
            gpu.context().bind_to_thread()?;
            // SAFETY: the event is ours, the stream the caller's, of the same context.
            unsafe { result::event::record(ready.cu_event(), after.cast::<sys::CUstream_st>()) }
        })?;
        gpu.wait(stream, &ready)?;
        gpu.write(stream, table, 0, &addresses)?;
        // Models that a rule doesn't need may have no address: nothing reads them (`check_row`).
        *decisions = fuser.fuse(gpu, stream, table.address(), rows)?;
        Ok(())
    }
}
