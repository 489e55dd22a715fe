//! Fusion over logits that the caller owns, against the paper written literally in f64.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

use dlf_engine::backend::cpu::CpuFusion;
use dlf_engine::backend::{Choice, FuseRow};
use dlf_engine::fusion::{
    Decision, DynamicRule, FusionRule, Logits, LogitsRows, ModelLogits, PerExpert, reference,
};
use dlf_engine::{Error, Result, SamplingParams};

const ROWS: usize = 5;
const VOCAB_SIZE: usize = 3000;
const STRIDE: usize = 3008;

/// Matrices of large, small and two experts, NaN in the padding so that reading it would show.
fn matrices() -> Vec<Vec<f32>> {
    let value = |model: usize, row: usize, id: usize| {
        let at = |seed: usize| ((id * 7919 + row * 131 + seed * 104_729) % 2003) as f32 / 400.0;
        at(0) + if model > 0 { 0.3 * at(1) } else { 0.0 } + if model > 1 { 0.5 * at(model) } else { 0.0 }
    };
    let of_model = |model| {
        let padded =
            |row| (0..STRIDE).map(move |id| if id < VOCAB_SIZE { value(model, row, id) } else { f32::NAN });
        (0..ROWS).flat_map(padded).collect()
    };
    (0..4).map(of_model).collect()
}

fn rows_of(matrices: &[Vec<f32>]) -> ModelLogits<LogitsRows<'_>> {
    let rows = |model: usize| LogitsRows::with_stride(&matrices[model], ROWS, VOCAB_SIZE, STRIDE).unwrap();
    ModelLogits { large: Some(rows(0)), small: Some(rows(1)), experts: (2..4).map(rows).collect() }
}

const fn greedy(params: &SamplingParams) -> Choice<'_> {
    Choice::Sample { params, history: &[], generated: 0, banned: &[] }
}

fn fuse(threads: usize, logits: &ModelLogits<LogitsRows<'_>>, rows: &[FuseRow<'_>]) -> Vec<Result<Decision>> {
    let mut decisions = Vec::new();
    CpuFusion::new(threads).unwrap().fuse(logits, rows, &mut decisions).unwrap();
    decisions
}

#[test]
fn rows_are_decided_as_the_paper_says_on_any_number_of_threads() {
    let (matrices, params) = (matrices(), SamplingParams::default());
    let logits = rows_of(&matrices);
    let rules = [
        FusionRule::default(),
        FusionRule::Static(std::iter::once(0.7).collect()),
        FusionRule::Large,
        FusionRule::Small,
        FusionRule::Expert(1),
    ];
    for rule in &rules {
        // In another order than the matrices have them.
        let slots = [3, 0, 4, 1, 2];
        let rows = slots.map(|slot| FuseRow { slot, step: slot, rule, held: None, choice: greedy(&params) });
        let decisions = fuse(1, &logits, &rows);
        for (row, decision) in rows.iter().zip(&decisions) {
            let of = |model: usize| &matrices[model][row.slot * STRIDE..row.slot * STRIDE + VOCAB_SIZE];
            let experts: PerExpert<&[f32]> = (2..4).map(of).collect();
            let exact = Logits { large: Some(of(0)), small: Some(of(1)), experts };
            let exact = reference::decide(&exact, rule, None, row.step).unwrap();
            let decision = decision.as_ref().unwrap();
            assert_eq!((decision.expert, &decision.alpha), (exact.expert, &exact.alpha), "{rule:?}");
            // The tolerance of tests/fusion.rs: sums of f32 terms.
            let exact_logprob = exact.fused[decision.token as usize];
            let most = exact.fused.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!(most - exact_logprob < 1e-5, "{rule:?}: {decision:?}");
            let error = (decision.logprob_fused - exact_logprob).abs();
            assert!(error < 1e-5 * (1.0 + exact_logprob.abs()), "{rule:?}: {error}");
        }
        let parallel: Vec<_> = fuse(3, &logits, &rows).into_iter().map(Result::unwrap).collect();
        assert!(decisions.into_iter().map(Result::unwrap).eq(parallel));
    }
}

#[test]
fn a_broken_row_leaves_the_others_theirs() {
    let mut matrices = matrices();
    matrices[1][2 * STRIDE + 17] = f32::NAN;
    let (rule, params) = (FusionRule::default(), SamplingParams::default());
    let rows: Vec<_> = (0..ROWS)
        .map(|slot| FuseRow { slot, step: 9, rule: &rule, held: None, choice: greedy(&params) })
        .collect();
    for (row, decision) in fuse(2, &rows_of(&matrices), &rows).iter().enumerate() {
        match decision {
            Err(Error::NotFinite { step: 9, token: 17, .. }) => assert_eq!(row, 2),
            decision => assert!(decision.is_ok() && row != 2, "{row}: {decision:?}"),
        }
    }
}

#[test]
fn what_cannot_be_fused_is_refused_before_anything_is_computed() {
    let (matrices, params) = (matrices(), SamplingParams::default());
    let refuse = |logits: &ModelLogits<LogitsRows<'_>>, rule: &FusionRule, slot, held, params| {
        let row = FuseRow { slot, step: 0, rule, held, choice: greedy(params) };
        CpuFusion::new(1).unwrap().fuse(logits, &[row], &mut Vec::new()).unwrap_err().to_string()
    };
    let (logits, dynamic) = (rows_of(&matrices), FusionRule::default());
    let no_small = ModelLogits { small: None, ..logits.clone() };
    assert_eq!(refuse(&no_small, &dynamic, 0, None, &params), "the dynamic method needs a small model");
    assert_eq!(
        refuse(&logits, &dynamic, ROWS, None, &params),
        "row: expected a row of every model's logits, below 5, found 5"
    );
    assert_eq!(
        refuse(&logits, &dynamic, 0, Some((2, 1.0)), &params),
        "held alpha: expected a finite number for an expert below 2, found 1 for expert 2"
    );
    let three = FusionRule::Static([1.0; 3].into_iter().collect());
    assert_eq!(
        refuse(&logits, &three, 0, None, &params),
        "number of alphas: expected 1 or 2, one an expert, found 3"
    );
    let never = FusionRule::Dynamic(DynamicRule { every: 0, ..DynamicRule::default() });
    assert_eq!(refuse(&logits, &never, 0, None, &params), "alpha every: expected at least 1, found 0");
    let cold = SamplingParams { temperature: -1.0, ..params.clone() };
    assert_eq!(refuse(&logits, &dynamic, 0, None, &cold), "temperature: expected 0 or more, found -1");
}

#[test]
fn a_matrix_must_hold_its_rows() {
    let values = [0.0_f32; 10];
    let shape = |rows, vocab_size, stride| {
        LogitsRows::with_stride(&values, rows, vocab_size, stride).map(|rows| rows.rows())
    };
    // The last row needs no padding behind it.
    assert_eq!(shape(3, 2, 4).unwrap(), 3);
    assert_eq!(shape(0, 2, 4).unwrap(), 0);
    for (rows, vocab_size, stride) in
        [(3, 3, 4), (1, 0, 4), (2, 4, 3), (usize::MAX, 2, 4), (2, 1, usize::MAX)]
    {
        assert!(shape(rows, vocab_size, stride).is_err(), "{rows} {vocab_size} {stride}");
    }
    assert_eq!(LogitsRows::new(&values, 5).unwrap().rows(), 2);
    assert!(LogitsRows::new(&values, 3).is_err() && LogitsRows::new(&values, 0).is_err());
}
