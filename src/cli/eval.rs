//! `dlf-engine eval`.

mod args;
mod merge;
mod plan;
mod store;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

pub(super) use args::{EvalArgs, EvalMethod, TaskArgs};
pub(super) use plan::Prepared;
use store::Store;

use super::args::Method;
use super::generate::progress_bar;
use super::interrupt::Interrupt;
use super::setup::note;
use crate::eval::{MethodScores, Runner, Summary};
use crate::fusion::FusionRule;

pub(super) fn run(args: &EvalArgs) -> Result<ExitCode> {
    if let Some(args::EvalCommand::Merge(args)) = &args.command {
        return merge::run(args);
    }
    ensure!(!args.method.is_empty(), "--method: none");
    let methods: Vec<&Method> = args.method.iter().map(|method| &method.method).collect();
    note(args.task.quiet, args.dynamic.moot(&args.alpha, &methods));
    let prepared = Prepared::new(&args.models, &args.task, &args.method, |method, ensemble| {
        method.rule(&args.dynamic, &args.alpha, ensemble)
    })?;
    let summary = evaluate(&prepared, &args.task)?;
    report(&summary, args.task.json)
}

/// Runs every method, and writes what the flags ask for.
pub(super) fn evaluate(prepared: &Prepared, args: &TaskArgs) -> Result<Summary> {
    let plan = prepared.plan(args);
    let (longest, requests) = plan.check()?;
    let store = Store::open(args.output.as_deref(), args.resume, prepared.info(args))?;
    // What earlier runs left is checked before any of it is gone on with.
    let labels: Vec<&str> = prepared.methods.iter().map(|(label, _)| label.as_str()).collect();
    let mut files = store.methods(&labels, &prepared.indices, plan.task.metrics())?;
    args.device.note_fallback(args.quiet);
    let stop = Interrupt::new(args.output.is_some() && !args.quiet)?;
    let mut all = Vec::new();
    for ((label, rule), file) in prepared.methods.iter().zip(&mut files) {
        let rule: &FusionRule = rule;
        let bar =
            if args.quiet { indicatif::ProgressBar::hidden() } else { progress_bar(prepared.indices.len())? };
        bar.set_position(file.done() as u64);
        stop.watch(&bar, &format!("{label}: "));
        if file.done() < prepared.indices.len() {
            let runner = Runner { plan, rule, batch_size: args.batch_size.into() };
            let generator = prepared.generator(args, longest, requests)?;
            runner.run(generator, file.done(), |result, time| -> Result<()> {
                if let Some(error) = &result.error {
                    let place = prepared.place(result.index);
                    bar.suspend(|| writeln!(io::stderr(), "error: {label}: {place}: {error}"))?;
                }
                bar.inc(1);
                file.push(&result, time)
            })?;
        }
        bar.finish_and_clear();
        all.push(file.take_scores());
    }
    let summary = Summary::new(plan.task.name(), plan.task.metrics(), &all);
    store.write_summary(&summary)?;
    Ok(summary)
}

/// Prints the table; a sample without a result is a failure of the run.
pub(super) fn report(summary: &Summary, json: bool) -> Result<ExitCode> {
    let text = if json { format!("{}\n", serde_json::to_string(summary)?) } else { summary.table() };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("stdout")?;
    let failed = summary.rows.iter().any(|row| row.failed > 0);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The scores of no method yet.
fn no_scores(label: &str) -> MethodScores {
    MethodScores { method: label.to_owned(), ..MethodScores::default() }
}
