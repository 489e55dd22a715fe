//! The search for α: written plainly, and as the engine does it.
//!
//! `cargo bench --bench fusion`. Both run on one thread, compiled with the same flags, in one process: compare
//! the columns of one run. `plain` is what a straightforward implementation does for each candidate: fused
//! logits, log-softmax, two KL divergences; `one_pass` is the whole of [`Fuser::fuse`], with the fused row, the
//! argmax and all log-probabilities on top.

use divan::{Bencher, black_box};
use dlf_engine::backend::cpu::fuse::{Fuser, sequential};
use dlf_engine::backend::{Choice, FuseRow};
use dlf_engine::fusion::{DynamicRule, FusionRule, Logits, SearchMode};

#[path = "support/plain.rs"]
mod plain;

use plain::{Models, search as plain_search};

const SIZES: [(usize, usize); 6] =
    [(32_000, 1), (32_000, 4), (49_152, 1), (49_152, 4), (128_256, 1), (128_256, 4)];

fn main() {
    divan::main();
}

fn logits(models: &Models) -> Logits<'_> {
    Logits {
        large: Some(&models.large),
        small: Some(&models.small),
        experts: models.experts.iter().map(Vec::as_slice).collect(),
    }
}

fn search(bencher: Bencher<'_, '_>, size: (usize, usize), rule: DynamicRule, mut fuser: Fuser) {
    let models = Models::new(size.0, size.1);
    let rule = FusionRule::Dynamic(rule);
    let row = FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: Choice::Forced(1) };
    let mut decisions = Vec::new();
    bencher.bench_local(|| {
        fuser.fuse(&mut sequential, black_box(&[row]), &|_| logits(&models), &mut decisions);
        decisions.len()
    });
}

#[divan::bench(args = SIZES)]
fn one_pass(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    search(bencher, size, DynamicRule::default(), Fuser::new());
}

#[divan::bench(args = SIZES)]
fn refined(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    search(bencher, size, DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() }, Fuser::new());
}

/// Each instruction set that this CPU has.
#[divan::bench(args = Fuser::every().map(|fuser| fuser.instructions()))]
fn one_pass_with(bencher: Bencher<'_, '_>, instructions: &str) {
    let named = Fuser::every().find(|fuser| fuser.instructions() == instructions);
    search(bencher, SIZES[0], DynamicRule::default(), named.unwrap_or_default());
}

#[divan::bench(args = SIZES, sample_count = 20)]
fn plain(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    let models = Models::new(size.0, size.1);
    let rule = DynamicRule::default();
    let candidates = rule.grids[0].candidates();
    bencher.bench_local(|| plain_search(black_box(&models), candidates));
}
