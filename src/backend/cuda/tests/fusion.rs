//! fusion.cu against the paper written literally in f64 (`fusion::reference`): every rule, every number of experts'
//! kernels, vocabularies of one token to 128,256.

use super::bed::{Bed, Found, ROUNDING, Rng, assert_noticed};
use crate::backend::cuda::forward::LogitsPlace;
use crate::backend::cuda::fusion::{DeviceFuser, Roles};
use crate::backend::cuda::weights::stride;
use crate::backend::{Choice, FuseRow};
use crate::error::{Error, Result};
use crate::fusion::reference::{ReferenceDecision, ReferenceRow, argmax, decide};
use crate::fusion::{AlphaGrid, Decision, DynamicRule, FusionRule, Logits, Objective, SearchMode};
use crate::model::Role;
use crate::sampling::SamplingParams;

/// The logits of a large model, a small one and experts, `(models, slots, vocab_size)`.
struct Models(Vec<Vec<Vec<f32>>>);

/// How a row's logits are made.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// The small model resembles the large one, experts resemble the small one; of the order of ten.
    Plain,
    /// The same with one id in eight excluded by one of the models.
    Excluded,
    /// Anything from −1e4 to 1e4.
    Wide,
    /// Multiples of four, so that many ids tie, and no sum is rounded.
    Tied,
}

const KINDS: [Kind; 4] = [Kind::Plain, Kind::Excluded, Kind::Wide, Kind::Tied];

impl Models {
    /// Slots take turns at `KINDS`.
    fn new(rng: &mut Rng, experts: usize, slots: usize, vocab_size: usize) -> Self {
        let mut models = vec![vec![vec![0.0_f32; vocab_size]; slots]; 2 + experts];
        for slot in 0..slots {
            let kind = KINDS[slot % KINDS.len()];
            for id in 0..vocab_size {
                let mut normal = |scale: f32| (0..4).map(|_| rng.uniform()).sum::<f32>() * scale;
                let large = normal(3.0);
                let small = 0.8 * large + normal(1.5);
                for (number, model) in models.iter_mut().enumerate() {
                    let plain = if number == 0 {
                        large
                    } else if number == 1 {
                        small
                    } else {
                        small + normal(1.0)
                    };
                    model[slot][id] = match kind {
                        Kind::Plain | Kind::Excluded => plain,
                        Kind::Wide => (plain * 2000.0).clamp(-1e4, 1e4),
                        Kind::Tied => (plain / 4.0).round() * 4.0,
                    };
                }
                // The first id is never excluded.
                if kind == Kind::Excluded && id > 0 && rng.below(8) == 0 {
                    models[rng.below(2 + experts)][slot][id] = f32::NEG_INFINITY;
                }
            }
        }
        Self(models)
    }

    fn experts(&self) -> usize {
        self.0.len() - 2
    }

    fn of(&self, slot: usize) -> Logits<'_> {
        Logits {
            large: Some(&self.0[0][slot]),
            small: Some(&self.0[1][slot]),
            experts: self.0[2..].iter().map(|expert| &expert[slot][..]).collect(),
        }
    }
}

/// What the kernel decides, in one launch for each slot's worth of rows. NaN lies between the rows of logits.
fn fuse(bed: &Bed, models: &Models, rows: &[FuseRow<'_>]) -> Result<Vec<Result<Decision>>> {
    let (slots, vocab_size) = (models.0[0].len(), models.0[0][0].len());
    let vocab_stride = stride(vocab_size) + 8;
    let mut numbers = Vec::new();
    for row in models.0.iter().flatten() {
        numbers.extend_from_slice(row);
        numbers.resize(numbers.len() + vocab_stride - vocab_size, f32::NAN);
    }
    let logits = bed.put(&numbers);
    let of_model = slots * vocab_stride * size_of::<f32>();
    let addresses: Vec<u64> =
        (0..models.0.len()).map(|model| logits.address() + (model * of_model) as u64).collect();
    let table = bed.put(&addresses);
    let place =
        LogitsPlace { address: logits.address(), table: table.address(), vocab_size, vocab_stride, slots };
    let roles =
        [Role::Large, Role::Small].into_iter().chain((0..models.experts()).map(Role::Expert)).collect();
    let mut fuser = DeviceFuser::new(&bed.gpu, &bed.stream, Roles(roles), place)?;
    fuser.fuse(&bed.gpu, &bed.stream, place.table, rows)
}

/// Σ p |x − Σ p x|
fn spread(log_p: &[f64], x: &[f64]) -> f64 {
    let each = || log_p.iter().map(|log_p| log_p.exp()).zip(x).filter(|(p, _)| *p > 0.0);
    let mean: f64 = each().map(|(p, x)| p * x).sum();
    each().map(|(p, x)| p * (x - mean).abs()).sum()
}

/// How far a KL term of `exact` may be off, relative to 1 + KL and absolute.
///
/// Sums of f32 terms, of which a lane adds a thousand: 1e-5, as in tests/fusion.rs. And the arguments of exponentials
/// are f32: each is off by its own rounding x, which moves a logarithm of a sum by x, and a mean of d by twice x times
/// how far d spreads.
fn off(logits: &Logits<'_>, exact: &ReferenceDecision) -> (f64, f64) {
    let rows: Vec<&[f32]> =
        logits.large.into_iter().chain(logits.small).chain(logits.experts.iter().copied()).collect();
    let largest = rows
        .iter()
        .copied()
        .flatten()
        .filter(|x| x.is_finite())
        .fold(0.0, |a: f64, x| a.max(f64::from(x.abs())));
    let alphas: f64 = exact.alpha.iter().map(|alpha| alpha.abs()).sum();
    let rounding = ROUNDING * largest * (2.0 + 4.0 * alphas.max(1.0));
    let mut widest: f64 = 0.0;
    if !exact.experts.is_empty() {
        let difference = |t: usize| {
            let pairs = rows[2 + t].iter().zip(rows[1]);
            pairs.map(
                |(e, s)| if e.is_finite() && s.is_finite() { f64::from(*e) - f64::from(*s) } else { 0.0 },
            )
        };
        let mut fused = vec![0.0; rows[0].len()];
        for (t, alpha) in exact.alpha.iter().enumerate() {
            fused.iter_mut().zip(difference(t)).for_each(|(sum, d)| *sum += alpha * d);
            let d: Vec<f64> = difference(t).collect();
            widest = widest.max(spread(&exact.small, &d)).max(spread(&exact.experts[t], &d));
        }
        widest = widest.max(spread(&exact.fused, &fused)).max(spread(&exact.base, &fused));
    }
    (1e-5, rounding * (2.0 + 2.0 * widest))
}

/// How far a loss may be off where each KL term is by `delta`: each of the 2 T squares (k − t)² by 4 δ |k − t| + 4 δ².
fn loss_off(loss: f64, experts: usize, delta: f64) -> f64 {
    4.0 * delta * (2.0 * experts as f64 * loss).sqrt() + 8.0 * experts as f64 * delta * delta
}

/// Everything that a decision says, beside the paper's equations.
fn compare(models: &Models, row: &FuseRow<'_>, found: &Decision) -> Found {
    let logits = models.of(row.slot);
    let mut exact = decide(&logits, row.rule, row.held, row.step).map_err(|error| error.to_string())?;
    let experts = exact.experts.len();
    let kl_of = |exact: &ReferenceDecision| {
        let targets = exact.kl_expert_small.iter().chain(&exact.kl_small_expert).copied();
        let own = exact.kl_fused_large.into_iter().chain(exact.kl_large_fused);
        targets.chain(own).fold(0.0, f64::max)
    };
    let (mut relative, mut absolute) = off(&logits, &exact);
    if (found.expert, &found.alpha) != (exact.expert, &exact.alpha) {
        // The candidates' losses are nearer to each other than what they may be off.
        let active = found.expert.filter(|&active| found.alpha[active].is_finite());
        let active = active.ok_or_else(|| format!("{:?}, not {:?}", found.alpha, exact.alpha))?;
        let other = decide(&logits, row.rule, Some((active, found.alpha[active])), row.step).unwrap();
        let delta = [&exact, &other].map(|exact| {
            let (relative, absolute) = off(&logits, exact);
            relative * (1.0 + kl_of(exact)) + absolute
        });
        let (least, loss) = (exact.loss.unwrap(), other.loss.unwrap());
        let most = loss_off(loss, experts, delta[1]) + loss_off(least, experts, delta[0]);
        if loss - least > most {
            return Err(format!(
                "α {:?} of loss {loss}, not {:?} of {least} ({most})",
                found.alpha, exact.alpha
            ));
        }
        exact = other;
        (relative, absolute) = off(&logits, &exact);
    }
    let near = |name: &str, found: Option<f64>, exact: Option<f64>| match (found, exact) {
        (None, None) => Ok(()),
        (Some(a), Some(b)) if a == b || (a - b).abs() <= relative * (1.0 + b.abs()) + absolute => Ok(()),
        _ => Err(format!("{name}: {found:?}, not {exact:?} ± {absolute}")),
    };
    near("KL(P̃‖P)", found.kl_fused_large, exact.kl_fused_large)?;
    near("KL(P‖P̃)", found.kl_large_fused, exact.kl_large_fused)?;
    for t in 0..experts {
        near("KL(Q_t‖Q)", found.kl_expert_small.get(t).copied(), Some(exact.kl_expert_small[t]))?;
        near("KL(Q‖Q_t)", found.kl_small_expert.get(t).copied(), Some(exact.kl_small_expert[t]))?;
    }
    if let (Some(loss), Some(of_exact)) = (found.loss, exact.loss) {
        let most = loss_off(of_exact, experts, relative * (1.0 + kl_of(&exact)) + absolute);
        if (loss - of_exact).abs() > most + 1e-9 * of_exact {
            return Err(format!("loss {loss}, not {of_exact} ± {most}"));
        }
    }
    let token = found.token as usize;
    near("log P̃", Some(found.logprob_fused), exact.fused.get(token).copied())?;
    let base = exact.base.get(token).copied();
    match row.rule {
        FusionRule::Small => near("log Q", found.logprob_small, base)?,
        FusionRule::Expert(_) => near("log Q_t", found.logprob_expert.first().copied(), base)?,
        _ => near("log P", found.logprob_large, base)?,
    }
    for t in 0..experts {
        near("log Q", found.logprob_small, exact.small.get(token).copied())?;
        near("log Q_t", found.logprob_expert.get(t).copied(), exact.experts[t].get(token).copied())?;
    }
    choices(&logits, row, found, &exact)
}

/// The tokens: exactly those of the definition, but for P̃ where its best ones are nearer than an f32 tells apart.
fn choices(logits: &Logits<'_>, row: &FuseRow<'_>, found: &Decision, exact: &ReferenceDecision) -> Found {
    let same = |name: &str, found: Option<u32>, exact: &[f64]| match found == Some(argmax(exact) as u32) {
        true => Ok(()),
        false => Err(format!("{name}: {found:?}, not {}", argmax(exact))),
    };
    match row.rule {
        FusionRule::Small => {}
        FusionRule::Expert(_) => same("argmax Q_t", found.argmax_expert.first().copied(), &exact.base)?,
        _ => same("argmax P", found.argmax_large, &exact.base)?,
    }
    for (t, expert) in exact.experts.iter().enumerate() {
        same("argmax Q_t", found.argmax_expert.get(t).copied(), expert)?;
    }
    // Without a shift nothing is rounded.
    let slack = if exact.alpha.iter().all(|&alpha| alpha == 0.0) { 0.0 } else { off(logits, exact).1 };
    if slack == 0.0
        || KINDS[row.slot % KINDS.len()] == Kind::Tied && exact.alpha.iter().all(|a| a.fract() == 0.0)
    {
        same("argmax P̃", Some(found.argmax_fused), &exact.fused)?;
    } else if exact.fused[found.argmax_fused as usize] < exact.fused[argmax(&exact.fused)] - 2.0 * slack {
        return Err(format!("argmax P̃: {}, not {}", found.argmax_fused, argmax(&exact.fused)));
    }
    let chosen = match row.choice {
        Choice::Forced(id) => id,
        Choice::Sample { .. } => found.argmax_fused,
    };
    if found.token == chosen { Ok(()) } else { Err(format!("token {}, not {chosen}", found.token)) }
}

fn dynamic(start: f64, step: f64, candidates: usize, objective: Objective) -> FusionRule {
    let grid = AlphaGrid::new(start, start + step * (candidates - 1) as f64, step, true).unwrap();
    assert_eq!(grid.candidates().len(), candidates);
    FusionRule::Dynamic(DynamicRule {
        grids: [grid].into_iter().collect(),
        objective,
        ..DynamicRule::default()
    })
}

/// All rules, with 1, 3, 20 and 32 candidates.
fn rules(experts: usize) -> Vec<FusionRule> {
    let mut rules = vec![
        FusionRule::default(),
        dynamic(1.0, 1.0, 1, Objective::Both),
        dynamic(-1.0, 1.0, 3, Objective::Forward),
        dynamic(0.0, 0.1, 32, Objective::Both),
        dynamic(-0.5, 0.13, 20, Objective::Reverse),
        FusionRule::Static((0..experts).map(|t| 1.3 - 0.4 * t as f64).collect()),
        FusionRule::Static([0.0].into_iter().collect()),
        FusionRule::Large,
        FusionRule::Small,
        FusionRule::Expert(experts - 1),
    ];
    for objective in [Objective::Both, Objective::Reverse] {
        let mode = SearchMode::Refine;
        rules.push(FusionRule::Dynamic(DynamicRule { mode, objective, ..DynamicRule::default() }));
    }
    let grids = (0..experts).map(|t| AlphaGrid::new(0.0, 0.3 + 0.1 * t as f64, 0.1, true).unwrap()).collect();
    rules.push(FusionRule::Dynamic(DynamicRule { grids, ..DynamicRule::default() }));
    rules
}

/// Decides every slot by each of `rules`, the last of them also at a held α, and with a token that is given.
fn check(bed: &Bed, models: &Models, rules: &[FusionRule]) -> Found {
    let (slots, vocab_size) = (models.0[0].len(), models.0[0][0].len());
    let params = SamplingParams::default();
    let greedy = Choice::Sample { params: &params, history: &[], generated: 0, banned: &[] };
    let mut rows = Vec::new();
    for (index, rule) in rules.iter().enumerate() {
        for slot in 0..slots {
            let choice = if index % 3 == 2 { Choice::Forced(vocab_size as u32 / 2) } else { greedy };
            rows.push(FuseRow { slot, step: index, rule, held: None, choice });
        }
    }
    if let Some(rule) = rules.last() {
        let held = Some((models.experts() - 1, 0.7));
        rows.push(FuseRow { slot: slots - 1, step: 9, rule, held, choice: greedy });
    }
    let found = fuse(bed, models, &rows).map_err(|error| error.to_string())?;
    assert_eq!(found.len(), rows.len());
    for (row, found) in rows.iter().zip(&found) {
        let found = found.as_ref().map_err(|error: &Error| format!("{row:?}: {error}"))?;
        let what = |error| format!("{} experts, {vocab_size} ids, {row:?}: {error}", models.experts());
        compare(models, row, found).map_err(what)?;
    }
    match &bed.device.reports()[..] {
        [] => Ok(()),
        [report, ..] => Err(format!("{report:?}")),
    }
}

#[test]
fn every_rule_against_the_paper() {
    let bed = Bed::new();
    for experts in [1, 3, 8] {
        for vocab_size in [1, 7, 111, 1500] {
            let models = Models::new(&mut Rng((experts * 10 + vocab_size) as u64), experts, 4, vocab_size);
            check(&bed, &models, &rules(experts)).unwrap();
        }
    }
    bed.assert_every(&["fusion"], |_| true);
}

/// Three tokens matter in the cell of the minimum (tests/refine.rs has more): two atoms alone are off by 0.07 and 0.04.
#[test]
fn two_bends_in_a_cell() {
    let bed = Bed::new();
    let models = Models(vec![
        vec![vec![47.0, 32.0, -33.0], vec![-4.0, 19.0, 9.0]],
        vec![vec![1.0, -2.0, 2.0], vec![2.0, -2.0, 1.0]],
        vec![vec![-72.0, -45.0, 69.0], vec![82.0, -90.0, 13.0]],
    ]);
    let rule = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    let rows =
        [0, 1].map(|slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice: Choice::Forced(0) });
    for (slot, found) in fuse(&bed, &models, &rows).unwrap().into_iter().enumerate() {
        let exact = ReferenceRow::new(&models.of(slot), "dynamic", 0).unwrap();
        let (alpha, least) = exact.continuous_search(0, 0.0, 0.6, Objective::Both);
        let found = found.unwrap();
        // 1e-3 is where an α stays that would move by no more; what that costs is far less than the loss.
        assert!(
            (found.alpha[0] - alpha).abs() <= 1e-3 && found.loss.unwrap() <= 1.001 * least,
            "{found:?}: {alpha}"
        );
    }
    assert_eq!(bed.device.reports(), []);
}

#[test]
fn the_minimum_between_candidates() {
    let bed = Bed::new();
    let models = Models::new(&mut Rng(31), 2, 120, 700);
    let rule = FusionRule::Dynamic(DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() });
    let params = SamplingParams::default();
    let choice = Choice::Sample { params: &params, history: &[], generated: 0, banned: &[] };
    // α says nothing where f32 holds logits to 5e-4, or where all of them tie.
    let plain = (0..120).filter(|slot| matches!(KINDS[slot % KINDS.len()], Kind::Plain | Kind::Excluded));
    let rows: Vec<_> = plain.map(|slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice }).collect();
    let mut errors = Vec::new();
    for (row, found) in rows.iter().zip(fuse(&bed, &models, &rows).unwrap()) {
        let found = found.unwrap();
        let logits = models.of(row.slot);
        let grid = decide(&logits, &FusionRule::default(), None, 0).unwrap();
        let expert = grid.expert.unwrap();
        assert_eq!(found.expert, Some(expert));
        let (low, high) = ((grid.alpha[expert] - 0.1).max(0.0), (grid.alpha[expert] + 0.1).min(1.9));
        let exact = ReferenceRow::new(&logits, "dynamic", 0).unwrap();
        let (alpha, least) = exact.continuous_search(expert, low, high, Objective::Both);
        errors.push((found.alpha[expert] - alpha).abs());
        // What it says is the loss of that α, and hardly more than the least.
        assert!(found.loss.unwrap() - least < 1e-4 * least + 1e-8, "{found:?}: {least}");
    }
    errors.sort_by(f64::total_cmp);
    // What is asked of the interpolation: tests/fusion.rs has harder rows, and says where f32 sums can't tell.
    let (ninth, worst) = (errors[errors.len() * 9 / 10], errors[errors.len() - 1]);
    assert!(ninth <= 1e-3 && worst <= 1e-2, "{errors:?}");
    assert_eq!(bed.device.reports(), []);
}

#[test]
fn real_vocabularies_against_the_paper() {
    let bed = Bed::new();
    let search = dynamic(0.0, 0.1, 20, Objective::Both);
    let few = dynamic(0.0, 0.8, 3, Objective::Both);
    for (experts, slots, vocab_size, rules) in [
        (1, 4, 32_000, vec![search.clone(), FusionRule::Large]),
        (3, 2, 32_000, vec![search.clone()]),
        (8, 1, 32_000, vec![few]),
        (1, 2, 128_256, vec![search]),
    ] {
        let models = Models::new(&mut Rng(vocab_size as u64 + experts as u64), experts, slots, vocab_size);
        check(&bed, &models, &rules).unwrap();
    }
}

#[test]
fn ties_go_to_the_lowest_id_expert_and_alpha() {
    const VOCAB_SIZE: usize = 5000;
    let bed = Bed::new();
    let params = SamplingParams::default();
    let choice = Choice::Sample { params: &params, history: &[], generated: 0, banned: &[] };
    let rule = FusionRule::default();
    // In each slot the best ids of every model are equal: in one lane's tile, in two warps, in two slices.
    let ties: [&[usize]; 4] = [&[3, 5], &[40, 70, 290], &[4999, 1023, 1024, 3000], &[0, 4999]];
    let mut models = vec![vec![vec![-1.0_f32; VOCAB_SIZE]; ties.len()]; 5];
    for (slot, ids) in ties.iter().enumerate() {
        for (number, model) in models.iter_mut().enumerate() {
            // Experts 0 and 2 are alike, expert 1 is the small model: its α changes nothing, and its loss is never least.
            let best = [2.0, 1.0, 3.0, 1.0, 3.0][number];
            ids.iter().for_each(|&id| model[slot][id] = best);
        }
    }
    let rows = [0, 1, 2, 3].map(|slot| FuseRow { slot, step: 0, rule: &rule, held: None, choice });
    let mut found = fuse(&bed, &Models(models.clone()), &rows).unwrap();
    for (found, ids) in found.drain(..).map(Result::unwrap).zip(ties) {
        let lowest = ids.iter().min().copied().unwrap() as u32;
        assert_eq!((found.token, found.argmax_fused, found.argmax_large), (lowest, lowest, Some(lowest)));
        assert_eq!(found.argmax_expert[..], [lowest; 3]);
        assert!(matches!(found.expert, Some(0 | 1)), "{found:?}");
    }
    // Every model alike: every α of every expert has the loss 0.
    let models = Models(vec![models.remove(0); 5]);
    let found = fuse(&bed, &models, &rows[..1]).unwrap().remove(0).unwrap();
    assert_eq!((found.expert, &found.alpha[..], found.loss), (Some(0), &[0.0; 3][..], Some(0.0)));
    assert_eq!(bed.device.reports(), []);
}

#[test]
fn a_wrong_number_is_noticed() {
    let numbers = [
        (72, "vocab_stride"),
        (76, "vocab_size"),
        (80, "small_model"),
        (84, "first_expert"),
        (88, "slice"),
        (96, "model_count"),
    ];
    let models = Models::new(&mut Rng(3), 1, 2, 2100);
    for (at, name) in numbers {
        assert_noticed("fuse_1", at, name, |bed| check(bed, &models, &[FusionRule::default()]));
    }
}
