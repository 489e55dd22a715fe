//! Fusion alone: the one pass of the engine beside the search written plainly.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;

use super::Common;
use super::bandwidth::{Bandwidth, device_name};
use super::plain::{self, Models};
use super::report::{Record, Samples, mean_and_deviation};
use super::shapes::{Pair, narrow, pair};
use crate::backend::cpu::CpuFusion;
use crate::backend::cpu::available_threads;
use crate::backend::{Batch, Choice, FuseRow, Limits, Row};
use crate::ensemble::Ensemble;
use crate::fusion::{AlphaGrid, DynamicRule, FusionRule, LogitsRows, ModelLogits};
use crate::kv_cache::BlockTable;
use crate::model::Role;
use crate::weights::Dtype;

#[derive(Debug, Args)]
pub(super) struct FusionBenchArgs {
    /// Sizes of the vocabulary.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "32000,128256", value_parser = clap::value_parser!(u32).range(2..=1 << 20))]
    vocab: Vec<u32>,
    /// Experts.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1,4", value_parser = clap::value_parser!(u8).range(1..=8))]
    experts: Vec<u8>,
    /// Candidates of α for each expert.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "20", value_parser = clap::value_parser!(u8).range(2..=32))]
    candidates: Vec<u8>,
    /// Sequences.
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: Vec<u16>,
    /// The step that a share is of: bf16 weights of these shapes, read once at the speed of memory.
    #[arg(long, value_name = "LARGE+SMALL", default_value = "llama-2-13b+tinyllama-1.1b", value_parser = |text: &str| pair(text).map_err(|e| e.to_string()))]
    step: Pair,
    #[command(flatten)]
    pub(super) common: Common,
}

/// One case.
#[derive(Clone, Copy)]
struct Case {
    vocab: usize,
    experts: usize,
    candidates: usize,
    batch: usize,
}

/// Measures every combination of the lists.
pub(super) fn run(
    args: &FusionBenchArgs,
    bandwidth: Bandwidth,
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    for &vocab in &args.vocab {
        for &experts in &args.experts {
            for &candidates in &args.candidates {
                for &batch in &args.batch {
                    let case = Case {
                        vocab: vocab as usize,
                        experts: experts.into(),
                        candidates: candidates.into(),
                        batch: batch.into(),
                    };
                    measure(args, case, bandwidth, add)?;
                }
            }
        }
    }
    Ok(())
}

fn measure(
    args: &FusionBenchArgs,
    case: Case,
    bandwidth: Bandwidth,
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let rule = rule(case.candidates)?;
    let threads = args.common.device.threads().unwrap_or_else(available_threads);
    let fused = match args.common.device.gpu() {
        Some(_) => on_gpu(args, case, &rule)?,
        None => on_cpu(args, case, &rule, threads)?,
    };
    // The plain search has one thread, so it stands beside one thread only.
    let plain = match args.common.device.gpu() {
        None if threads == 1 => Some(plainly(args, case, &rule)),
        _ => None,
    };
    let (mean, deviation) = mean_and_deviation(&fused.seconds);
    let clock = |value: f64| bandwidth.has_clock().then_some(value);
    let step =
        bandwidth.bytes_per_second().map(|limit| args.step.bytes(Dtype::Bf16, case.experts) as f64 / limit);
    let device = device_name(&args.common.device);
    add(Record::default()
        .with("vocab", case.vocab)
        .with("experts", case.experts)
        .with("candidates", case.candidates)
        .with("batch", case.batch)
        .with("device", device)
        .with("µs", clock(1e6 * mean))
        .with("±", deviation.and_then(|deviation| clock(1e6 * deviation)))
        .with("plain µs", plain.map(|plain| 1e6 * plain))
        .with("times faster", plain.map(|plain| plain / mean))
        .with("MB of logits", ((2 + case.experts) * case.vocab * 4 * case.batch) as f64 / 1e6)
        .with("launches", fused.launches)
        .with("% of a step", step.and_then(|step| clock(100.0 * mean / step))))
}

/// The dynamic rule over candidates from 0 to 2, the last excluded.
fn rule(candidates: usize) -> Result<FusionRule> {
    let grid = AlphaGrid::new(0.0, 2.0, 2.0 / candidates as f64, false)?;
    Ok(FusionRule::Dynamic(DynamicRule { grids: std::iter::once(grid).collect(), ..DynamicRule::default() }))
}

fn rows<'a>(case: Case, rule: &'a FusionRule) -> Vec<FuseRow<'a>> {
    (0..case.batch)
        .map(|slot| FuseRow { slot, step: 0, rule, held: None, choice: Choice::Forced(1) })
        .collect()
}

fn on_cpu(args: &FusionBenchArgs, case: Case, rule: &FusionRule, threads: usize) -> Result<Samples> {
    let models = Models::new(case.vocab * case.batch, case.experts);
    let logits = ModelLogits {
        large: Some(LogitsRows::new(&models.large, case.vocab)?),
        small: Some(LogitsRows::new(&models.small, case.vocab)?),
        experts: models.experts.iter().map(|e| LogitsRows::new(e, case.vocab)).collect::<Result<_, _>>()?,
    };
    let mut fusion = CpuFusion::new(threads)?;
    let (rows, mut decisions) = (rows(case, rule), Vec::new());
    let mut once = || {
        // Single passes are shorter than the clock is good for.
        const PASSES: u32 = 20;
        let start = Instant::now();
        for _ in 0..PASSES {
            fusion.fuse(&logits, &rows, &mut decisions)?;
        }
        anyhow::Ok(start.elapsed().as_secs_f64() / f64::from(PASSES))
    };
    once()?;
    let seconds = (0..args.common.repetitions).map(|_| once()).collect::<Result<_>>()?;
    Ok(Samples { seconds, launches: 0 })
}

/// Through the backend, launch and copy of the results included. Logits are where a step leaves them: just written.
fn on_gpu(args: &FusionBenchArgs, case: Case, rule: &FusionRule) -> Result<Samples> {
    let roles: Vec<Role> =
        [Role::Large, Role::Small].into_iter().chain((0..case.experts).map(Role::Expert)).collect();
    let shape = narrow(case.vocab);
    let models = roles.iter().map(|&role| shape.model(role, Dtype::Bf16, 16)).collect::<Result<_>>()?;
    let ensemble = Arc::new(Ensemble::from_models(models)?);
    let limits = Limits { rows: case.batch, slots: case.batch, blocks: case.batch };
    let mut backend = args.common.device.backend(limits).open(ensemble)?;
    let tables: Vec<BlockTable> =
        (0..case.batch).map(|block| BlockTable { blocks: vec![block as u32] }).collect();
    let row =
        |model, table: usize| Row { model, table, position: 0, token: table as u32 % 2, slot: Some(table) };
    let batch: Vec<Row> =
        (0..roles.len()).flat_map(|model| (0..case.batch).map(move |table| row(model, table))).collect();
    let (rows, mut decisions) = (rows(case, rule), Vec::new());
    let mut samples = Samples { seconds: Vec::new(), launches: 0 };
    for repetition in 0..=args.common.repetitions {
        backend.forward(&Batch { rows: &batch, tables: &tables })?;
        let before = backend.launches();
        let start = Instant::now();
        backend.fuse(&rows, &mut decisions)?;
        if repetition > 0 {
            samples.seconds.push(start.elapsed().as_secs_f64());
        }
        samples.launches = backend.launches() - before;
        decisions.drain(..).collect::<Result<Vec<_>, _>>().context("a row of the benchmark")?;
    }
    Ok(samples)
}

/// The mean seconds of the plain search, for all rows.
fn plainly(args: &FusionBenchArgs, case: Case, rule: &FusionRule) -> f64 {
    let models = Models::new(case.vocab, case.experts);
    let FusionRule::Dynamic(dynamic) = rule else { return f64::NAN };
    let candidates = dynamic.grids[0].candidates();
    let once = || {
        let start = Instant::now();
        std::hint::black_box(plain::search(&models, candidates));
        start.elapsed().as_secs_f64() * case.batch as f64
    };
    let seconds: Vec<f64> = (0..=args.common.repetitions).map(|_| once()).skip(1).collect();
    mean_and_deviation(&seconds).0
}
