//! What benchmarks need: caches that hold nothing of what is measured, and the launch of fusion by itself.

use std::sync::Arc;

use cudarc::driver::CudaStream;
use cudarc::driver::sys::CUdevice_attribute;

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
