//! `dlf-engine bench`: what fusion, decoding and reading a prompt cost, on this machine.

mod bandwidth;
mod engine;
mod fusion;
mod models;
#[path = "../../benches/support/plain.rs"]
mod plain;
mod report;
mod shapes;
mod target;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};

use report::Record;
use target::{Target, TargetArgs};

use super::args::positive;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The search for α and the choice of the token: one fused pass beside one operation after another.
    Fusion(fusion::FusionBenchArgs),
    /// Tokens after one another, `tg128` as llama-bench calls it: all models and fusion.
    Decode(models::DecodeArgs),
    /// The reading of a prompt, `pp512`.
    Prefill(models::PrefillArgs),
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Md,
    Csv,
    Json,
    Jsonl,
}

/// What all benchmarks take.
#[derive(Debug, Args)]
struct Common {
    /// Measurements of each case.
    #[arg(long, short, value_name = "N", default_value = "5", value_parser = positive::<u16>)]
    repetitions: u16,
    /// Runs of each case before them, which aren't measured.
    #[arg(long, value_name = "N", default_value = "1")]
    warm_up: u16,
    /// How results are written.
    #[arg(long, short, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    targets: TargetArgs,
}

impl Common {
    /// What `work` tells of each of `repetitions`, after the runs that warm up.
    fn repeat<T>(&self, repetitions: u16, mut work: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
        for _ in 0..self.warm_up {
            work()?;
        }
        (0..repetitions).map(|_| work()).collect()
    }
}

/// Runs the benchmarks and prints a row for each case.
pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    let common = match &args.what {
        What::Fusion(args) => &args.common,
        What::Decode(args) => &args.models.common,
        What::Prefill(args) => &args.models.common,
    };
    let mut targets = common.targets.measure()?;
    let mut records = Vec::new();
    let mut add = |record: Record| {
        if matches!(common.output, Format::Jsonl) {
            // As they come.
            let mut stdout = io::stdout().lock();
            writeln!(stdout, "{}", record.to_json()).and_then(|()| stdout.flush())?;
        }
        records.push(record);
        anyhow::Ok(())
    };
    match &args.what {
        What::Fusion(args) => fusion::run(args, &mut targets, &mut add)?,
        What::Decode(args) => models::decode(args, &mut targets, &mut add)?,
        What::Prefill(args) => models::prefill(args, &mut targets, &mut add)?,
    }
    let text = match common.output {
        Format::Md => report::markdown(&records),
        Format::Csv => report::csv(&records)?,
        Format::Json => report::json(&records)?,
        Format::Jsonl => String::new(),
    };
    io::stdout().lock().write_all(text.as_bytes())?;
    Ok(ExitCode::SUCCESS)
}
