//! Device memory, and the ways to and from it.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DeviceRepr, PinnedHostSlice, ValidAsZeroBits};

use super::device::Gpu;
use crate::error::{Error, Result};

/// Numbers on one GPU. Freed in the order of the stream that it was made in.
#[derive(Debug)]
pub(crate) struct Buffer<T> {
    slice: CudaSlice<T>,
    address: u64,
}

impl<T> Buffer<T> {
    /// Where it lies.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Numbers.
    pub(crate) fn len(&self) -> usize {
        self.slice.len()
    }
}

/// Page-locked host memory that the GPU writes and the host reads.
#[derive(Debug)]
pub(crate) struct Landing<T> {
    pinned: PinnedHostSlice<T>,
    /// Where it lies. Asking `pinned` would wait for an event, which a capture forbids.
    at: *mut T,
}

impl<T> Landing<T> {
    /// What arrived.
    ///
    /// # Safety
    /// No copy to it may be on its way: the stream of the last one was waited for.
    pub(crate) unsafe fn numbers(&self) -> &[T] {
        // SAFETY: so many were allocated and set to zero, and nobody writes them: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.at, self.pinned.len()) }
    }
}

impl Gpu {
    /// Zeros; `what` names their use.
    ///
    /// # Errors
    /// [`Error::Device`] where the GPU has not so much memory, with what is free; [`Error::Cuda`].
    pub(crate) fn zeros<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        stream: &Arc<CudaStream>,
        len: usize,
        what: &str,
    ) -> Result<Buffer<T>> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| Error::Device {
            requested: format!("cuda:{}", self.ordinal()),
            reason: format!("{what}: {len} numbers are more than the address space"),
        })?;
        let (free, total) = self.memory()?;
        if bytes > free {
            return Err(Error::Device {
                requested: format!("cuda:{}", self.ordinal()),
                reason: format!("{what} needs {}, and {} of {} is free", mib(bytes), mib(free), mib(total)),
            });
        }
        // A buffer of nothing has no address; one number always has.
        let operation = || format!("allocation of {} for {what}", mib(bytes));
        let slice = self.call(operation, || stream.alloc_zeros::<T>(len.max(1)))?;
        // With event tracking off, the guard does nothing.
        let address = slice.device_ptr(stream).0;
        Ok(Buffer { slice, address })
    }

    /// A copy of `values` on the GPU.
    pub(crate) fn upload<T: DeviceRepr + ValidAsZeroBits>(
        &self,
        stream: &Arc<CudaStream>,
        values: &[T],
        what: &str,
    ) -> Result<Buffer<T>> {
        let mut buffer = self.zeros(stream, values.len(), what)?;
        self.write(stream, &mut buffer, 0, values)?;
        Ok(buffer)
    }

    /// Copies `values` to `buffer` from its number `at` on. The host memory may be used again when this returns.
    ///
    /// # Errors
    /// [`Error::Cuda`], also where they don't fit.
    pub(crate) fn write<T: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        buffer: &mut Buffer<T>,
        at: usize,
        values: &[T],
    ) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let operation = || format!("copy of {} bytes to the device", size_of_val(values));
        let room = buffer.len();
        let mut target = at
            .checked_add(values.len())
            .and_then(|end| buffer.slice.try_slice_mut(at..end))
            .ok_or_else(|| self.misfit(operation(), at, values.len(), room))?;
        // Pageable memory is staged by the driver before the call returns.
        self.call(operation, || stream.memcpy_htod(values, &mut target))
    }

    /// Copies the numbers `at..at + into.len()` of `buffer` to the host, and waits for them.
    ///
    /// # Errors
    /// [`Error::Cuda`], also where there are not so many.
    pub(crate) fn read<T: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        buffer: &Buffer<T>,
        at: usize,
        into: &mut [T],
    ) -> Result<()> {
        if into.is_empty() {
            return Ok(());
        }
        let operation = || format!("copy of {} bytes from the device", size_of_val(&*into));
        let source = at
            .checked_add(into.len())
            .and_then(|end| buffer.slice.try_slice(at..end))
            .ok_or_else(|| self.misfit(operation(), at, into.len(), buffer.len()))?;
        let name = operation();
        self.call(|| name.clone(), || stream.memcpy_dtoh(&source, into))?;
        self.synchronize(stream)
    }

    /// Copies one buffer to another of the same length.
    pub(crate) fn copy<T: DeviceRepr>(
        &self,
        stream: &Arc<CudaStream>,
        from: &Buffer<T>,
        to: &mut Buffer<T>,
    ) -> Result<()> {
        let operation = || format!("copy of {} bytes on the device", from.len() * size_of::<T>());
        self.call(operation, || stream.memcpy_dtod(&from.slice, &mut to.slice))
    }

    /// Host memory that the GPU can write while the host does something else. Zeros.
    pub(crate) fn pinned<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<PinnedHostSlice<T>> {
        let operation = || format!("cuMemHostAlloc of {} bytes", len * size_of::<T>());
        self.call(operation, || {
            // SAFETY: it is filled with zeros before anyone reads it. Flags 0: the host reads it, so it must not be
            // write-combined.
            unsafe {
                let mut pinned = self.context().alloc_pinned_with_flags::<T>(len.max(1), 0)?;
                pinned.as_mut_ptr()?.write_bytes(0, len.max(1));
                Ok(pinned)
            }
        })
    }

    /// Host memory that results come to: see [`Landing`]. Zeros.
    pub(crate) fn landing<T: DeviceRepr + ValidAsZeroBits>(&self, len: usize) -> Result<Landing<T>> {
        let mut pinned = self.pinned(len)?;
        let at = self.call(|| "address of pinned memory".to_owned(), || pinned.as_mut_ptr())?;
        Ok(Landing { pinned, at })
    }

    /// Puts a copy of the first `len` numbers of `buffer` into `stream`; also while it is captured.
    ///
    /// # Errors
    /// [`Error::Cuda`], also where there are not so many.
    pub(crate) fn fetch<T: DeviceRepr>(
        &self,
        stream: &CudaStream,
        buffer: &Buffer<T>,
        len: usize,
        into: &mut Landing<T>,
    ) -> Result<()> {
        let operation = || format!("copy of {} bytes from the device", len * size_of::<T>());
        if len > buffer.len() || len > into.pinned.len() {
            return Err(self.misfit(operation(), 0, len, buffer.len().min(into.pinned.len())));
        }
        self.call(operation, || {
            self.context().bind_to_thread()?;
            // SAFETY: `len` numbers were allocated at `at`, and nobody reads them while the copy runs: see
            // `Landing::numbers`.
            unsafe {
                let into = std::slice::from_raw_parts_mut(into.at, len);
                cudarc::driver::result::memcpy_dtoh_async(into, buffer.address, stream.cu_stream())
            }
        })
    }

    fn misfit(&self, operation: String, at: usize, len: usize, room: usize) -> Error {
        Error::Cuda {
            device: self.ordinal(),
            operation,
            reason: format!("numbers {at} to {} of a buffer of {room}", at.saturating_add(len)),
        }
    }
}

pub(crate) fn mib(bytes: usize) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
