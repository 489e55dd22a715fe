//! What benchmarks need: caches that hold nothing of what is measured, the time of steps, and the launch of fusion by
//! itself.

use std::sync::Arc;

use cudarc::driver::sys::CUdevice_attribute;
use cudarc::driver::{CudaEvent, CudaStream};

use super::CudaBackend;
use super::caller::CudaFusion;
use super::device::Gpu;
use super::fusion::FuseShape;
use super::memory::Buffer;
use crate::backend::FuseRow;
use crate::error::Result;

/// Empties the second-level cache: copies so much that nothing else stays there.
pub(crate) struct ColdCaches {
    from: Buffer<u8>,
    to: Buffer<u8>,
}

impl ColdCaches {
    /// Two buffers of the cache's size.
    ///
    /// # Errors
    /// [`Error::Device`](crate::Error::Device), [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn new(gpu: &Gpu, stream: &Arc<CudaStream>) -> Result<Self> {
        let size = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        let bytes = gpu.call(|| "cuDeviceGetAttribute".to_owned(), || gpu.context().attribute(size))?;
        let buffer = || gpu.zeros(stream, usize::try_from(bytes).unwrap_or(0), "emptying the caches");
        Ok(Self { from: buffer()?, to: buffer()? })
    }

    /// Puts the copy into `stream`.
    pub(crate) fn sweep(&mut self, gpu: &Gpu, stream: &Arc<CudaStream>) -> Result<()> {
        gpu.copy(stream, &self.from, &mut self.to)
    }
}

impl CudaBackend {
    /// Waits for a step that was launched ahead, and forgets it: the GPUs then do nothing.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn settle(&mut self) -> Result<()> {
        let (ahead, machine) = self.parts();
        ahead.forget(&machine)
    }

    /// An event on the GPU that fuses, after which all comes that this backend is asked for.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn start(&self) -> Result<CudaEvent> {
        let start = self.gpu.stamp(&self.stream)?;
        // The streams of the groups, one of which may be another GPU's, don't wait for this one.
        self.gpu.wait_for(&start)?;
        Ok(start)
    }

    /// Seconds by that GPU's clock from `start` to the end of what was asked for last, which is waited for; a step ahead
    /// of that doesn't count. `None` where the GPU has no time.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda).
    pub(crate) fn seconds_since(&self, start: &CudaEvent) -> Result<Option<f64>> {
        if let Some(end) = self.ahead.end() {
            return self.gpu.seconds(start, end);
        }
        // What was computed on demand, on either GPU, the host has waited for, or it is in this stream.
        let end = self.gpu.stamp(&self.stream)?;
        self.gpu.seconds(start, &end)
    }
}

/// Rows that lie on the GPU, for [`CudaFusion::launch`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prepared(FuseShape);

impl CudaFusion {
    /// Its GPU, and the stream that it works in.
    pub(crate) fn place(&self) -> (&Arc<Gpu>, &Arc<CudaStream>) {
        (&self.gpu, &self.stream)
    }

    /// Puts on the GPU what the last [`fuse`](Self::fuse) was asked for, so that it can be launched again and again;
    /// `None` where that was nothing.
    ///
    /// # Errors
    /// [`Error::Cuda`](crate::Error::Cuda), and those of a row.
    pub(crate) fn prepare(&mut self, rows: &[FuseRow<'_>]) -> Result<Option<Prepared>> {
        let Self { gpu, stream, fuser, .. } = self;
        let encoded = rows.iter().map(|row| fuser.encode(row)).collect::<Result<Vec<_>>>()?;
        Ok(fuser.upload(gpu, stream, encoded.iter(), 0)?.map(Prepared))
    }

    /// Puts the launch into the stream.
    ///
    /// # Safety
    /// The logits of the last [`fuse`](Self::fuse) must still lie where they were.
    pub(crate) unsafe fn launch(&self, rows: Prepared) -> Result<()> {
        self.fuser.launch(&self.gpu, &self.stream, rows.0, self.table.address(), 0)
    }

    /// Bytes of device memory that the launch reads and writes.
    pub(crate) fn bytes(&self, rows: Prepared) -> usize {
        self.fuser.bytes(rows.0)
    }
}
