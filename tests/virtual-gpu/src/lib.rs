//! A CUDA device for tests: a `libcuda.so` that runs PTX on the CPU, with sanitizers and exact counters.
//!
//! The crate is two things. As a `cdylib` it is the driver: programs load it in place of NVIDIA's. As an `rlib` it
//! is [`host`], through which a test loads the driver, adds devices and reads what happened.
//!
//! How an image runs: [`ptx`] parses it, [`mod@cfg`] finds where branches meet again, [`decode`] turns it into a
//! [`program`], [`exec`] runs that 32 lanes at a time against [`memory`], watched by [`sanitizer`] and counted by
//! [`counters`]. [`driver`] is the interface that cudarc calls, over [`device`] and [`graph`].
//!
//! Nothing here measures time, and no number that comes from here is a GPU's speed.

// Fields are packed and unpacked with shifts and masks throughout; they read better without parentheses.
#![allow(clippy::precedence)]

pub mod byteset;
pub mod cfg;
pub mod control;
pub mod counters;
pub mod decode;
pub mod device;
pub mod driver;
pub mod exec;
pub mod faults;
pub mod graph;
pub mod host;
pub mod memory;
pub mod num;
pub mod profile;
pub mod program;
pub mod ptx;
pub mod sanitizer;
pub mod zeroed;
