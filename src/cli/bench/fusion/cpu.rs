//! Fusion on the CPU: the one pass of the engine beside the search written plainly.

use std::time::Instant;

use anyhow::{Result, bail};

use super::{Caches, Case, FusionBenchArgs, Measured, Search, rows};
use crate::backend::cpu::{CpuFusion, available_threads};
use crate::cli::bench::Target;
use crate::cli::bench::plain::{self, Models};
use crate::fusion::{FusionRule, LogitsRows, ModelLogits};

/// Measures what is asked for.
pub(super) fn measure(
    args: &FusionBenchArgs,
    case: Case,
    rule: &FusionRule,
    target: &Target,
) -> Result<Vec<Measured>> {
    let threads = target.device.threads().unwrap_or_else(available_threads);
    let searches = args.searches(&[Search::Fused, Search::Loop]);
    if searches.contains(&Search::Broadcast) {
        bail!("--search broadcast is for GPUs: on a CPU candidates follow one another");
    }
    let mut measured = Vec::new();
    for search in searches {
        let seconds = match search {
            Search::Fused => fused(args, case, rule, threads)?,
            _ => plainly(args, case, rule, threads)?,
        };
        measured.push(Measured { search, caches: Caches::Warm, seconds, launches: None, bytes: None });
    }
    Ok(measured)
}

fn fused(args: &FusionBenchArgs, case: Case, rule: &FusionRule, threads: usize) -> Result<Vec<f64>> {
    let models = Models::new(case.vocab * case.batch, case.experts);
    let logits = ModelLogits {
        large: Some(LogitsRows::new(&models.large, case.vocab)?),
        small: Some(LogitsRows::new(&models.small, case.vocab)?),
        experts: models.experts.iter().map(|e| LogitsRows::new(e, case.vocab)).collect::<Result<_, _>>()?,
    };
    let mut fusion = CpuFusion::new(threads)?;
    let (rows, mut decisions) = (rows(case, rule), Vec::new());
    args.common.repeat(args.common.repetitions, || {
        // Single passes are shorter than the clock is good for.
        const PASSES: u32 = 20;
        let start = Instant::now();
        for _ in 0..PASSES {
            fusion.fuse(&logits, &rows, &mut decisions)?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(PASSES))
    })
}

/// Rows are shared out among the threads; where there are fewer, the candidates of each row are, and every thread computes
/// what they have in common.
fn plainly(args: &FusionBenchArgs, case: Case, rule: &FusionRule, threads: usize) -> Result<Vec<f64>> {
    let rows: Vec<Models> = (0..case.batch).map(|_| Models::new(case.vocab, case.experts)).collect();
    let FusionRule::Dynamic(dynamic) = rule else { bail!("only the dynamic rule searches") };
    let candidates = dynamic.grids[0].candidates();
    let search = |rows: &[Models], candidates: &[f64]| {
        for row in rows {
            std::hint::black_box(plain::search(row, candidates));
        }
    };
    args.common.repeat(args.common.repetitions, || {
        let start = Instant::now();
        if threads == 1 {
            search(&rows, candidates);
        } else if rows.len() >= threads {
            share(threads, &rows, &|rows| search(rows, candidates));
        } else {
            for row in rows.chunks(1) {
                share(threads, candidates, &|candidates| search(row, candidates));
            }
        }
        Ok(start.elapsed().as_secs_f64())
    })
}

/// Gives each thread its part of `items`.
fn share<T: Sync>(threads: usize, items: &[T], work: &(dyn Fn(&[T]) + Sync)) {
    std::thread::scope(|scope| {
        for part in items.chunks(items.len().div_ceil(threads)) {
            scope.spawn(move || work(part));
        }
    });
}
