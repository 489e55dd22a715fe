//! The backend for NVIDIA GPUs: hand-written kernels, prebuilt images of them, and the driver, which is looked for
//! when the program runs.

#![allow(dead_code)]

mod device;
mod images;
mod memory;
mod plan;
mod upload;
mod weights;

pub use device::{Gpu, device_count};

#[cfg(test)]
mod tests;
