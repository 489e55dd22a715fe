//! Fusion alone: the one pass of the engine beside the search as one operation after another.

mod cpu;
#[cfg(feature = "cuda")]
mod gpu;
#[cfg(feature = "cuda")]
mod unfused;

use std::fmt;

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::report::{Record, mean_and_deviation};
use super::shapes::{Pair, pair};
use super::{Common, Target};
use crate::backend::{Choice, FuseRow};
use crate::fusion::{AlphaGrid, DynamicRule, FusionRule};
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
    /// fused: the engine's one pass; loop: one operation after another, candidate by candidate; broadcast: all
    /// candidates of an expert in one tensor [default: all that the device has; broadcast is a GPU's].
    #[arg(long, value_name = "fused|loop|broadcast,…", value_delimiter = ',', hide_possible_values = true)]
    search: Vec<Search>,
    /// What the caches of a GPU hold when a search begins: flushed: nothing of it; warm: what the same search has left,
    /// as after a step. Those of a CPU are warm [default: flushed].
    #[arg(long, value_name = "flushed|warm,…", value_delimiter = ',', hide_possible_values = true)]
    caches: Vec<Caches>,
    /// The steps that shares are of: bf16 weights of these shapes, read once at the speed of memory.
    #[arg(long, value_name = "LARGE+SMALL,…", value_delimiter = ',', default_value = "llama-2-13b+tinyllama-1.1b", value_parser = |text: &str| pair(text).map_err(|e| e.to_string()))]
    step: Vec<Pair>,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Search {
    Fused,
    Loop,
    Broadcast,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Caches {
    Flushed,
    Warm,
}

/// How the unfused search goes over the candidates of an expert.
#[cfg(feature = "cuda")]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// One after another.
    Loop,
    /// All in one tensor.
    Broadcast,
}

impl fmt::Display for Search {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fused => "fused",
            Self::Loop => "loop",
            Self::Broadcast => "broadcast",
        })
    }
}

impl fmt::Display for Caches {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flushed => "flushed",
            Self::Warm => "warm",
        })
    }
}

#[cfg(feature = "cuda")]
impl Search {
    fn order(self) -> Option<Order> {
        match self {
            Self::Fused => None,
            Self::Loop => Some(Order::Loop),
            Self::Broadcast => Some(Order::Broadcast),
        }
    }
}

#[cfg(feature = "cuda")]
impl Order {
    /// Candidates of one tensor.
    fn at_once(self, case: Case) -> usize {
        match self {
            Self::Loop => 1,
            Self::Broadcast => case.candidates,
        }
    }
}

impl FusionBenchArgs {
    /// Those that are asked for, or all of the device.
    fn searches(&self, all: &[Search]) -> Vec<Search> {
        if self.search.is_empty() { all.to_vec() } else { self.search.clone() }
    }

    /// Those that are asked for.
    #[cfg(feature = "cuda")]
    fn caches(&self, default: Caches) -> Vec<Caches> {
        if self.caches.is_empty() { vec![default] } else { self.caches.clone() }
    }
}

/// One case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Case {
    vocab: usize,
    experts: usize,
    candidates: usize,
    batch: usize,
}

impl Case {
    /// Bytes of the logits.
    fn logits(self) -> usize {
        (2 + self.experts) * self.vocab * self.batch * size_of::<f32>()
    }
}

/// What one search of a case took.
struct Measured {
    search: Search,
    caches: Caches,
    /// Of each repetition; none on a device without a clock.
    seconds: Vec<f64>,
    /// Kernels, on a GPU.
    launches: Option<u64>,
    /// Bytes of device memory that were read and written, on a GPU.
    bytes: Option<usize>,
}

/// Measures every combination of the lists.
pub(super) fn run(
    args: &FusionBenchArgs,
    targets: &mut [Target],
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    for target in targets {
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
                        measure(args, case, target, add)?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn measure(
    args: &FusionBenchArgs,
    case: Case,
    target: &Target,
    add: &mut dyn FnMut(Record) -> Result<()>,
) -> Result<()> {
    let rule = rule(case.candidates)?;
    let measured = match target.device.gpu() {
        Some(ordinal) => on_gpu(args, case, &rule, (target, ordinal))?,
        None => cpu::measure(args, case, &rule, target)?,
    };
    let time =
        |measured: &Measured| (!measured.seconds.is_empty()).then(|| mean_and_deviation(&measured.seconds));
    for one in &measured {
        let fused = measured.iter().find(|other| other.search == Search::Fused && other.caches == one.caches);
        let (mean, deviation) = (time(one).map(|time| time.0), time(one).and_then(|time| time.1));
        let times_fused = mean.zip(fused.and_then(time)).map(|(mean, (fused, _))| mean / fused);
        for step in &args.step {
            let least = target
                .bandwidth
                .bytes_per_second()
                .map(|limit| step.bytes(Dtype::Bf16, case.experts) as f64 / limit);
            let share = mean.zip(least).map(|(mean, least)| 100.0 * mean / least);
            add(Record::default()
                .with("vocab", case.vocab)
                .with("experts", case.experts)
                .with("candidates", case.candidates)
                .with("batch", case.batch)
                .with("device", target.name.clone())
                .with("search", one.search.to_string())
                .with("caches", one.caches.to_string())
                .with("µs", mean.map(|mean| 1e6 * mean))
                .with("±", deviation.map(|deviation| 1e6 * deviation))
                .with("× fused", times_fused)
                .with("launches", one.launches)
                .with("MB of logits", case.logits() as f64 / 1e6)
                .with("MB moved", one.bytes.map(|bytes| bytes as f64 / 1e6))
                .with("step", step.name())
                .with("% of a step", share))?;
        }
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn on_gpu(
    args: &FusionBenchArgs,
    case: Case,
    rule: &FusionRule,
    target: (&Target, usize),
) -> Result<Vec<Measured>> {
    gpu::measure(args, case, rule, target)
}

#[cfg(not(feature = "cuda"))]
fn on_gpu(_: &FusionBenchArgs, _: Case, _: &FusionRule, _: (&Target, usize)) -> Result<Vec<Measured>> {
    anyhow::bail!("this build has no CUDA backend (feature `cuda`)")
}

/// The dynamic rule over candidates from 0 to 2, the last excluded.
fn rule(candidates: usize) -> Result<FusionRule> {
    let grid = AlphaGrid::new(0.0, 2.0, 2.0 / candidates as f64, false)?;
    Ok(FusionRule::Dynamic(DynamicRule { grids: std::iter::once(grid).collect(), ..DynamicRule::default() }))
}

/// Row b of the batch reads row b of the logits.
fn rows(case: Case, rule: &FusionRule) -> Vec<FuseRow<'_>> {
    (0..case.batch)
        .map(|slot| FuseRow { slot, step: 0, rule, held: None, choice: Choice::Forced(1) })
        .collect()
}
