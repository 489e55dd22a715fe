//! What the memory of a GPU gives: the limit that decoding is measured against.

use super::device::Gpu;
use crate::error::Result;

/// Bytes of each of two buffers: more than any second-level cache holds.
const BYTES: usize = 256 << 20;
const COPIES: usize = 8;
/// Bytes that show whether there is a clock.
const A_FEW: usize = 1 << 20;

/// Bytes a second that GPU `ordinal` reads and writes when it copies its own memory; `None` where its events have no
/// time, as on a device that is only imitated.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device), [`Error::Cuda`](crate::Error::Cuda).
pub fn bandwidth(ordinal: usize) -> Result<Option<f64>> {
    let gpu = Gpu::open(ordinal)?;
    // Whether there is a clock, a small copy shows as well; and the large ones find the GPU awake.
    if copies(&gpu, A_FEW)?.is_none() {
        return Ok(None);
    }
    Ok(copies(&gpu, BYTES)?.map(|seconds| (2 * COPIES * BYTES) as f64 / seconds))
}

/// Seconds of all copies of so many bytes, after one more.
fn copies(gpu: &Gpu, bytes: usize) -> Result<Option<f64>> {
    let stream = gpu.stream()?;
    let from = gpu.zeros::<u8>(&stream, bytes, "a measurement")?;
    let mut to = gpu.zeros::<u8>(&stream, bytes, "a measurement")?;
    gpu.copy(&stream, &from, &mut to)?;
    let start = gpu.stamp(&stream)?;
    for _ in 0..COPIES {
        gpu.copy(&stream, &from, &mut to)?;
    }
    let end = gpu.stamp(&stream)?;
    gpu.seconds(&start, &end)
}
