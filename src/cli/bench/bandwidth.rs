//! What memory gives, measured in the same run: the limit that decoding is held against.

use std::time::Instant;

use anyhow::Result;

use crate::backend::cpu::available_threads;
use crate::cli::args::DeviceArgs;

/// Bytes that the CPU reads: more than its caches hold.
const BYTES: usize = 512 << 20;

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
            None => Ok(Self::Measured(of_cpu(args.threads().unwrap_or_else(available_threads)))),
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

/// The best of three readings of a large buffer by all threads.
fn of_cpu(threads: usize) -> f64 {
    let numbers = vec![1_u64; BYTES / size_of::<u64>()];
    let part = numbers.len().div_ceil(threads);
    let once = || {
        let start = Instant::now();
        std::thread::scope(|scope| {
            for part in numbers.chunks(part) {
                scope.spawn(move || {
                    std::hint::black_box(part.iter().fold(0_u64, |sum, x| sum.wrapping_add(*x)))
                });
            }
        });
        start.elapsed().as_secs_f64()
    };
    let least = (0..3).map(|_| once()).fold(f64::INFINITY, f64::min);
    BYTES as f64 / least
}

#[cfg(feature = "cuda")]
fn of_gpu(ordinal: usize) -> Result<Bandwidth> {
    Ok(crate::backend::cuda::bandwidth(ordinal)?.map_or(Bandwidth::NoClock, Bandwidth::Measured))
}

#[cfg(not(feature = "cuda"))]
fn of_gpu(_: usize) -> Result<Bandwidth> {
    anyhow::bail!("this build has no CUDA backend (feature `cuda`)")
}
