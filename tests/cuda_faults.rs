//! Every call to the driver fails once, at every place where the engine makes it: the run ends in an error that says
//! where, and nothing is left behind. Functions are taken from a run that succeeds, so a new one is here by itself.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::sync::Arc;

use cudarc::driver::{CudaContext, result};
use dlf_engine::backend::Limits;
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Ensemble, Error, Generator, Request, SamplingParams, Step};
use virtual_gpu::host::{Alive, Driver, Gpu};

#[path = "support/models.rs"]
mod models;

use models::{Shape, adapter, model, tokens};

const LIMITS: Limits = Limits { rows: 32, slots: 2, blocks: 8 };

/// As small as can be: a run is made for each call.
const TINY: Shape =
    Shape { hidden: 8, intermediate: 8, heads: 1, kv_heads: 1, head_dim: 8, vocab: 24, bias: false };

/// Models of all kinds, and as many experts as make fusion ask for more shared memory.
fn ensemble() -> Arc<Ensemble> {
    let small = model(Role::Small, TINY, Dtype::Bf16, 2);
    let lora = LlamaModel { role: Role::Expert(0), adapter: Some(adapter(TINY, 3)), ..small.clone() };
    let others = (1..8).map(|t| model(Role::Expert(t), TINY, Dtype::Bf16, 3 + t as u64));
    let large = model(Role::Large, TINY, Dtype::F16, 1);
    Arc::new(Ensemble::from_models([large, small, lora].into_iter().chain(others).collect()).unwrap())
}

/// A prompt on tensor cores and six tokens, of which four are computed ahead: in graphs for both halves of the logits.
fn request() -> Request {
    let sampling = SamplingParams { temperature: 0.7, top_k: 5, ..SamplingParams::default() };
    let request = Request::new(tokens(18, TINY.vocab, 1), 6).sampling(sampling);
    Request { ignore_eos: true, top_logprobs: 2, ..request }
}

/// A GPU whose context is held: its release would clear away what was left behind.
struct Held {
    gpu: Gpu,
    context: Arc<CudaContext>,
}

impl Held {
    fn new() -> Self {
        let gpu = Driver::load().unwrap().device("a100").unwrap();
        // In a thread of its own, since it becomes current there.
        let context = std::thread::spawn(move || CudaContext::new(gpu.ordinal()).unwrap()).join().unwrap();
        Self { gpu, context }
    }

    /// All that is there now. What streams still have to free, they free.
    fn alive(&self) -> Alive {
        std::thread::scope(|scope| {
            let wait = || {
                self.context.bind_to_thread().unwrap();
                result::ctx::synchronize().unwrap();
            };
            scope.spawn(wait).join().unwrap();
        });
        self.gpu.totals().alive
    }

    /// One whole run; whether the error had struck before all was dropped. In a thread of its own, where no context is
    /// current yet: runs make the same calls.
    fn run(&self, ensemble: &Arc<Ensemble>) -> (Result<Vec<Step>, Error>, bool) {
        std::thread::scope(|scope| scope.spawn(|| self.run_here(ensemble)).join().unwrap())
    }

    fn run_here(&self, ensemble: &Arc<Ensemble>) -> (Result<Vec<Step>, Error>, bool) {
        let ordinal = self.gpu.ordinal();
        let options = CudaOptions { ordinal, small_ordinal: ordinal, limits: LIMITS, graphs: true };
        let mut struck = true;
        let result = CudaBackend::new(Arc::clone(ensemble), options, &mut |_| {}).and_then(|cuda| {
            let mut generator = Generator::new(Arc::clone(ensemble), Box::new(cuda));
            generator.push(request())?;
            let steps = generator.by_ref().collect();
            struck = !self.gpu.struck().is_empty();
            steps
        });
        (result, struck)
    }
}

/// What a call would have released that failed instead.
fn lost(function: &str, nth: u64, found: &Alive) -> Alive {
    let none = Alive::default();
    match function {
        "cuMemFreeAsync" => Alive { allocations: 1, ..none },
        "cuMemFreeHost" => Alive { pinned_bytes: found.pinned_bytes.max(1), ..none },
        "cuStreamDestroy_v2" => Alive { streams: 1, ..none },
        "cuEventDestroy_v2" => Alive { events: 1, ..none },
        // With its variables.
        "cuModuleUnload" => Alive { modules: 1, allocations: found.allocations, ..none },
        "cuGraphExecDestroy" => Alive { executables: 1, ..none },
        "cuGraphDestroy" => Alive { graphs: 1, ..none },
        "cuDevicePrimaryCtxRelease_v2" => Alive { contexts: 1, ..none },
        // After the two numbers of the compute capability. cudarc asks whether there are memory pools when it has the
        // context, and forgets it where that fails.
        "cuDeviceGetAttribute" if nth == 3 => Alive { contexts: 1, ..none },
        _ => none,
    }
}

/// What the message of an error in this function says beside the code.
fn operation(function: &str) -> &str {
    match function {
        "cuLaunchKernel" => "launch of ",
        "cuGraphLaunch" => "cuGraphLaunch of ",
        "cuMemAllocAsync" => "allocation of ",
        "cuMemHostAlloc" => "cuMemHostAlloc of ",
        "cuModuleLoadData" | "cuModuleGetFunction" => "cuModuleLoadData of ",
        "cuFuncSetAttribute" => "cuFuncSetAttribute of fuse_9",
        "cuMemcpyHtoDAsync_v2" | "cuMemcpyDtoHAsync_v2" => "copy of ",
        "cuGraphInstantiateWithFlags" => "cuGraphInstantiate",
        _ => "",
    }
}

/// Lets the `nth` call of a function fail for each `nth` that `chosen` takes of how many there are.
fn fail(chosen: impl Fn(u64, u64) -> bool) {
    let ensemble = ensemble();
    let clean = Held::new();
    let before = clean.alive();
    clean.gpu.clear();
    let (steps, _) = clean.run(&ensemble);
    assert_eq!(steps.unwrap().len(), 6);
    let called = clean.gpu.called();
    assert_eq!(clean.alive(), before);
    assert!(called["cuGraphLaunch"] >= 3 && called["cuStreamBeginCapture_v2"] == 2, "{called:?}");
    for (function, &count) in &called {
        let (mut held, mut failed) = (Held::new(), 0);
        for nth in (1..=count).filter(|&nth| chosen(nth, count)) {
            let before = held.alive();
            held.gpu.clear();
            // No memory, or CUDA_ERROR_LAUNCH_FAILED.
            let (code, name) = match function.contains("Alloc") {
                true => (2, "CUDA_ERROR_OUT_OF_MEMORY"),
                false => (719, "CUDA_ERROR_LAUNCH_FAILED"),
            };
            held.gpu.inject_into(function, nth, code);
            let (result, struck) = held.run(&ensemble);
            let what = format!("{function} {nth} of {count}");
            assert_eq!(held.gpu.struck(), [&function[..]], "{what}");
            failed += 1;
            let after = held.alive();
            let lost = lost(function, nth, &after);
            assert_eq!(after, plus(before, lost), "{what}");
            match result {
                Err(error) => {
                    let (message, ordinal) = (error.to_string(), held.gpu.ordinal());
                    let device = [format!("cuda:{ordinal}: "), format!("device cuda:{ordinal}: ")];
                    assert!(device.iter().any(|device| message.starts_with(device)), "{what}: {message}");
                    assert!(message.contains(name), "{what}: {message}");
                    assert!(message.contains(operation(function)), "{what}: {message}");
                }
                // What fails while all is dropped has nobody to tell.
                Ok(steps) => assert!(!struck && steps.len() == 6, "{what}: nobody was told"),
            }
            if after != before {
                // What is lost stays lost.
                held = Held::new();
            }
        }
        assert!(failed > 0, "{function}");
    }
}

fn plus(a: Alive, b: Alive) -> Alive {
    Alive {
        contexts: a.contexts + b.contexts,
        streams: a.streams + b.streams,
        events: a.events + b.events,
        modules: a.modules + b.modules,
        captures: a.captures + b.captures,
        graphs: a.graphs + b.graphs,
        executables: a.executables + b.executables,
        allocations: a.allocations + b.allocations,
        pinned_bytes: a.pinned_bytes + b.pinned_bytes,
    }
}

#[test]
fn a_call_of_every_function_may_fail() {
    fail(|nth, count| nth == 1 || nth == count / 2 + 1 || nth == count);
}

#[test]
#[ignore = "a run for each of some thousand calls: the gate runs it"]
fn every_driver_call_may_fail() {
    fail(|_, _| true);
}

/// The message of a run in which `kernel` traps.
fn trapping(kernel: &str, graphs: bool, blocking: bool) -> String {
    let gpu = Driver::load().unwrap().device("h100").unwrap();
    // At its end; what graphs begin with runs once before, with no rows, and must survive that.
    match kernel {
        "advance" => gpu.mutate(kernel, "st.global.u32*;", 0, "; trap;"),
        _ => gpu.mutate(kernel, "ret;", 0, "trap;"),
    }
    gpu.blocking(blocking);
    let ensemble = ensemble();
    let ordinal = gpu.ordinal();
    let options = CudaOptions { ordinal, small_ordinal: ordinal, limits: LIMITS, graphs };
    let cuda = CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).unwrap();
    let mut generator = Generator::new(Arc::clone(&ensemble), Box::new(cuda));
    generator.push(request()).unwrap();
    let message = generator.collect::<Result<Vec<Step>, _>>().unwrap_err().to_string();
    assert_eq!(gpu.mutations(), 1);
    assert!(message.contains("CUDA_ERROR_ILLEGAL_INSTRUCTION"), "{message}");
    let start = format!("cuda:{ordinal}: ");
    message.strip_prefix(&start).unwrap_or_else(|| panic!("{message}")).to_owned()
}

#[test]
fn an_error_that_comes_late_says_what_may_have_caused_it() {
    // The first step is waited for when all its kernels are launched, those of both groups.
    let message = trapping("attention_merge", true, false);
    assert!(message.starts_with("cuStreamSynchronize: "), "{message}");
    let large = "; not waited for: 14 kernels from embed_f16 to lm_head_f16_1";
    assert!(message.contains(large), "{message}");
    assert!(message.ends_with("kernels from embed_bf16 to lm_head_bf16_4"), "{message}");
    let message = trapping("sample", true, false);
    assert!(message.starts_with("cuStreamSynchronize: "), "{message}");
    assert!(message.ends_with("; not waited for: 2 kernels from fuse_9 to sample"), "{message}");
    // A step ahead is a graph. (Which call meets the error first is the driver's business.)
    let message = trapping("advance", true, false);
    // 31 of a step, and the sampler.
    assert!(message.ends_with("; not waited for: a graph of 32 kernels from advance to sample"), "{message}");
}

#[test]
fn the_kernel_is_found_where_launches_are_waited_for() {
    for kernel in ["attention_merge", "residual_bf16_4", "sample"] {
        let message = trapping(kernel, false, true);
        assert!(message.starts_with(&format!("launch of {kernel} with ")), "{message}");
    }
}
