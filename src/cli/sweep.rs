//! `dlf-engine sweep`.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::args::{DynamicArgs, ModelArgs, grid};
use super::eval::{EvalMethod, Prepared, TaskArgs, evaluate, report};
use crate::eval::{Chart, Point, Row, Summary};
use crate::fusion::AlphaGrid;

#[derive(Debug, Args)]
pub(crate) struct SweepArgs {
    #[command(flatten)]
    models: ModelArgs,
    /// α of static fusion, at most 32 values; STOP itself only where inclusive.
    #[arg(long, value_name = "START:STOP:STEP[:inclusive]", default_value = "0:2:0.1:inclusive", value_parser = grid,
          allow_hyphen_values = true, help_heading = "Fusion")]
    alpha: AlphaGrid,
    #[command(flatten)]
    dynamic: DynamicArgs,
    #[command(flatten)]
    task: TaskArgs,
    /// Write the picture (F.svg is overwritten): score against α, and the dynamic rule's as a line across.
    #[arg(long, value_name = "F.svg", help_heading = "Running")]
    svg: Option<std::path::PathBuf>,
    /// Write the numbers of the picture.
    #[arg(long, value_name = "F.csv", help_heading = "Running")]
    csv: Option<std::path::PathBuf>,
}

pub(super) fn run(args: &SweepArgs) -> Result<ExitCode> {
    if let Some(path) = args.svg.as_deref().filter(|path| path.extension().is_none_or(|end| end != "svg")) {
        bail!("--svg {}: the name must end in .svg", path.display());
    }
    let alphas = args.alpha.candidates();
    let mut methods = vec![EvalMethod::dynamic()];
    methods.extend(alphas.iter().map(|&alpha| EvalMethod::fixed(alpha)));
    let prepared = Prepared::new(&args.models, &args.task, &methods, |method, ensemble| {
        method.rule(&args.dynamic, &[], ensemble)
    })?;
    let summary = evaluate(&prepared, &args.task)?;
    let chart = chart(&summary, alphas).context("the sweep has no scores")?;
    if let Some(path) = &args.svg {
        write(path, &chart.svg())?;
    }
    if let Some(path) = &args.csv {
        write(path, &csv(&chart))?;
    }
    report(&summary, args.task.json)
}

/// The task's own score, which is the first metric.
fn chart(summary: &Summary, alphas: &[f64]) -> Option<Chart> {
    let metric = summary.rows.first()?.metric;
    let mut rows = summary.rows.iter().filter(|row| row.metric == metric);
    let score = |row: &Row| [row.score, row.interval.low, row.interval.high];
    let dynamic = rows.next().map(score)?;
    let points = alphas.iter().zip(rows).map(|(&alpha, row)| Point { alpha, score: score(row) }).collect();
    let n = summary.rows.first()?.n;
    Some(Chart { title: format!("{} (n = {n})", summary.task), metric: metric.to_owned(), points, dynamic })
}

fn csv(chart: &Chart) -> String {
    let mut text = format!("method,alpha,{},low,high\n", chart.metric);
    let [score, low, high] = chart.dynamic;
    let _ = writeln!(text, "dynamic,,{score},{low},{high}");
    for Point { alpha, score: [score, low, high] } in &chart.points {
        let _ = writeln!(text, "static,{alpha},{score},{low},{high}");
    }
    text
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| path.display().to_string())
}
