//! A step that is fused on the CPU allocates nothing, once the first of its kind has.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/allocator.rs"]
mod allocator;
#[path = "support/tiny.rs"]
mod tiny;

use std::sync::Arc;

use allocator::allocations;
use dlf_engine::SamplingParams;
use dlf_engine::backend::cpu::{CpuBackend, CpuOptions};
use dlf_engine::backend::{Backend, Batch, Choice, FuseRow, Limits, Row};
use dlf_engine::fusion::{DynamicRule, FusionRule, SearchMode};
use dlf_engine::kv_cache::BlockTable;

const SEQUENCES: usize = 3;

/// The only test of this file: another thread's allocations would be counted as well.
#[test]
fn a_fused_step_allocates_nothing() {
    assert!(allocations(|| drop(vec![1_u8; 100])) > 0, "the counter counts");
    let ensemble = Arc::new(tiny::ensemble(2));
    let models = ensemble.models().len();
    let limits = Limits { rows: 8, slots: SEQUENCES, blocks: SEQUENCES };
    let mut backend = CpuBackend::new(ensemble, CpuOptions { threads: 2, limits }).unwrap();
    let tables: Vec<BlockTable> =
        (0..SEQUENCES as u32).map(|block| BlockTable { blocks: vec![block] }).collect();

    let refined = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    let rules = [
        FusionRule::default(),
        refined,
        FusionRule::Static([0.5, 1.5].into_iter().collect()),
        FusionRule::Large,
    ];
    let greedy = SamplingParams::default();
    let drawn = SamplingParams {
        temperature: 0.8,
        top_k: 20,
        top_p: 0.9,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.1,
        logit_bias: vec![(3, -1.0)],
        seed: 7,
        ..SamplingParams::default()
    };
    let history: Vec<u32> = (0..8).collect();
    let mut decisions = Vec::new();
    let mut step = |position: usize| {
        let rows: Vec<Row> = (0..models)
            .flat_map(|model| {
                let of =
                    move |table| Row { model, table, position, token: 5 + table as u32, slot: Some(table) };
                (0..SEQUENCES).map(of)
            })
            .collect();
        let batch = Batch { rows: &rows, tables: &tables };
        let forward = allocations(|| {
            backend.forward(&batch).unwrap();
        });
        let mut fuse = 0;
        for rule in &rules {
            let choices = [
                Choice::Sample { params: &greedy, history: &history, generated: 4, banned: &[96] },
                Choice::Sample { params: &drawn, history: &history, generated: 4, banned: &[96] },
                Choice::Forced(11),
            ];
            let row = |(slot, choice)| FuseRow { slot, step: position, rule, held: None, choice };
            let mut numbered = choices.into_iter().enumerate().map(row);
            let rows: [FuseRow<'_>; SEQUENCES] = std::array::from_fn(|_| numbered.next().unwrap());
            fuse += allocations(|| {
                backend.fuse(&rows, &mut decisions).unwrap();
            });
            assert!(decisions.iter().all(Result::is_ok), "{decisions:?}");
        }
        (forward, fuse)
    };
    // The first step makes its working memory.
    step(0);
    for position in 1..6 {
        assert_eq!(step(position), (0, 0), "of the models and of fusion, at position {position}");
    }
}
