//! Every kernel that ships is run: whole models and fusion in the sizes that choose each, on the virtual device with its
//! sanitizers, and the names of all launches beside the names in the images.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::backend::Limits;
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::fusion::FusionRule;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Generator, Request};
use virtual_gpu::host::Driver;

#[path = "support/models.rs"]
mod models;

use models::{EVEN, Shape, adapter, model, tokens};

/// The kernels of the images.
fn shipped() -> BTreeSet<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels/ptx");
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let images = files.filter(|path| path.extension().is_some_and(|extension| extension == "ptx"));
    let text: String = images.map(|path| std::fs::read_to_string(path).unwrap()).collect();
    let entries = text.lines().filter_map(|line| line.split_once(".entry "));
    entries.map(|(_, name)| name.trim_end_matches('(').trim().to_owned()).collect()
}

/// The kernels that a few tokens of `prompts` launch; the first prompt decodes alone at the end.
fn launched(models: Vec<LlamaModel>, prompts: &[usize]) -> BTreeSet<String> {
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    let gpu = Driver::load().unwrap().device("a100").unwrap();
    let limits = Limits { rows: 32, slots: 32, blocks: 64 };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
    let backend = CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).unwrap();
    let mut generator = Generator::new(Arc::clone(&ensemble), Box::new(backend));
    for (index, &length) in prompts.iter().enumerate() {
        let mut request = Request::new(tokens(length, EVEN.vocab, index), if index == 0 { 6 } else { 1 });
        request.ignore_eos = true;
        if ensemble.num_experts() == 0 {
            request.rule = FusionRule::Large;
            // The sampler, too.
            (request.sampling.temperature, request.sampling.top_k) = (1.0, 3);
        }
        generator.push(request).unwrap();
    }
    generator.for_each(|step| drop(step.unwrap()));
    assert_eq!(gpu.reports(), []);
    gpu.launches().into_iter().map(|launch| launch.kernel).collect()
}

#[test]
fn all_that_ships_is_run() {
    let mut run = BTreeSet::new();
    // A large model alone: its rows choose the kernels of the projections, its heads those of attention.
    for (dtype, group) in [(Dtype::F32, 1), (Dtype::F16, 2), (Dtype::Bf16, 8)] {
        let shape = Shape { heads: 2 * group, ..EVEN };
        for prompts in [&[12][..], &[3, 1], &[2, 1, 1, 1, 1, 1], &[1; 12], &[1; 20]] {
            run.extend(launched(vec![model(Role::Large, shape, dtype, 1)], prompts));
        }
    }
    // A prompt attends in tiles, in one of two sizes of heads.
    for head_dim in [8, 72] {
        let shape = Shape { head_dim, ..EVEN };
        run.extend(launched(vec![model(Role::Large, shape, Dtype::F16, 1)], &[20]));
    }
    // Experts choose the kernel of fusion; one of them is an adapter.
    for experts in [1, 2, 5, 8] {
        let shape = Shape { heads: 8, ..EVEN };
        let small = model(Role::Small, shape, Dtype::Bf16, 2);
        let lora = LlamaModel { role: Role::Expert(0), adapter: Some(adapter(shape, 3)), ..small.clone() };
        let others = (1..experts).map(|t| model(Role::Expert(t), shape, Dtype::Bf16, 3 + t as u64));
        let mut models = vec![model(Role::Large, shape, Dtype::Bf16, 1), small, lora];
        models.extend(others);
        run.extend(launched(models, &[3]));
    }
    assert_eq!(run, shipped());
}
