//! `dlf-engine bench`: what fusion, decoding and reading a prompt cost, on this machine.

mod bandwidth;
mod fusion;
mod models;
#[path = "../../benches/support/plain.rs"]
mod plain;
mod report;
mod shapes;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Subcommand, ValueEnum};

use super::args::DeviceArgs;
use bandwidth::Bandwidth;
use report::Record;

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
    /// Measurements of each case, after one that warms up.
    #[arg(long, short, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u16).range(1..))]
    repetitions: u16,
    /// How results are written.
    #[arg(long, short, value_name = "FORMAT", default_value = "md")]
    output: Format,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the benchmarks and prints a row for each case.
pub(crate) fn run(args: &BenchArgs) -> Result<ExitCode> {
    let common = match &args.what {
        What::Fusion(args) => &args.common,
        What::Decode(args) => &args.models.common,
        What::Prefill(args) => &args.models.common,
    };
    let bandwidth = Bandwidth::measure(&common.device)?;
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
        What::Fusion(args) => fusion::run(args, bandwidth, &mut add)?,
        What::Decode(args) => models::decode(args, bandwidth, &mut add)?,
        What::Prefill(args) => models::prefill(args, bandwidth, &mut add)?,
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
