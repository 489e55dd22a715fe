//! A device of its own for each test, with the fixtures loaded, and small helpers.

use cudarc::driver::{CudaContext, CudaFunction, CudaModule, CudaStream};
use cudarc::nvrtc::Ptx;
use std::sync::Arc;
use virtual_gpu::host::{Driver, Gpu};

/// The PTX of tests/fixtures/kernels.cu.
pub const FIXTURES: &str = include_str!("../fixtures/kernels.ptx");

/// A device with a context, its default stream, and a module.
pub struct Test {
    pub gpu: Gpu,
    pub context: Arc<CudaContext>,
    pub stream: Arc<CudaStream>,
    pub module: Arc<CudaModule>,
}

/// A device of a profile with the fixtures loaded.
pub fn gpu(profile: &str) -> Test {
    gpu_with(profile, FIXTURES)
}

/// A device of a profile with a module loaded. Event tracking is off, as in an engine with one stream.
pub fn gpu_with(profile: &str, ptx: &str) -> Test {
    let gpu = Driver::load().unwrap().device(profile).unwrap();
    let context = CudaContext::new(gpu.ordinal()).unwrap();
    // SAFETY: the tests order their streams by hand.
    unsafe { context.disable_event_tracking() };
    let stream = context.default_stream();
    let module = context.load_module(Ptx::from_src(ptx)).unwrap();
    Test { gpu, context, stream, module }
}

impl Test {
    pub fn kernel(&self, name: &str) -> CudaFunction {
        self.module.load_function(name).unwrap()
    }

    /// No sanitizer found anything.
    pub fn clean(&self) {
        let reports: Vec<String> = self.gpu.reports().iter().map(ToString::to_string).collect();
        assert!(reports.is_empty(), "{reports:#?}");
    }
}

/// `got` is within `relative` of `want`, or within `absolute`.
#[track_caller]
pub fn close(got: f64, want: f64, absolute: f64, relative: f64) {
    assert!((got - want).abs() <= absolute.max(relative * want.abs()), "got {got}, want {want}");
}

/// Numbers in [-1, 1), the same for the same seed.
pub fn data(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// As [`data`], rounded to bf16.
pub fn bf16s(seed: u64, n: usize) -> Vec<half::bf16> {
    data(seed, n).into_iter().map(half::bf16::from_f32).collect()
}
