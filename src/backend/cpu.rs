//! The CPU backend: threads and SIMD.
pub mod fuse;
