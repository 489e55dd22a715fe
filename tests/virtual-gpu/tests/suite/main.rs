//! Tests of the virtual GPU as its users meet it.

// Fragments are indexed by lane and register, as the ISA's tables are.
#![allow(clippy::needless_range_loop)]

mod common;
mod conformance;
mod driver;
mod kernels;
mod sanitizers;
mod tensor;
