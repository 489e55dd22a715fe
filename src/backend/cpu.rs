//! The CPU backend: threads and SIMD.
