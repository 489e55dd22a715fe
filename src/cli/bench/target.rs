//! What is measured on: each device of the list, on each number of threads.

use anyhow::Result;
use clap::Args;

use super::bandwidth::Bandwidth;
use crate::backend::Device;
use crate::backend::cpu::available_threads;
#[cfg(feature = "cuda")]
use crate::backend::cuda::{ColdCaches, Gpu};
use crate::cli::args::{DeviceArgs, positive};
use crate::cli::setup::note;

#[derive(Debug, Args)]
#[command(next_help_heading = "Devices")]
pub(super) struct TargetArgs {
    /// Where to compute: auto (a GPU where there is one), cpu, cuda or cuda:N.
    #[arg(long, value_name = "auto|cpu|cuda[:N],…", value_delimiter = ',', default_value = "auto")]
    device: Vec<Device>,
    /// The GPU of the large model, which also fuses.
    #[arg(long, value_name = "N", conflicts_with = "device")]
    large_device: Option<usize>,
    /// The GPU of the small model and its experts.
    #[arg(long, value_name = "N", conflicts_with = "device")]
    small_device: Option<usize>,
    /// Launch every CUDA kernel by itself instead of one graph a step: slower.
    #[arg(long)]
    eager: bool,
    /// Threads on a CPU [default: one a core].
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = positive::<u16>)]
    threads: Vec<u16>,
}

/// A device, and its limit.
pub(super) struct Target {
    pub(super) device: DeviceArgs,
    /// What it is called in a table.
    pub(super) name: String,
    pub(super) bandwidth: Bandwidth,
    /// Of its GPUs.
    #[cfg(feature = "cuda")]
    caches: Vec<GpuCaches>,
}

#[cfg(feature = "cuda")]
struct GpuCaches {
    gpu: std::sync::Arc<Gpu>,
    stream: std::sync::Arc<cudarc::driver::CudaStream>,
    caches: ColdCaches,
}

impl TargetArgs {
    /// Each device once, a CPU once for each number of threads; and what their memory gives.
    pub(super) fn measure(&self) -> Result<Vec<Target>> {
        let devices = match (self.large_device, self.small_device) {
            (None, None) => self.device.clone(),
            (large, small) => {
                vec![Device::Split { large: large.unwrap_or(0), small: small.unwrap_or(0) }]
            }
        };
        let (mut targets, last) = (Vec::new(), devices.len().saturating_sub(1));
        for (place, device) in devices.into_iter().enumerate() {
            let plain = DeviceArgs::new(device, None, self.eager);
            plain.note_fallback(false);
            if plain.gpu().is_some() || self.threads.is_empty() {
                match Target::measure(plain) {
                    Ok(target) => targets.push(target),
                    // The rows of the others are worth having.
                    Err(error) if is_of_device(&error) && (place < last || !targets.is_empty()) => {
                        note(false, [format!("left out: {error}")]);
                    }
                    Err(error) => return Err(error),
                }
                continue;
            }
            for &threads in &self.threads {
                targets.push(Target::measure(DeviceArgs::new(device, Some(threads), self.eager))?);
            }
        }
        Ok(targets)
    }
}

/// Whether a device isn't there, or can't be used.
fn is_of_device(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(crate::Error::Device { .. }))
}

impl Target {
    fn measure(device: DeviceArgs) -> Result<Self> {
        let bandwidth = Bandwidth::measure(&device)?;
        Ok(Self {
            name: name(&device),
            #[cfg(feature = "cuda")]
            caches: GpuCaches::of(device.device())?,
            bandwidth,
            device,
        })
    }

    /// Empties the caches of the GPUs. Those of a CPU stay as they are.
    pub(super) fn flush(&mut self) -> Result<()> {
        #[cfg(feature = "cuda")]
        for GpuCaches { gpu, stream, caches } in &mut self.caches {
            caches.sweep(gpu, stream)?;
            gpu.synchronize(stream)?;
        }
        Ok(())
    }
}

#[cfg(feature = "cuda")]
impl GpuCaches {
    fn of(device: Device) -> Result<Vec<Self>> {
        let gpus = device.gpus();
        let (large, small) = (gpus.map(|(large, _)| large), gpus.map(|(_, small)| small));
        let open = |ordinal| {
            let gpu = Gpu::open(ordinal)?;
            let stream = gpu.stream()?;
            let caches = ColdCaches::new(&gpu, &stream)?;
            Ok(Self { gpu, stream, caches })
        };
        large.into_iter().chain(small.filter(|_| small != large)).map(open).collect()
    }
}

fn name(args: &DeviceArgs) -> String {
    let eager = if args.eager() { ", eager" } else { "" };
    match (args.device(), args.gpu()) {
        (Device::Split { large, small }, _) => format!("cuda:{large}+{small}{eager}"),
        (_, Some(ordinal)) => format!("cuda:{ordinal}{eager}"),
        (_, None) => match args.threads().unwrap_or_else(available_threads) {
            1 => "cpu, 1 thread".to_owned(),
            threads => format!("cpu, {threads} threads"),
        },
    }
}
