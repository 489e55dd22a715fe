//! The CUDA backend on the virtual device, with its sanitizers on: against the CPU, and against itself in every way a
//! batch can be cut.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init, reason = "a test; plans are lists of ranges")]

use std::ops::Range;
use std::sync::Arc;

use dlf_engine::Ensemble;
use dlf_engine::backend::Limits;
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::cuda::{CudaBackend, CudaOptions};
use dlf_engine::model::LlamaModel;
use dlf_engine::weights::Dtype;
use virtual_gpu::host::{Driver, Gpu};

#[path = "support/models.rs"]
mod models;

use models::{EVEN, ODD, Sequence, Shape, feed, mixed_ensemble};

/// Enough for every batch of these tests.
const LIMITS: Limits = Limits { rows: 200, slots: 700, blocks: 58 };

fn cuda(models: Vec<LlamaModel>) -> (Gpu, CudaBackend) {
    let gpu = Driver::load().unwrap().device("a100").unwrap();
    let ensemble = Arc::new(Ensemble::from_models(models).unwrap());
    let options = CudaOptions { ordinal: gpu.ordinal(), limits: LIMITS };
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

#[test]
fn logits_are_those_of_the_cpu() {
    let grouped = Shape { heads: 8, kv_heads: 8, head_dim: 24, hidden: 40, ..EVEN };
    // Only the order of sums differs, whatever the dtype of the weights.
    for (shape, dtype) in [(EVEN, Dtype::F32), (ODD, Dtype::Bf16), (EVEN, Dtype::F16), (grouped, Dtype::F32)]
    {
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 19);
        let (gpu, mut device) = cuda(models.clone());
        let found = feed(&mut device, &sequences, &whole(&sequences));
        let expected = feed(&mut cpu(models), &sequences, &whole(&sequences));
        assert_eq!(gpu.reports(), []);
        assert_eq!(found.len(), expected.len());
        let mut worst = 0.0_f64;
        for (row, expected) in &expected {
            let numbers =
                |bits: &[u32]| log_softmax(&bits.iter().map(|&x| f32::from_bits(x)).collect::<Vec<_>>());
            let pairs = numbers(&found[row]).into_iter().zip(numbers(expected));
            worst = pairs.map(|(a, b)| (a - b).abs()).fold(worst, f64::max);
        }
        assert!(worst < 2e-5, "{shape:?} {dtype:?}: {worst:e}");
    }
}

#[test]
fn rows_do_not_depend_on_their_batch() {
    for (shape, dtype) in [(EVEN, Dtype::Bf16), (ODD, Dtype::F32)] {
        let (models, sequences) = shortened(mixed_ensemble(shape, dtype), 6);
        let (gpu, mut together) = cuda(models.clone());
        let expected = feed(&mut together, &sequences, &whole(&sequences));
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
fn a_long_context_is_split() {
    let (models, sequences) = shortened(mixed_ensemble(EVEN, Dtype::F16), 300);
    let (models, sequences) = (vec![models[0].clone()], sequences.into_iter().take(1).collect::<Vec<_>>());
    // 300 positions are two splits of attention.
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
