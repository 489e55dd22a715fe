//! The fast search against the paper written literally in f64, and the method's identities.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stdout)]

use dlf_engine::backend::cpu::fuse::{Fuser, Parallel, sequential};
use dlf_engine::backend::{Choice, FuseRow};
use dlf_engine::fusion::reference::{self, ReferenceRow};
use dlf_engine::fusion::{AlphaGrid, Decision, DynamicRule, FusionRule, Objective, PerExpert, SearchMode};
use dlf_engine::model::Role;
use dlf_engine::{Error, Result};

#[path = "support/rows.rs"]
mod rows;

use rows::{Rng, Row};

/// Sums of f32 terms: a lane adds at most 128 of them, a candidate's weight is a product of up to 32 factors,
/// and both errors are near 2⁻²⁴ a step with random signs; the largest of 4,000 rows is 3.5e-6. Relative to 1 + KL.
const KL_TOLERANCE: f64 = 1e-5;

fn fuse_with(
    fuser: &mut Fuser,
    run: &mut Parallel<'_>,
    row: &Row,
    rule: &FusionRule,
    held: Option<(usize, f64)>,
) -> Result<Decision> {
    let row_of = FuseRow { slot: 0, step: 3, rule, held, choice: Choice::Forced(0) };
    let mut decisions = Vec::new();
    fuser.fuse(run, &[row_of], &|_| row.logits(), &mut decisions);
    decisions.remove(0)
}

fn fuse(row: &Row, rule: &FusionRule) -> Result<Decision> {
    fuse_with(&mut Fuser::new(), &mut sequential, row, rule, None)
}

fn grids(grids: &[AlphaGrid]) -> FusionRule {
    FusionRule::Dynamic(DynamicRule { grids: grids.iter().cloned().collect(), ..DynamicRule::default() })
}

/// What a wrong α may cost: both losses are sums of (k − t)² whose k and t are off by δ, so each is off by at
/// most 4δ Σ|k − t| ≤ 4δ √(2T·loss), plus 8Tδ².
fn margin_bound(expected: &reference::ReferenceDecision) -> f64 {
    let loss = expected.loss.unwrap() + expected.margin.unwrap_or(0.0).min(1e300);
    let targets = expected.kl_expert_small.iter().chain(&expected.kl_small_expert);
    let kl = targets.fold(0.0, |a: f64, b| a.max(*b)) + loss.sqrt();
    let (delta, experts) = (KL_TOLERANCE * (1.0 + kl), expected.kl_expert_small.len() as f64);
    2.0 * (4.0 * delta * (2.0 * experts * loss).sqrt() + 8.0 * experts * delta * delta)
}

/// The largest KL error relative to 1 + KL, once everything agrees.
fn compare(row: &Row, rule: &FusionRule, held: Option<(usize, f64)>, found: &Decision, what: &str) -> f64 {
    let logits = row.logits();
    let mut expected = reference::decide(&logits, rule, held, 3).unwrap();
    if (found.expert, &found.alpha) != (expected.expert, &expected.alpha) {
        let bound = margin_bound(&expected);
        assert!(
            expected.margin.unwrap() <= bound,
            "{what}: {:?} for {expected_alpha:?}, margin {:?} > {bound}",
            found.alpha,
            expected.margin,
            expected_alpha = expected.alpha
        );
        let active = found.expert.unwrap();
        expected = reference::decide(&logits, rule, Some((active, found.alpha[active])), 3).unwrap();
    }
    assert_eq!(found.expert, expected.expert, "{what}");
    let mut worst: f64 = 0.0;
    let mut near = |name: &str, found: f64, expected: f64| {
        let error = (found - expected).abs() / (1.0 + expected.abs());
        assert!(error <= KL_TOLERANCE, "{what}: {name} {found} for {expected}");
        worst = worst.max(error);
    };
    near("KL(P̃‖P)", found.kl_fused_large.unwrap(), expected.kl_fused_large.unwrap());
    near("KL(P‖P̃)", found.kl_large_fused.unwrap(), expected.kl_large_fused.unwrap());
    for t in 0..row.experts.len() {
        near("KL(Q_t‖Q)", found.kl_expert_small[t], expected.kl_expert_small[t]);
        near("KL(Q‖Q_t)", found.kl_small_expert[t], expected.kl_small_expert[t]);
        assert_eq!(found.argmax_expert[t] as usize, reference::argmax(&expected.experts[t]), "{what}");
    }
    let (loss, bound) = (expected.loss.unwrap(), margin_bound(&expected));
    assert!(
        (found.loss.unwrap() - loss).abs() <= bound + 1e-9 * loss,
        "{what}: loss {:?} for {loss}",
        found.loss
    );
    assert_eq!(found.argmax_large.unwrap() as usize, reference::argmax(&expected.base), "{what}");
    // The fused row is f32: another token may win where the two are within its rounding, relative to the terms
    // of the sum, each at most 1e4 and α at most 5.
    let best = expected.fused[reference::argmax(&expected.fused)];
    let largest = row.large.iter().chain(&row.small).chain(row.experts.iter().flatten());
    let largest = largest.filter(|x| x.is_finite()).fold(0.0_f32, |a, b| a.max(b.abs()));
    let rounding = f64::from(largest)
        * 2.0_f64.powi(-23)
        * (1.0 + found.alpha.iter().map(|a| 2.0 * a.abs()).sum::<f64>());
    assert!(expected.fused[found.argmax_fused as usize] >= best - 2.0 * rounding, "{what}");
    let t = found.token as usize;
    let mut logprob = |name: &str, found: f64, expected: f64| {
        if expected == f64::NEG_INFINITY { assert_eq!(found, expected) } else { near(name, found, expected) }
    };
    logprob("log P̃", found.logprob_fused, expected.fused[t]);
    logprob("log P", found.logprob_large.unwrap(), expected.base[t]);
    logprob("log Q", found.logprob_small.unwrap(), expected.small[t]);
    for (found, expected) in found.logprob_expert.iter().zip(&expected.experts) {
        logprob("log Q_t", *found, expected[t]);
    }
    worst
}

fn some_rule(rng: &mut Rng, experts: usize) -> FusionRule {
    let grid = |a, b, c, inclusive| AlphaGrid::new(a, b, c, inclusive).unwrap();
    let mut pick = || match rng.below(8) {
        0 => grid(0.0, 2.0, 0.1, true),
        1 => grid(-1.0, 1.0, 0.1, true),
        2 => grid(0.0, 5.0, 0.17, false),
        3 => grid(1.0, 1.0, 0.1, true),
        4 => grid(0.5, 1.5, 0.25, true),
        5 => grid(0.0, 3.1, 0.1, true),
        _ => AlphaGrid::default(),
    };
    let shared = pick();
    let grids = if experts > 1 && shared.candidates().len() % 2 == 0 {
        (0..experts).map(|_| pick()).collect()
    } else {
        std::iter::once(shared).collect()
    };
    let objective = [Objective::Both, Objective::Both, Objective::Forward, Objective::Reverse][rng.below(4)];
    FusionRule::Dynamic(DynamicRule { grids, objective, ..DynamicRule::default() })
}

/// Makes a row nasty in one of several ways.
fn disturb(rng: &mut Rng, row: &mut Row) {
    let width = row.large.len();
    let kind = rng.below(8);
    for model in row.models() {
        match kind {
            0 => model.fill((rng.normal() * 10.0) as f32),
            1 => model[rng.below(width)] = (rng.normal() * 3e3) as f32,
            2 => {
                let shift = (rng.normal() * 100.0) as f32;
                model.iter_mut().for_each(|x| *x += shift);
            }
            3 if width > 4 => {
                for _ in 0..width / 4 {
                    model[rng.below(width - 1)] = f32::NEG_INFINITY;
                }
            }
            4 => model.iter_mut().step_by(3).for_each(|x| *x -= 400.0),
            _ => {}
        }
    }
}

#[test]
fn thousands_of_rows_are_as_the_paper_says() {
    let mut rng = Rng(1);
    let mut fusers: Vec<_> = Fuser::every().collect();
    let mut worst: f64 = 0.0;
    for case in 0..4000 {
        let width = [1, 2, 7, 8, 15, 16, 33, 111, 300, 1024, 1025][rng.below(11)];
        let experts = [1, 1, 1, 2, 3, 8][rng.below(6)];
        let scale = [0.01, 0.3, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4][rng.below(8)];
        let heavy = rng.below(2) == 0;
        let mut row = Row::random(&mut rng, width, experts, scale, heavy);
        if rng.below(2) == 0 {
            disturb(&mut rng, &mut row);
        }
        let rule = some_rule(&mut rng, experts);
        for fuser in &mut fusers {
            let found = match fuse_with(fuser, &mut sequential, &row, &rule, None) {
                Err(Error::NoCandidate { step: 3 }) => {
                    assert!(reference::decide(&row.logits(), &rule, None, 3).is_err());
                    continue;
                }
                other => other.unwrap(),
            };
            let what = format!(
                "case {case} ({}): {width} tokens, {experts} experts, scale {scale}, {rule:?}",
                fuser.instructions()
            );
            worst = worst.max(compare(&row, &rule, None, &found, &what));
        }
    }
    println!("largest error of a KL or log-probability, relative to 1 + value: {worst:e}");
}

#[test]
fn whole_vocabularies_are_as_the_paper_says() {
    let mut rng = Rng(2);
    let mut worst: f64 = 0.0;
    for (width, experts) in [(32_000, 1), (32_000, 4), (49_152, 2), (128_256, 1), (16_385, 1), (16_384, 3)] {
        for (scale, heavy) in [(1.0, false), (2.5, true), (200.0, false)] {
            let row = Row::random(&mut rng, width, experts, scale, heavy);
            let rule = FusionRule::default();
            let found = fuse(&row, &rule).unwrap();
            let what = format!("{width} tokens, {experts} experts, scale {scale}");
            worst = worst.max(compare(&row, &rule, None, &found, &what));
        }
    }
    println!("largest error of a KL or log-probability, relative to 1 + value: {worst:e}");
}

/// Differences of hundreds: the geometric progression can't hold them, and the wide path must take over.
#[test]
fn weights_that_underflow_are_not_lost() {
    let mut rng = Rng(3);
    for gap in [20.0, 40.0, 60.0, 80.0, 100.0, 150.0, 300.0, 900.0, 5e3, 1e4] {
        for sign in [1.0, -1.0] {
            let mut row = Row::random(&mut rng, 2000, 1, 1.0, false);
            // One token that the large model all but excludes and the expert wants, or the other way round.
            row.large[17] = -(gap as f32);
            row.experts[0][17] = row.small[17] + (sign * gap) as f32;
            row.experts[0][1900] = row.small[1900] - (sign * 1.3 * gap) as f32;
            for rule in [
                FusionRule::default(),
                grids(&[AlphaGrid::new(-2.0, 5.0, 0.25, true).unwrap()]),
                grids(&[AlphaGrid::new(-5.0, -1.0, 0.5, true).unwrap()]),
                grids(&[AlphaGrid::new(0.5, 1.0, 0.5, true).unwrap()]),
            ] {
                for mut fuser in Fuser::every() {
                    let found = fuse_with(&mut fuser, &mut sequential, &row, &rule, None).unwrap();
                    compare(&row, &rule, None, &found, &format!("gap {gap}, sign {sign}, {rule:?}"));
                    for alpha in [0.0, 0.7, -1.0, 5.0] {
                        let held = Some((0, alpha));
                        let found = fuse_with(&mut fuser, &mut sequential, &row, &rule, held).unwrap();
                        compare(&row, &rule, held, &found, &format!("gap {gap}, held {alpha}"));
                    }
                }
            }
        }
    }
}

#[test]
fn static_alpha_of_several_experts() {
    let mut rng = Rng(4);
    for width in [7, 1025, 20_000] {
        let row = Row::random(&mut rng, width, 3, 2.0, true);
        for alpha in [&[1.0][..], &[0.25], &[0.3, -0.5, 1.5], &[0.0]] {
            let rule = FusionRule::Static(alpha.iter().copied().collect());
            let found = fuse(&row, &rule).unwrap();
            compare(&row, &rule, None, &found, &format!("{width} tokens, static {alpha:?}"));
        }
    }
}

#[test]
fn one_model_alone() {
    let row = Row::random(&mut Rng(5), 1030, 2, 3.0, false);
    for rule in [FusionRule::Large, FusionRule::Small, FusionRule::Expert(1)] {
        let found = fuse(&row, &rule).unwrap();
        let expected = reference::decide(&row.logits(), &rule, None, 3).unwrap();
        assert_eq!(found.argmax_fused as usize, reference::argmax(&expected.fused));
        assert!((found.logprob_fused - expected.fused[0]).abs() < KL_TOLERANCE);
        assert_eq!((found.loss, found.kl_fused_large, found.expert), (None, None, None));
        assert!(found.alpha.is_empty() && found.kl_expert_small.is_empty());
        assert_eq!(found.logprob_large.is_some(), rule == FusionRule::Large);
        assert_eq!(found.logprob_small.is_some(), rule == FusionRule::Small);
        assert_eq!(found.logprob_expert.len(), usize::from(rule == FusionRule::Expert(1)));
    }
}

fn one_hot(experts: usize, expert: usize, alpha: f64) -> Vec<f64> {
    (0..experts).map(|t| if t == expert { alpha } else { 0.0 }).collect()
}

#[test]
fn the_refined_minimum_is_the_continuous_one() {
    let mut rng = Rng(6);
    let mut errors = Vec::new();
    let rule = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    for case in 0..300 {
        let scale = [0.5, 1.0, 2.0, 3.0, 8.0][case % 5];
        let row = Row::random(&mut rng, 1500, 1 + case % 2, scale, case % 3 != 0);
        let found = fuse(&row, &rule).unwrap();
        compare(
            &row,
            &rule,
            Some((found.expert.unwrap(), found.alpha[found.expert.unwrap()])),
            &found,
            "refined",
        );
        let grid = fuse(&row, &FusionRule::default()).unwrap();
        let expert = grid.expert.unwrap();
        assert_eq!(found.expert, grid.expert);
        let candidates = AlphaGrid::default();
        let k = candidates.candidates().iter().position(|a| *a == grid.alpha[expert]).unwrap();
        let low = candidates.candidates()[k.saturating_sub(1)];
        let high = candidates.candidates()[(k + 1).min(19)];
        let exact = ReferenceRow::new(&row.logits(), "dynamic", 0).unwrap();
        let (alpha, _) = exact.continuous_search(expert, low, high, Objective::Both);
        // Where the loss is flat in the cell, f32 sums can't tell one α from another: what they are off by moves
        // a loss by twice the root of it times 1e-6, near their largest error on heavy-tailed rows.
        let at = |alpha: f64| exact.loss(&one_hot(row.experts.len(), expert, alpha), Objective::Both);
        let (least, forward, reverse) = at(alpha);
        let noise = 2.0 * (2.0 * least).sqrt() * 1e-6 * (1.0 + forward + reverse) + 1e-13;
        let error = (found.alpha[expert] - alpha).abs();
        assert!(error <= 1e-2 || at(found.alpha[expert]).0 <= least + noise, "case {case}: off by {error}");
        let steep = |alpha: f64| alpha < low || alpha > high || at(alpha).0 > least + noise;
        if steep(alpha - 1e-2) && steep(alpha + 1e-2) {
            errors.push(error);
        }
    }
    assert!(errors.len() >= 200, "{} rows have a minimum", errors.len());
    errors.sort_by(f64::total_cmp);
    let (ninth, worst) = (errors[errors.len() * 9 / 10], errors[errors.len() - 1]);
    println!(
        "refined α in {} rows: median {:e}, ninth decile {ninth:e}, worst {worst:e}",
        errors.len(),
        errors[errors.len() / 2]
    );
    assert!(ninth <= 1e-3 && worst <= 1e-2, "ninth decile {ninth:e}, worst {worst:e}");
}

#[test]
fn large_equal_to_small_is_the_expert() {
    let mut row = Row::random(&mut Rng(7), 3000, 1, 2.0, false);
    row.large = row.small.clone();
    let found = fuse(&row, &FusionRule::default()).unwrap();
    assert_eq!(found.alpha[0], 1.0);
    // (error of a KL)² from each of two terms
    assert!(found.loss.unwrap() < 2.0 * KL_TOLERANCE * KL_TOLERANCE);
    assert_eq!(found.argmax_fused, found.argmax_expert[0]);
    assert!((found.logprob_fused - found.logprob_expert[0]).abs() < KL_TOLERANCE);
}

#[test]
fn expert_equal_to_small_is_the_large_model() {
    let mut row = Row::random(&mut Rng(8), 3000, 2, 2.0, false);
    row.experts = vec![row.small.clone(); 2];
    let found = fuse(&row, &FusionRule::default()).unwrap();
    assert_eq!((found.expert, found.loss), (Some(0), Some(0.0)));
    assert_eq!(found.alpha[..], [0.0, 0.0]);
    assert_eq!(Some(found.argmax_fused), found.argmax_large);
    assert_eq!(Some(found.logprob_fused), found.logprob_large);
}

#[test]
fn a_single_candidate_is_a_static_rule() {
    let row = Row::random(&mut Rng(9), 3000, 1, 2.0, false);
    let proxy = fuse(&row, &FusionRule::Static([1.0].into_iter().collect())).unwrap();
    let one = fuse(&row, &grids(&[AlphaGrid::new(1.0, 1.0, 1.0, true).unwrap()])).unwrap();
    assert_eq!(Decision { expert: None, ..one }, proxy);
    let zero = fuse(&row, &grids(&[AlphaGrid::new(0.0, 0.0, 1.0, true).unwrap()])).unwrap();
    let large = fuse(&row, &FusionRule::Large).unwrap();
    assert_eq!((zero.argmax_fused, zero.logprob_fused), (large.argmax_fused, large.logprob_fused));
    assert_eq!((zero.kl_fused_large, zero.kl_large_fused), (Some(0.0), Some(0.0)));
}

#[test]
fn equal_experts_are_one() {
    let mut row = Row::random(&mut Rng(10), 3000, 1, 2.0, true);
    let one = fuse(&row, &FusionRule::default()).unwrap();
    row.experts = vec![row.experts[0].clone(); 8];
    let eight = fuse(&row, &FusionRule::default()).unwrap();
    assert_eq!((eight.expert, eight.alpha[0]), (Some(0), one.alpha[0]));
    // A sum of eight equal f64.
    assert!((eight.loss.unwrap() - 8.0 * one.loss.unwrap()).abs() <= 1e-12 * eight.loss.unwrap());
    assert_eq!(eight.logprob_fused, one.logprob_fused);
}

#[test]
fn constants_and_permutations_change_nothing() {
    let mut rng = Rng(11);
    let rule = FusionRule::default();
    for _ in 0..50 {
        // Multiples of 2⁻¹⁰, so that adding 64 is exact in f32.
        let mut row = Row::random(&mut rng, 1500, 2, 2.0, false);
        row.models().into_iter().flatten().for_each(|x| *x = (*x * 1024.0).round() / 1024.0);
        let before = fuse(&row, &rule).unwrap();
        let mut moved = row.clone();
        for (model, constant) in moved.models().into_iter().zip([64.0, -128.0, 512.0, 1024.0]) {
            model.iter_mut().for_each(|x| *x += constant);
        }
        let after = fuse(&moved, &rule).unwrap();
        assert_eq!((after.expert, &after.alpha), (before.expert, &before.alpha));
        assert!((after.loss.unwrap() - before.loss.unwrap()).abs() <= 1e-6 * (1.0 + before.loss.unwrap()));
        let order: Vec<usize> = {
            let mut order: Vec<usize> = (0..1500).collect();
            (1..1500).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
            order
        };
        let mut shuffled = row.clone();
        for (to, from) in shuffled.models().into_iter().zip(row.models()) {
            to.iter_mut().zip(&order).for_each(|(x, &i)| *x = from[i]);
        }
        let shuffled = fuse(&shuffled, &rule).unwrap();
        assert_eq!((shuffled.expert, &shuffled.alpha), (before.expert, &before.alpha));
        assert_eq!(order[shuffled.argmax_fused as usize], before.argmax_fused as usize);
    }
}

#[test]
fn what_is_not_finite_is_named() {
    let mut row = Row::random(&mut Rng(12), 40_000, 2, 1.0, false);
    row.experts[1][20_000] = f32::NAN;
    row.small[30_000] = f32::INFINITY;
    match fuse(&row, &FusionRule::default()) {
        Err(Error::NotFinite { role: Role::Expert(1), step: 3, token: 20_000, value }) => {
            assert!(value.is_nan())
        }
        other => panic!("{other:?}"),
    }
    row.experts[1][20_000] = 0.0;
    let found = fuse(&row, &FusionRule::default());
    assert!(matches!(found, Err(Error::NotFinite { role: Role::Small, token: 30_000, .. })), "{found:?}");
    assert!(fuse(&row, &FusionRule::Large).is_ok());
    // In the last, partial vector.
    let mut row = Row::random(&mut Rng(13), 1027, 1, 1.0, false);
    row.large[1026] = f32::NAN;
    let found = fuse(&row, &FusionRule::default());
    assert!(matches!(found, Err(Error::NotFinite { role: Role::Large, token: 1026, .. })), "{found:?}");
    row.large.fill(f32::NEG_INFINITY);
    assert!(matches!(fuse(&row, &FusionRule::default()), Err(Error::NoCandidate { step: 3 })));
    let lonely = Row { experts: Vec::new(), ..row };
    assert!(matches!(fuse(&lonely, &FusionRule::default()), Err(Error::MissingModel { .. })));
}

#[test]
fn threads_and_neighbours_change_nothing() {
    let mut rng = Rng(14);
    let rows: Vec<Row> = (0..5).map(|i| Row::random(&mut rng, 40_000, 2, 1.0 + f64::from(i), true)).collect();
    let refine = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    let rules = [FusionRule::default(), refine, FusionRule::Large, FusionRule::default(), FusionRule::Small];
    let alone: Vec<_> = rows.iter().zip(&rules).map(|(row, rule)| fuse(row, rule).unwrap()).collect();
    let mut threads = |tasks: usize, task: &(dyn Fn(usize) + Sync)| {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || (thread..tasks).step_by(4).rev().for_each(task));
            }
        });
    };
    let batch: Vec<_> = rules
        .iter()
        .map(|rule| FuseRow { slot: 0, step: 3, rule, held: None, choice: Choice::Forced(0) })
        .collect();
    let mut decisions = Vec::new();
    let mut fuser = Fuser::new();
    for _ in 0..2 {
        fuser.fuse(&mut threads, &batch, &|i| rows[i].logits(), &mut decisions);
        let together: Vec<_> = decisions.drain(..).map(Result::unwrap).collect();
        assert_eq!(together, alone);
    }
}

#[test]
fn widths_are_cut_to_the_shortest() {
    let mut row = Row::random(&mut Rng(15), 1000, 1, 1.0, false);
    let cut = fuse(&row, &FusionRule::default()).unwrap();
    row.large.extend([1e3; 64]);
    row.experts[0].extend([500.0; 3]);
    assert_eq!(fuse(&row, &FusionRule::default()).unwrap(), cut);
}

#[test]
fn excluded_tokens_have_no_probability() {
    let mut row = Row::random(&mut Rng(16), 1000, 1, 1.0, false);
    row.small[0] = f32::NEG_INFINITY;
    row.large[5] = 50.0;
    row.experts[0][5] = f32::NEG_INFINITY;
    let found = fuse(&row, &FusionRule::default()).unwrap();
    assert_eq!((found.logprob_fused, found.logprob_large), (f64::NEG_INFINITY, Some(f64::NEG_INFINITY)));
    assert_ne!(found.argmax_fused, 5);
    assert_ne!(found.argmax_large, Some(5));
    compare(&row, &FusionRule::default(), None, &found, "excluded");
    let none: PerExpert<f64> = [0.5].into_iter().collect();
    let found = fuse(&row, &FusionRule::Static(none)).unwrap();
    assert_ne!(found.argmax_fused, 5);
}
