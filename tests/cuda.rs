//! The CUDA backend on the virtual device, with its sanitizers on: against the CPU, and against itself in every way a
//! batch can be cut.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "a test; plans are lists of ranges")]

use std::ops::Range;
use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::SamplingParams;
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::backend::{Backend, Limits};
use dlf_engine::fusion::{DynamicRule, FusionRule, SearchMode};
use dlf_engine::kv_cache::BlockTable;
use dlf_engine::model::{LlamaModel, Role};
use dlf_engine::weights::Dtype;
use dlf_engine::{Generator, Request, Step};
use virtual_gpu::host::{Call, Driver, Gpu};

#[path = "support/goldens.rs"]
mod goldens;
#[path = "support/models.rs"]
mod models;

use goldens::{Prompt, Tiny};
use models::{EVEN, Logits, ODD, Sequence, Shape, feed, mixed_ensemble, model};

/// Enough for every batch of these tests.
const LIMITS: Limits = Limits { rows: 200, slots: 700, blocks: 58 };

fn cuda(models: Vec<LlamaModel>) -> (Gpu, CudaBackend) {
    let gpu = Driver::load().unwrap().device("a100").unwrap();
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    let options =
        CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits: LIMITS, graphs: true };
    let backend = CudaBackend::new(ensemble, options, &mut |_| {}).unwrap();
    (gpu, backend)
}

fn cpu(models: Vec<LlamaModel>) -> CpuBackend {
    CpuBackend::new(
        Arc::new(Ensemble::from_models(models).unwrap()),
        CpuOptions { threads: 2, limits: LIMITS },
    )
    .unwrap()
}

/// The first tokens of each sequence: the interpreter is patient, the tester isn't.
fn shortened(
    (models, mut sequences): (Vec<LlamaModel>, Vec<Sequence>),
    length: usize,
) -> (Vec<LlamaModel>, Vec<Sequence>) {
    for sequence in &mut sequences {
        sequence.tokens.truncate(length);
    }
    (models, sequences)
}

/// Every sequence whole, in one batch.
fn whole(sequences: &[Sequence]) -> Vec<Vec<(usize, Range<usize>)>> {
    vec![sequences.iter().enumerate().map(|(i, sequence)| (i, 0..sequence.tokens.len())).collect()]
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - top).exp()).sum();
    logits.iter().map(|&x| f64::from(x - top) - sum.ln()).collect()
}

/// How far log-probabilities may be from those of f32 sums.
///
/// Beside the order of sums, tensor cores see activations as the sum of two numbers of the weights' type: of 22 bits
/// for f16 and of nearly all for f32 (as its weights), and of 16 bits for bf16, where every factor may be off by 2⁻¹⁷. Of
/// these models the worst is 4.5e-6, and 4.1e-5 with bf16: twice to five times that is allowed.
fn bound(dtype: Dtype) -> f64 {
    if dtype == Dtype::Bf16 { 2e-4 } else { 1e-5 }
}

/// The largest difference between log-probabilities of the same rows.
fn distance(found: &Logits, expected: &Logits) -> f64 {
    assert_eq!(found.len(), expected.len());
    let mut worst = 0.0_f64;
    for (row, expected) in expected {
        let numbers =
            |bits: &[u32]| log_softmax(&bits.iter().map(|&x| f32::from_bits(x)).collect::<Vec<_>>());
        let pairs = numbers(&found[row]).into_iter().zip(numbers(expected));
        worst = pairs.map(|(a, b)| (a - b).abs()).fold(worst, f64::max);
    }
    worst
}

#[test]
fn logits_are_those_of_the_cpu() {
    let grouped = Shape { heads: 8, kv_heads: 8, head_dim: 24, hidden: 40, ..EVEN };
    for (shape, dtype) in [(EVEN, Dtype::F32), (ODD, Dtype::Bf16), (EVEN, Dtype::F16), (grouped, Dtype::F32)]
    {
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 19);
        let (gpu, mut device) = cuda(models.clone());
        let found = feed(&mut device, &sequences, &whole(&sequences));
        let expected = feed(&mut cpu(models), &sequences, &whole(&sequences));
        assert_eq!(gpu.reports(), []);
        let worst = distance(&found, &expected);
        assert!(worst < bound(dtype), "{shape:?} {dtype:?}: {worst:e}");
    }
}

/// The prompts of a golden, one after the other in the cache.
fn fed(prompts: &[Prompt]) -> Vec<Sequence> {
    let mut first = 0;
    let sequence = |prompt: &Prompt| {
        let tokens = prompt.tokens.clone();
        let blocks: Vec<u32> = (first..).take(tokens.len().div_ceil(16)).collect();
        first += blocks.len() as u32;
        Sequence { model: 0, table: BlockTable { blocks }, tokens }
    };
    prompts.iter().map(sequence).collect()
}

/// The largest difference between log-probabilities and those of transformers.
fn distance_from_golden(found: &Logits, prompts: &[Prompt]) -> f64 {
    let golden = |(prompt, position): (usize, usize)| &prompts[prompt].log_probs[position];
    let expected = found.keys().map(|&row| (row, golden(row).iter().map(|x| x.to_bits()).collect()));
    distance(found, &expected.collect())
}

#[test]
fn tiny_llamas_of_every_feature_are_those_of_the_cpu_and_of_transformers() {
    for Tiny { model, prompts } in goldens::tiny() {
        let (name, dtype) = (model.name.clone(), model.weights.layers[0].q_proj.weight.dtype());
        let sequences = fed(&prompts);
        let expected = feed(&mut cpu(vec![model.clone()]), &sequences, &whole(&sequences));
        // Both prompts in one batch, more than sixteen rows: tensor cores. And up to eight tokens of each at a time, then
        // one: as prompts and tokens are decoded.
        let cut = |range: Range<usize>| -> Vec<_> {
            let length = |index: usize| sequences[index].tokens.len();
            let of = |index| (index, range.start.min(length(index))..range.end.min(length(index)));
            (0..sequences.len()).map(of).filter(|(_, range)| !range.is_empty()).collect()
        };
        let few = (0..4).map(|i| cut(8 * i..8 * i + 8)).chain((32..40).map(|i| cut(i..i + 1))).collect();
        for (batches, wide) in [(whole(&sequences), true), (few, false)] {
            let (gpu, mut device) = cuda(vec![model.clone()]);
            let found = feed(&mut device, &sequences, &batches);
            assert_eq!(gpu.reports(), [], "{name}");
            let launches = gpu.launches();
            assert_eq!(launches.iter().any(|launch| launch.kernel.starts_with("qkv_wide")), wide, "{name}");
            let (of_cpu, of_golden) = (distance(&found, &expected), distance_from_golden(&found, &prompts));
            // Weights of these models are large, so that all of them matter: log-probabilities go down to −30, and what
            // rounding moves is ten times that of `mixed_ensemble`. transformers' own numbers are off by up to 1.6e-5.
            // On tensor cores bf16 weights meet activations of 16 bits: see `bound`.
            let most = if wide && dtype == Dtype::Bf16 { 2e-4 } else { 5e-5 };
            assert!(of_cpu < most && of_golden < most, "{name}: {of_cpu:e}, {of_golden:e}");
        }
    }
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    for (shape, dtype) in [(EVEN, Dtype::Bf16), (ODD, Dtype::F32)] {
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 6);
        let (gpu, mut together) = cuda(models.clone());
        // Two tokens of each sequence at a time are at most twelve rows of one set of weights.
        let pairs: Vec<Vec<_>> =
            (0..3).map(|i| (0..sequences.len()).map(|index| (index, 2 * i..2 * i + 2)).collect()).collect();
        let expected = feed(&mut together, &sequences, &pairs);
        let (_gpu, mut alone) = cuda(models);
        let single: Vec<Vec<_>> = sequences
            .iter()
            .enumerate()
            .flat_map(|(index, sequence)| (0..sequence.tokens.len()).map(move |p| vec![(index, p..p + 1)]))
            .collect();
        assert!(feed(&mut alone, &sequences, &single) == expected, "{shape:?} {dtype:?}");
        assert_eq!(gpu.reports(), []);
    }
}

#[test]
fn many_rows_go_to_tensor_cores() {
    let wide = Shape { hidden: 264, intermediate: 130, heads: 3, kv_heads: 3, head_dim: 88, ..EVEN };
    for (shape, dtype) in [(ODD, Dtype::F16), (wide, Dtype::Bf16), (EVEN, Dtype::F32), (wide, Dtype::F32)] {
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 12);
        let kernels = |gpu: &Gpu| {
            let launches = gpu.launches();
            launches.iter().filter(|launch| launch.kernel.contains("_wide_")).count()
        };
        let (gpu, mut device) = cuda(models.clone());
        let found = feed(&mut device, &sequences, &whole(&sequences));
        // 72 rows of the small one's set are more than a block of rows.
        assert!(kernels(&gpu) > 0, "{shape:?} {dtype:?}");
        assert_eq!(gpu.reports(), []);
        let (gpu, mut device) = cuda(models);
        let cut = |i: usize| {
            sequences.iter().enumerate().map(move |(index, _)| (index, 2 * i..2 * i + 2)).collect()
        };
        let pairs: Vec<Vec<_>> = (0..6).map(cut).collect();
        let expected = feed(&mut device, &sequences, &pairs);
        assert_eq!(kernels(&gpu), 0, "{shape:?} {dtype:?}");
        let worst = distance(&found, &expected);
        assert!(worst < bound(dtype), "{shape:?} {dtype:?}: {worst:e}");
    }
}

#[test]
fn a_long_context_is_split() {
    let (models, sequences) = shortened(mixed_ensemble(EVEN, Dtype::F16), 300);
    let (models, sequences) = (vec![models[0].clone()], sequences.into_iter().take(1).collect::<Vec<_>>());
    // 300 positions are five splits of attention.
    let batches = [vec![(0, 0..200)], vec![(0, 200..290)], vec![(0, 290..300)]];
    let (gpu, mut device) = cuda(models.clone());
    let found = feed(&mut device, &sequences, &batches);
    let expected = feed(&mut cpu(models), &sequences, &batches);
    for (row, expected) in &expected {
        for (a, b) in found[row].iter().zip(expected) {
            let difference = (f32::from_bits(*a) - f32::from_bits(*b)).abs();
            assert!(difference < 2e-5, "{row:?}: {difference}");
        }
    }
    assert_eq!(gpu.reports(), []);
}

#[test]
fn a_prompt_attends_on_tensor_cores() {
    // Heads of one block of columns, of a part of one and of two; groups of three and of one.
    for (head_dim, heads, kv_heads, dtype) in
        [(64, 3, 1, Dtype::F32), (88, 2, 2, Dtype::F16), (136, 1, 1, Dtype::F32), (8, 2, 1, Dtype::Bf16)]
    {
        let shape = Shape { hidden: 24, intermediate: 16, heads, kv_heads, head_dim, vocab: 40, bias: true };
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 150);
        // The large model's two sequences; tiles of 64, 36 and 41 rows, then of 47, and three rows by themselves.
        let batches = [vec![(0, 0..100), (1, 0..41)], vec![(0, 100..147)], vec![(0, 147..150)]];
        let (models, sequences) =
            (vec![models[0].clone()], sequences.into_iter().take(2).collect::<Vec<_>>());
        let (gpu, mut device) = cuda(models.clone());
        let found = feed(&mut device, &sequences, &batches);
        assert_eq!(gpu.reports(), []);
        let name = if head_dim <= 64 { "attention_wide_8" } else { "attention_wide_16" };
        let tiles: Vec<u32> = gpu
            .launches()
            .iter()
            .filter(|launch| launch.kernel == name)
            .map(|launch| launch.grid[0])
            .collect();
        assert_eq!(tiles, [3, 3, 1, 1], "{head_dim}");
        let expected = feed(&mut cpu(models), &sequences, &batches);
        let worst = distance(&found, &expected);
        assert!(worst < bound(dtype), "{head_dim} {dtype:?}: {worst:e}");
    }
}

/// Steps of the demo ensemble under a rule, by one backend.
fn decode(backend: Box<dyn Backend>, ensemble: &Arc<Ensemble>, requests: &[Request]) -> Vec<Step> {
    let mut generator = Generator::new(Arc::clone(ensemble), backend);
    for request in requests {
        generator.push(request.clone()).unwrap();
    }
    let mut steps: Vec<Step> = generator.map(|step| step.unwrap()).collect();
    steps.sort_by_key(|step| (step.request, step.index));
    steps
}

#[test]
fn the_demo_decodes_as_on_the_cpu() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let sampled = SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() };
    let truncated = SamplingParams { top_k: 5, repetition_penalty: 1.1, ..sampled.clone() };
    let refined = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    let prompt = |seed: u32| (1..9).map(|i| 20 + (i * 37 + seed * 11) % 200).collect::<Vec<u32>>();
    // Two prompts of different lengths under several rules, decoded together; some rows are decided by the kernel,
    // others on the host.
    let requests = [
        Request::new(prompt(0), 4),
        Request::new(prompt(1)[..3].to_vec(), 4).rule(FusionRule::Static(std::iter::once(1.2).collect())),
        Request::new(prompt(2), 3).sampling(sampled),
        Request::new(prompt(3), 3).sampling(truncated),
        Request::new(prompt(4), 3).rule(refined),
        Request::new(prompt(5), 3).rule(FusionRule::Large),
        Request::score(prompt(6)),
    ];
    let limits = Limits { rows: 64, slots: 8, blocks: 16 };
    let gpu = Driver::load().unwrap().device("rtx4090").unwrap();
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
    let cuda = CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).unwrap();
    let found = decode(Box::new(cuda), &ensemble, &requests);
    let cpu = CpuBackend::new(Arc::clone(&ensemble), CpuOptions { threads: 2, limits }).unwrap();
    let expected = decode(Box::new(cpu), &ensemble, &requests);
    assert_eq!(gpu.reports(), []);
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        let what = format!("request {}, step {}", expected.request, expected.index);
        assert_eq!((found.token, &found.text), (expected.token, &expected.text), "{what}");
        let (a, b) = (&found.decision, &expected.decision);
        assert_eq!(a.expert, b.expert, "{what}");
        for (a, b) in a.alpha.iter().zip(&b.alpha) {
            // The refined α follows the rounding of logits; the grid's is one of twenty.
            assert!((a - b).abs() < 1e-3, "{what}: alpha {a} and {b}");
        }
        let difference = (a.logprob_fused - b.logprob_fused).abs();
        assert!(difference < bound(Dtype::Bf16), "{what}: {difference:e}");
    }
}

#[test]
fn a_gpu_that_fails_says_where_and_stays_failed() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let limits = Limits { rows: 16, slots: 2, blocks: 4 };
    for call in [Call::Launch, Call::Copy] {
        let gpu = Driver::load().unwrap().device("h100").unwrap();
        let options =
            CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
        let cuda = CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).unwrap();
        // CUDA_ERROR_LAUNCH_FAILED.
        gpu.inject(call, 2, 719);
        let mut generator = Generator::new(Arc::clone(&ensemble), Box::new(cuda));
        generator.push(Request::new(vec![5, 6, 7], 2)).unwrap();
        let message = generator.next().unwrap().unwrap_err().to_string();
        assert!(message.contains("CUDA_ERROR_LAUNCH_FAILED"), "{call:?}: {message}");
        assert!(message.starts_with(&format!("cuda:{}: ", gpu.ordinal())), "{call:?}: {message}");
        // The context is not trusted again: the same failure, and nothing hangs.
        generator.push(Request::new(vec![5, 6, 7], 2)).unwrap();
        assert_eq!(generator.next().unwrap().unwrap_err().to_string(), message);
    }
}

#[test]
fn two_gpus_give_what_one_gives() {
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let limits = Limits { rows: 32, slots: 4, blocks: 8 };
    let sampled = SamplingParams { temperature: 0.8, seed: 7, ..SamplingParams::default() };
    let requests = [
        Request::new(vec![5, 60, 70, 8], 4),
        Request::new(vec![9, 10], 4).sampling(sampled),
        Request::score(vec![3, 4, 5]),
    ];
    let mut all = Vec::new();
    for split in [false, true] {
        let driver = Driver::load().unwrap();
        let (gpu, other) = (driver.device("h100").unwrap(), driver.device("rtx4090").unwrap());
        let small_ordinal = if split { other.ordinal() } else { gpu.ordinal() };
        let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal, limits, graphs: true };
        let cuda = CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).unwrap();
        all.push(decode(Box::new(cuda), &ensemble, &requests));
        assert_eq!((gpu.reports(), other.reports()), (vec![], vec![]));
        assert_eq!(other.launches().is_empty(), !split);
    }
    assert_eq!(all[0].len(), all[1].len());
    for (one, two) in all[0].iter().zip(&all[1]) {
        assert_eq!((one.token, &one.decision), (two.token, &two.decision));
    }
}

#[test]
fn a_model_that_is_too_wide_is_refused_by_the_gpu_that_it_was_meant_for() {
    let driver = Driver::load().unwrap();
    let (gpu, other) = (driver.device("h100").unwrap(), driver.device("rtx4090").unwrap());
    let wide = Shape { head_dim: 258, heads: 1, kv_heads: 1, ..EVEN };
    for (shapes, role) in [([EVEN, wide, wide], Role::Small), ([wide, EVEN, EVEN], Role::Large)] {
        let roles = [Role::Large, Role::Small, Role::Expert(0)];
        let models = roles.into_iter().zip(shapes).map(|(role, shape)| model(role, shape, Dtype::F32, 1));
        let ensemble = Arc::new(Ensemble::from_models(models.collect()).unwrap());
        let ordinal = if role == Role::Small { other.ordinal() } else { gpu.ordinal() };
        let options = CudaOptions {
            ordinal: gpu.ordinal(),
            small_ordinal: other.ordinal(),
            limits: LIMITS,
            graphs: true,
        };
        let message = CudaBackend::new(ensemble, options, &mut |_| {}).err().unwrap().to_string();
        let expected =
            format!("device cuda:{ordinal}: {role}: expected a head_dim of at most 256, found 258");
        assert_eq!(message, expected);
    }
    assert_eq!([gpu, other].map(|gpu| gpu.totals().to_device_bytes), [0, 0]);
}

#[test]
fn memory_is_planned_before_anything_goes_up() {
    let driver = Driver::load().unwrap();
    let gpu = driver.device_with_memory("rtx4090", 16 << 20).unwrap();
    let ensemble = Arc::new(Ensemble::demo().unwrap());
    let limits = Limits { rows: 32, slots: 4, blocks: 512 };
    let options = CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
    let mut sent = 0;
    let error = CudaBackend::new(Arc::clone(&ensemble), options, &mut |bytes| sent += bytes).err().unwrap();
    let message = error.to_string();
    assert!(message.contains("is needed (weights ") && message.contains("of 16.0 MiB is free"), "{message}");
    assert_eq!((sent, gpu.totals().to_device_bytes), (0, 0));

    // The plan is what is then taken, but for a few small things: parameters of fusion, counters. Wide models whose
    // weights, adapters and tables of angles are most of it, too.
    // And such that blocks of tensor cores share columns, and leave sums for each other.
    let wide = [520, 1100].map(|intermediate| {
        let (models, _) = mixed_ensemble(Shape { hidden: 512, intermediate, ..EVEN }, Dtype::Bf16);
        Arc::new(Ensemble::from_models(models).unwrap())
    });
    for ensemble in std::iter::once(ensemble).chain(wide) {
        let gpu = driver.device("rtx4090").unwrap();
        let options =
            CudaOptions { ordinal: gpu.ordinal(), small_ordinal: gpu.ordinal(), limits, graphs: true };
        let planned: f64 = {
            let small = driver.device_with_memory("rtx4090", 1 << 20).unwrap();
            let options = CudaOptions { ordinal: small.ordinal(), small_ordinal: small.ordinal(), ..options };
            let message =
                CudaBackend::new(Arc::clone(&ensemble), options, &mut |_| {}).err().unwrap().to_string();
            let number = |text: &str| text.split(' ').next().unwrap().parse::<f64>().unwrap();
            // The virtual device keeps no machine code.
            number(message.split(": ").nth(1).unwrap()) - number(message.split("kernels ").nth(1).unwrap())
        };
        let backend = CudaBackend::new(ensemble, options, &mut |bytes| sent += bytes).unwrap();
        let taken = gpu.totals().live_bytes as f64 / f64::from(1 << 20);
        assert!((0.97 * taken..=1.01 * taken).contains(&planned), "{planned} planned, {taken} taken");
        assert!(sent > 1 << 20);
        drop(backend);
        assert_eq!(gpu.totals().live_bytes, 0);
    }
}
