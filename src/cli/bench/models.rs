//! Whole models: tokens after one another, and prompts.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::engine::Engine;
use super::report::{Record, Samples, mean_and_deviation};
use super::shapes::{Pair, pair};
use super::{Common, Target};
use crate::backend::{Backend, Batch, Choice, FuseRow, Limits, Row};
use crate::cli::args::{Method, ModelArgs, positive};
use crate::ensemble::Ensemble;
use crate::fusion::FusionRule;
use crate::generate::blocks_needed;
use crate::kv_cache::{BLOCK_SIZE, BlockTable};
use crate::sampling::SamplingParams;
use crate::weights::Dtype;

#[derive(Debug, Args)]
pub(super) struct ModelBenchArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// Random weights of a published shape: LARGE or LARGE+SMALL, as llama-2-13b+tinyllama-1.1b.
    #[arg(long, value_name = "NAME,…", value_delimiter = ',', value_parser = parse_pair, conflicts_with_all = ["large", "small", "experts"])]
    shape: Vec<Pair>,
    /// Experts of the small shape.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "1", requires = "shape", value_parser = clap::value_parser!(u8).range(1..=8))]
    num_experts: Vec<u8>,
    /// Of the random weights: f32, f16, bf16.
    #[arg(long, value_name = "DTYPE,…", value_delimiter = ',', default_value = "bf16", requires = "shape", value_parser = parse_dtype)]
    dtype: Vec<Dtype>,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Debug, Args)]
pub(super) struct DecodeArgs {
    #[command(flatten)]
    pub(super) models: ModelBenchArgs,
    /// Tokens to generate.
    #[arg(long, short = 'n', value_name = "N,…", value_delimiter = ',', default_value = "128", value_parser = positive::<u32>)]
    generate: Vec<u32>,
    /// Tokens before the first one. The cache is there, and holds zeros.
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<u32>,
    /// Sequences decoded together.
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', default_value = "1", value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: Vec<u16>,
}

#[derive(Debug, Args)]
pub(super) struct PrefillArgs {
    #[command(flatten)]
    pub(super) models: ModelBenchArgs,
    /// Tokens of the prompt [default: 512, of the demo ensemble 128].
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', value_parser = positive::<u32>)]
    prompt: Vec<u32>,
    /// Tokens before it. The cache is there, and holds zeros.
    #[arg(long, short, value_name = "N,…", value_delimiter = ',', default_value = "0")]
    depth: Vec<u32>,
}

fn parse_pair(text: &str) -> Result<Pair, String> {
    pair(text).map_err(|error| error.to_string())
}

fn parse_dtype(text: &str) -> Result<Dtype, String> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16]
        .into_iter()
        .find(|dtype| dtype.to_string().eq_ignore_ascii_case(text))
        .ok_or_else(|| format!("expected f32, f16 or bf16, found {text:?}"))
}

/// An ensemble and what it is called.
struct Subject {
    name: String,
    ensemble: Arc<Ensemble>,
}

impl ModelBenchArgs {
    /// Calls `bench` with each ensemble that is asked for, one after another.
    fn each(&self, context: usize, mut bench: impl FnMut(&Subject) -> Result<()>) -> Result<()> {
        if self.shape.is_empty() {
            let ensemble = Arc::new(self.models.load(&Method::Dynamic)?);
            let name = if self.models.is_demo() {
                named(vec!["demo".to_owned()], 0, &ensemble)
            } else {
                let directories = [&self.models.large, &self.models.small].into_iter().flatten();
                let names = directories.map(|path| directory_name(path)).collect();
                named(names, ensemble.num_experts(), &ensemble)
            };
            return bench(&Subject { name, ensemble });
        }
        for &pair in &self.shape {
            for &dtype in &self.dtype {
                let experts = if pair.small.is_some() { self.num_experts.as_slice() } else { &[0] };
                for &experts in experts {
                    let models = pair.models(dtype, experts.into(), context)?;
                    let ensemble = Arc::new(Ensemble::from_models(models)?);
                    bench(&Subject { name: named(vec![pair.name()], experts.into(), &ensemble), ensemble })?;
                }
            }
        }
        Ok(())
    }
}

/// The last part of a path, or all of one that ends in dots.
fn directory_name(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// `models` with the number of experts, and the dtypes of an ensemble's weights: `large+small+2 experts f16`.
fn named(mut models: Vec<String>, experts: usize, ensemble: &Ensemble) -> String {
    let mut dtypes: Vec<&str> = Vec::new();
    for dtype in ensemble.models().iter().map(|model| model.dtype().name()) {
        if !dtypes.contains(&dtype) {
            dtypes.push(dtype);
        }
    }
    match experts {
        0 => {}
        1 => models.push("1 expert".to_owned()),
        more => models.push(format!("{more} experts")),
    }
    format!("{} {}", models.join("+"), dtypes.join("+"))
}

impl Common {
    /// Times `work` after runs that warm up, each time over flushed caches on a GPU; launches are those of the last
    /// run. Without a clock one run after those that warm up is counted.
    fn samples(
        &self,
        target: &mut Target,
        engine: &mut Engine,
        mut work: impl FnMut(&mut dyn Backend) -> Result<()>,
    ) -> Result<Samples> {
        let mut launches = 0;
        let repetitions = if target.bandwidth.has_clock() { self.repetitions } else { 1 };
        let seconds = self.repeat(repetitions, || {
            engine.settle()?;
            target.flush()?;
            let before = engine.backend().launches();
            let seconds = engine.time(&mut work)?;
            launches = engine.backend().launches() - before;
            Ok(seconds)
        })?;
        Ok(Samples { seconds: seconds.into_iter().flatten().collect(), launches })
    }
}

/// The columns that both benchmarks share. `steps` is how often all weights are read; 0 where that isn't the limit.
fn record(
    (subject, test, target): (&Subject, String, &Target),
    (tokens, steps): (usize, usize),
    samples: &Samples,
) -> Record {
    let rates: Vec<f64> = samples.seconds.iter().map(|seconds| tokens as f64 / seconds).collect();
    let time = |samples: &[f64]| (!samples.is_empty()).then(|| mean_and_deviation(samples));
    let (rate, seconds) = (time(&rates), time(&samples.seconds).map(|(mean, _)| mean));
    let bytes = subject.ensemble.memory().weight_bytes;
    let read = seconds.filter(|_| steps > 0).map(|seconds| (bytes * steps) as f64 / seconds);
    let share = read.zip(target.bandwidth.bytes_per_second()).map(|(read, limit)| 100.0 * read / limit);
    let launches = target.device.gpu().map(|_| samples.launches as f64 / tokens as f64);
    Record::default()
        .with("model", subject.name.clone())
        .with("MiB", bytes as f64 / f64::from(1 << 20))
        .with("device", target.name.clone())
        .with("test", test)
        .with("tokens/s", rate.map(|(mean, _)| mean))
        .with("±", rate.and_then(|(_, deviation)| deviation))
        .with("ms/token", seconds.map(|seconds| 1e3 * seconds / tokens as f64))
        .with("GB/s", read.map(|read| read / 1e9))
        .with("% of memory", share)
        .with("launches/token", launches)
}

fn depth_name(depth: usize) -> String {
    if depth == 0 { String::new() } else { format!(" @ d{depth}") }
}

/// One block table a sequence, each of `blocks` blocks.
fn tables(sequences: usize, blocks: usize) -> Vec<BlockTable> {
    let table =
        |sequence: usize| (sequence * blocks..(sequence + 1) * blocks).map(|block| block as u32).collect();
    (0..sequences).map(|sequence| BlockTable { blocks: table(sequence) }).collect()
}

/// Measures `tgN @ dD`, for each size of the batch.
pub(super) fn decode(
    args: &DecodeArgs,
    targets: &mut [Target],
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let most = |numbers: &[u32]| numbers.iter().copied().max().unwrap_or(0) as usize;
    args.models.each(most(&args.depth) + most(&args.generate) + 1, |subject| {
        for target in &mut *targets {
            for &depth in &args.depth {
                for &generate in &args.generate {
                    for &batch in &args.batch {
                        let (depth, generate, batch) =
                            (depth as usize, generate as usize, usize::from(batch));
                        let samples = decode_samples(args, (subject, target), (depth, generate, batch))?;
                        let sequences = if batch > 1 { format!(" × {batch}") } else { String::new() };
                        let test = format!("tg{generate}{}{sequences}", depth_name(depth));
                        add(record((subject, test, target), (generate * batch, generate), &samples))?;
                    }
                }
            }
        }
        Ok(())
    })
}

fn decode_samples(
    args: &DecodeArgs,
    (subject, target): (&Subject, &mut Target),
    (depth, generate, batch): (usize, usize, usize),
) -> Result<Samples> {
    let ensemble = &subject.ensemble;
    let blocks = blocks_needed(1, depth + generate);
    check_context(ensemble, depth + generate)?;
    let limits = Limits { rows: batch, slots: batch, blocks: batch * blocks };
    let mut engine = Engine::open(target.device.backend(limits), ensemble)?;
    let tables = tables(batch, blocks);
    args.models
        .common
        .samples(target, &mut engine, |backend| steps(backend, ensemble, &tables, depth..depth + generate))
}

/// Decodes a token at each of `positions` for the sequence of every table.
fn steps(
    backend: &mut dyn Backend,
    ensemble: &Ensemble,
    tables: &[BlockTable],
    positions: Range<usize>,
) -> Result<()> {
    let rule = if ensemble.num_experts() > 0 { FusionRule::default() } else { FusionRule::Large };
    let params = SamplingParams::default();
    let batch = tables.len();
    let mut tokens: Vec<u32> = (0..batch as u32).collect();
    let mut decisions = Vec::new();
    for (step, position) in positions.enumerate() {
        let row =
            |model, table: usize| Row { model, table, position, token: tokens[table], slot: Some(table) };
        let models = 0..ensemble.models().len();
        let rows: Vec<Row> = models
            .flat_map(|model| (0..batch).map(move |table| (model, table)))
            .map(|(m, t)| row(m, t))
            .collect();
        backend.forward(&Batch { rows: &rows, tables })?;
        let choice = Choice::Sample { params: &params, history: &[], generated: 0, banned: &[] };
        let fuse = |slot| FuseRow { slot, step, rule: &rule, held: None, choice };
        let fused: Vec<FuseRow<'_>> = (0..batch).map(fuse).collect();
        backend.fuse(&fused, &mut decisions)?;
        for (token, decision) in tokens.iter_mut().zip(decisions.drain(..)) {
            *token = decision.context("a step of the benchmark")?.token;
        }
    }
    Ok(())
}

/// Measures `ppN @ dD`.
pub(super) fn prefill(
    args: &PrefillArgs,
    targets: &mut [Target],
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let most = |numbers: &[u32]| numbers.iter().copied().max().unwrap_or(0) as usize;
    let is_demo = args.models.shape.is_empty() && args.models.models.is_demo();
    let prompts = match &args.prompt[..] {
        [] if is_demo => &[128],
        [] => &[512],
        given => given,
    };
    args.models.each(most(&args.depth) + most(prompts), |subject| {
        for target in &mut *targets {
            for &depth in &args.depth {
                for &prompt in prompts {
                    let (depth, prompt) = (depth as usize, prompt as usize);
                    let samples = prefill_samples(args, (subject, target), (depth, prompt))?;
                    let test = format!("pp{prompt}{}", depth_name(depth));
                    add(record((subject, test, target), (prompt, 0), &samples))?;
                }
            }
        }
        Ok(())
    })
}

fn prefill_samples(
    args: &PrefillArgs,
    (subject, target): (&Subject, &mut Target),
    (depth, prompt): (usize, usize),
) -> Result<Samples> {
    const CHUNK: usize = 512;
    let ensemble = &subject.ensemble;
    check_context(ensemble, depth + prompt)?;
    let blocks = (depth + prompt).div_ceil(BLOCK_SIZE);
    let limits = Limits { rows: CHUNK, slots: 1, blocks };
    let mut engine = Engine::open(target.device.backend(limits), ensemble)?;
    let tables = tables(1, blocks);
    let vocab_size = ensemble.vocab_size();
    let row = |model, position: usize| Row {
        model,
        table: 0,
        position,
        token: (position * 7919 % vocab_size) as u32,
        slot: (position + 1 == depth + prompt).then_some(0),
    };
    args.models.common.samples(target, &mut engine, |backend| {
        for first in (depth..depth + prompt).step_by(CHUNK) {
            let last = (first + CHUNK).min(depth + prompt);
            let models = 0..ensemble.models().len();
            let rows: Vec<Row> = models
                .flat_map(|model| (first..last).map(move |p| (model, p)))
                .map(|(m, p)| row(m, p))
                .collect();
            backend.forward(&Batch { rows: &rows, tables: &tables })?;
        }
        Ok(())
    })
}

fn check_context(ensemble: &Ensemble, tokens: usize) -> Result<()> {
    let context = (0..ensemble.models().len()).map(|model| ensemble.context(model)).min().unwrap_or(0);
    if tokens > context {
        bail!("{tokens} tokens, and the models know {context} positions");
    }
    Ok(())
}

#[cfg(test)]
#[cfg(feature = "cuda")]
mod tests;
