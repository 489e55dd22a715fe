//! What memory gives, measured in the same run: the limit that decoding is held against.

use anyhow::Result;

use crate::backend::cpu::{available_threads, bandwidth};
use crate::cli::args::DeviceArgs;

/// Memory's limit, or that the device has no clock.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Bandwidth {
    /// Bytes a second.
    Measured(f64),
    /// The device is imitated: it counts, and has no time.
    NoClock,
}

impl Bandwidth {
    /// Measures the device that the flags name.
    pub(crate) fn measure(args: &DeviceArgs) -> Result<Self> {
        match args.gpu() {
            None => Ok(Self::Measured(bandwidth(args.threads().unwrap_or_else(available_threads))?)),
            Some(ordinal) => of_gpu(ordinal),
        }
    }

    /// Whether times mean anything.
    pub(crate) fn has_clock(self) -> bool {
        self != Self::NoClock
    }

    /// Bytes a second, where they were measured.
    pub(crate) fn bytes_per_second(self) -> Option<f64> {
        match self {
            Self::Measured(bytes) => Some(bytes),
            Self::NoClock => None,
        }
    }
}

#[cfg(feature = "cuda")]
fn of_gpu(ordinal: usize) -> Result<Bandwidth> {
    Ok(crate::backend::cuda::bandwidth(ordinal)?.map_or(Bandwidth::NoClock, Bandwidth::Measured))
}

#[cfg(not(feature = "cuda"))]
fn of_gpu(_: usize) -> Result<Bandwidth> {
    anyhow::bail!("this build has no CUDA backend (feature `cuda`)")
}
