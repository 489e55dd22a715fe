//! What the memory of a GPU gives: the limit that decoding is measured against.

use super::device::Gpu;
use crate::error::Result;

/// Bytes of each of two buffers: more than any second-level cache holds.
const BYTES: usize = 256 << 20;
const COPIES: usize = 8;

/// Bytes a second that GPU `ordinal` reads and writes when it copies its own memory; `None` where its events have no
/// time, as on a device that is only imitated.
///
/// # Errors
/// [`Error::Device`](crate::Error::Device), [`Error::Cuda`](crate::Error::Cuda).
pub fn bandwidth(ordinal: usize) -> Result<Option<f64>> {
    let gpu = Gpu::open(ordinal)?;
    let stream = gpu.stream()?;
    let from = gpu.zeros::<u8>(&stream, BYTES, "a measurement")?;
    let mut to = gpu.zeros::<u8>(&stream, BYTES, "a measurement")?;
    gpu.copy(&stream, &from, &mut to)?;
    let start = gpu.stamp(&stream)?;
    for _ in 0..COPIES {
        gpu.copy(&stream, &from, &mut to)?;
    }
    let end = gpu.stamp(&stream)?;
    Ok(gpu.seconds(&start, &end)?.map(|seconds| (2 * COPIES * BYTES) as f64 / seconds))
}
