//! The continuous minimum against a dense search in f64, on rows of many kinds.

// Helpers of tests may fail as tests do.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use dlf_engine::backend::cpu::fuse::{Fuser, sequential};
use dlf_engine::backend::{Choice, FuseRow};
use dlf_engine::fusion::reference::ReferenceRow;
use dlf_engine::fusion::{AlphaGrid, Decision, DynamicRule, FusionRule, Objective, SearchMode};

#[path = "support/rows.rs"]
mod rows;

use rows::{Relation, Rng, Row, Tail};

/// A row with the rule that it is searched by.
struct Case {
    row: Row,
    rule: DynamicRule,
    what: String,
}

impl Case {
    /// The one that a seed stands for.
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed);
        let width = [2, 3, 5, 17, 100, 400, 1500][rng.below(7)];
        let experts = [1, 1, 1, 2, 4][rng.below(5)];
        let scale = [0.3, 1.0, 2.0, 3.0, 8.0][rng.below(5)];
        let tails: [Tail; 3] = std::array::from_fn(|_| Tail::ALL[rng.below(Tail::ALL.len())]);
        let relation = Relation::ALL[rng.below(Relation::ALL.len())];
        let row = Row::of_kind(&mut rng, width, experts, scale, tails, relation);
        let grids = [
            "0:2:0.1",
            "0:2:0.1",
            "0:1.5:0.05",
            "0:2:0.5",
            "0:2:0.5:inclusive",
            "0:3.2:0.1",
            "-1:1:0.1:inclusive",
        ];
        let grids = [&grids[..], &["0:3:1:inclusive", "0.5:1.5:0.25:inclusive"]].concat();
        let grid = grids[rng.below(grids.len())];
        let objective =
            [Objective::Both, Objective::Both, Objective::Both, Objective::Forward, Objective::Reverse]
                [rng.below(5)];
        let grids = std::iter::once(grid.parse().unwrap()).collect();
        let rule = DynamicRule { grids, objective, mode: SearchMode::Refine, every: 1 };
        let what = format!(
            "seed {seed}: {width} tokens, {experts} experts, scale {scale}, {tails:?}, {relation:?}, {grid} {objective:?}"
        );
        Self { row, rule, what }
    }

    fn fuse(&self, fuser: &mut Fuser) -> Decision {
        let rule = FusionRule::Dynamic(self.rule.clone());
        let row = FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: Choice::Forced(0) };
        let mut decisions = Vec::new();
        fuser.fuse(&mut sequential, &[row], &|_| self.row.logits(), &mut decisions);
        decisions.remove(0).unwrap()
    }

    /// How far α is off; said aloud where it is too far.
    fn told(&self, found: &Decision, rounding: f64) -> Off {
        let off = self.error(found, rounding);
        if off.told > 1e-2 {
            println!("{}: {off:?}, {:?}", self.what, found.alpha);
        }
        off
    }

    /// What the largest x = L + α D is made of.
    fn largest(&self, expert: usize, alpha: f64) -> f64 {
        let Row { large, small, experts } = &self.row;
        let parts =
            |i: usize| (f64::from(large[i]), alpha * (f64::from(experts[expert][i]) - f64::from(small[i])));
        let sum = |(base, shift): (f64, f64)| base + shift;
        let top = (0..large.len()).map(parts).max_by(|a, b| sum(*a).total_cmp(&sum(*b)));
        top.map_or(0.0, |(base, shift)| base.abs() + shift.abs())
    }

    /// How far α is off. x is rounded by `rounding` relative to its parts.
    fn error(&self, found: &Decision, rounding: f64) -> Off {
        let exact = ReferenceRow::new(&self.row.logits(), "dynamic", 0).unwrap();
        let (expert, objective) = (found.expert.unwrap(), self.rule.objective);
        let at = |alpha: f64| {
            let mut all = vec![0.0; self.row.experts.len()];
            all[expert] = alpha;
            exact.loss(&all, objective)
        };
        let points = self.rule.points(expert);
        let losses: Vec<f64> = points.iter().map(|&alpha| at(alpha).0).collect();
        let best = (0..points.len()).min_by(|&a, &b| losses[a].total_cmp(&losses[b])).unwrap();
        // What is asked for is the minimum next to the best point; one that is found elsewhere must be as deep.
        let (low, high) = (points[best.saturating_sub(1)], points[(best + 1).min(points.len() - 1)]);
        let (alpha, least) = exact.continuous_search(expert, low, high, objective);
        // Where the loss is flat, f32 sums can't tell one α from another: each KL is off by some δ, which moves a loss by
        // 2δ Σ|k − t| ≤ 2δ √(2T·loss), and by 2Tδ². 3.5e-6 is the largest that tests/fusion.rs finds. A GPU rounds x, too.
        let targets = 2.0 * self.row.experts.len() as f64;
        let noise = |alpha: f64| {
            let (loss, forward, reverse) = at(alpha);
            let delta = 3.5e-6 * (1.0 + forward + reverse) + rounding * self.largest(expert, alpha);
            2.0 * delta * (targets * loss).sqrt() + targets * delta * delta
        };
        let found = found.alpha[expert];
        let distance = (found - alpha).abs();
        if at(found).0 - least <= noise(alpha) {
            return Off { told: 0.0, flat: distance > 1e-2 };
        }
        // On either side of α = 0 a KL has each of its values, so that two α may be the best: the nearer one counts.
        let near = |alpha: f64| alpha.clamp(points[0], points[points.len() - 1]);
        let (twin, as_little) =
            exact.continuous_search(expert, near(found - 1e-2), near(found + 1e-2), objective);
        let told = if as_little - least <= noise(alpha) { (found - twin).abs() } else { distance };
        Off { told, flat: false }
    }
}

/// What became of one row.
#[derive(Clone, Copy, Debug)]
struct Off {
    /// The distance to the minimum, 0 where f32 can't tell the losses apart.
    told: f64,
    /// Whether it is far, and f32 can't.
    flat: bool,
}

/// Of the random rows, some 7 % are so.
const FLAT: f64 = 0.1;

/// Searches some rows.
fn search(cases: impl IntoIterator<Item = Case>) -> Vec<Off> {
    let mut fuser = Fuser::new();
    let one = |case: Case| case.told(&case.fuse(&mut fuser), 0.0);
    cases.into_iter().map(one).collect()
}

/// Asserts the bounds of `--search refine`, and that hardly more than `most_flat` of the rows say nothing.
fn check(mut rows: Vec<Off>, most_flat: f64) {
    let (all, flat) = (rows.len(), rows.iter().filter(|row| row.flat).count());
    rows.sort_by(|a, b| a.told.total_cmp(&b.told));
    let at = |part: f64| rows[(part * (all - 1) as f64) as usize].told;
    let (ninth, worst) = (at(0.9), at(1.0));
    println!(
        "{all} rows, {flat} of them flat; ninth decile {ninth:e}, 99 % {:e}, 99.9 % {:e}, worst {worst:e}",
        at(0.99),
        at(0.999)
    );
    assert!(ninth <= 1e-3 && worst <= 1e-2, "ninth decile {ninth:e}, worst {worst:e}");
    assert!(flat as f64 <= most_flat * all as f64, "{flat} of {all} are flat");
}

#[test]
fn coarse_grids_have_points_between() {
    for (grid, step, count) in [
        ("0:2:0.5", 0.1, 16),
        ("0:2:0.1", 0.1, 20),
        ("0.5:1.5:0.25:inclusive", 0.25 / 3.0, 13),
        ("0:5:1", 1.0 / 7.0, 29),
        ("1:1:1:inclusive", 0.0, 1),
    ] {
        let grid: AlphaGrid = grid.parse().unwrap();
        let (points, candidates) = (grid.fine(), grid.candidates());
        assert_eq!(points.len(), count, "{grid:?}");
        // They are rounded to twelve decimals.
        assert!(points.windows(2).all(|pair| (pair[1] - pair[0] - step).abs() < 2e-12), "{grid:?}");
        assert!(candidates.iter().all(|a| points.iter().any(|b| (a - b).abs() < 2e-12)), "{grid:?}");
    }
}

#[test]
fn rows_of_many_kinds() {
    check(search((0..1500).map(Case::new)), FLAT);
}

/// The two candidates next to α = 0 tie, and between them is the best of all.
fn symmetric() -> Case {
    let row = Row { large: vec![0.0; 2], small: vec![100.0, 0.0], experts: vec![vec![110.0, -10.0]] };
    let grids = std::iter::once("-0.95:1:0.1".parse().unwrap()).collect();
    let rule = DynamicRule { grids, mode: SearchMode::Refine, ..DynamicRule::default() };
    Case { row, rule, what: "symmetric".to_owned() }
}

/// Three tokens matter in the cell of the minimum: two atoms alone are off by 0.02 to 0.07.
#[test]
fn two_bends_in_a_cell() {
    for (large, small, expert) in [
        ([47.0, 32.0, -33.0], [1.0, -2.0, 2.0], [-72.0, -45.0, 69.0]),
        ([-39.0, -20.0, -24.0], [3.0, -3.0, 0.0], [52.0, -88.0, -30.0]),
        ([-50.0, 24.0, 45.0], [2.0, -2.0, -2.0], [54.0, -47.0, -72.0]),
        ([-42.0, 7.0, 43.0], [3.0, 0.0, -2.0], [79.0, -11.0, -75.0]),
        ([-35.0, 29.0, 16.0], [1.0, 2.0, -2.0], [-35.0, -79.0, -73.0]),
        ([-4.0, 19.0, 9.0], [2.0, -2.0, 1.0], [82.0, -90.0, 13.0]),
    ] {
        let row = Row { large: large.to_vec(), small: small.to_vec(), experts: vec![expert.to_vec()] };
        let rule = DynamicRule { mode: SearchMode::Refine, ..DynamicRule::default() };
        let case = Case { row, rule, what: format!("{large:?}") };
        for mut fuser in Fuser::every() {
            let off = case.error(&case.fuse(&mut fuser), 0.0);
            assert!(off.told <= 1e-2, "{}: {off:?}", case.what);
        }
    }
}

#[test]
#[ignore = "minutes"]
fn fifty_thousand_rows_of_many_kinds() {
    check(search((0..50_000).map(Case::new)), FLAT);
}

/// Rows in which no single bracket suffices: twins and second valleys across α = 0, ties that end far from the best candidate,
/// a valley that is a small part of a cell, and slopes that hardly grow.
const SPECIAL: [u64; 16] = [
    701, 1113, 2043, 5535, 15350, 16905, 19500, 33377, 34806, 40754, 41322, 41397, 57020, 71100, 78875,
    109_447,
];

#[test]
fn rows_that_need_more_than_a_bracket() {
    check(search(SPECIAL.map(Case::new).into_iter().chain([symmetric()])), 0.0);
}

/// The same rows on the virtual GPU, whose kernel has the search once more.
#[cfg(feature = "cuda")]
mod cuda {
    use cudarc::driver::{CudaContext, CudaSlice, DevicePtr};
    use dlf_engine::backend::cuda::{CudaFusion, DeviceLogits};
    use dlf_engine::fusion::ModelLogits;
    use virtual_gpu::host::Driver;

    use super::{Case, Choice, Decision, FLAT, FuseRow, FusionRule, SPECIAL, check, symmetric};

    /// As wide as the widest of them; tokens that a row lacks are excluded.
    const WIDTH: usize = 1500;

    #[test]
    fn the_same_minimum_on_a_gpu() {
        check_rows(240);
    }

    #[test]
    #[ignore = "half a minute"]
    fn the_same_minimum_of_six_thousand_rows_on_a_gpu() {
        check_rows(6000);
    }

    /// The rows of the first `seeds`, and those that need more.
    fn check_rows(seeds: u64) {
        let gpu = Driver::load().unwrap().device("a100").unwrap();
        let mut off = Vec::new();
        for experts in [1, 2, 4] {
            let cases = (0..seeds).chain(SPECIAL).map(Case::new).chain([symmetric()]);
            let cases: Vec<Case> = cases.filter(|case| case.row.experts.len() == experts).collect();
            assert!(cases.len() > 20);
            let found = fuse(gpu.ordinal(), experts, &cases);
            off.extend(
                cases.iter().zip(found).map(|(case, found)| case.told(&found, f64::from(f32::EPSILON))),
            );
        }
        assert_eq!(gpu.reports(), []);
        // x is rounded there, too.
        check(off, 2.0 * FLAT);
    }

    fn fuse(ordinal: usize, experts: usize, cases: &[Case]) -> Vec<Decision> {
        let stream = CudaContext::new(ordinal).unwrap().default_stream();
        let upload = |of: &dyn Fn(&Case) -> &[f32]| {
            let mut numbers = vec![f32::NEG_INFINITY; cases.len() * WIDTH];
            for (case, to) in cases.iter().zip(numbers.chunks_mut(WIDTH)) {
                to[..case.row.large.len()].copy_from_slice(of(case));
            }
            stream.clone_htod(&numbers).unwrap()
        };
        let large = upload(&|case| &case.row.large);
        let small = upload(&|case| &case.row.small);
        let of_experts: Vec<CudaSlice<f32>> =
            (0..experts).map(|t| upload(&|case| &case.row.experts[t])).collect();
        let address = |numbers: &CudaSlice<f32>| numbers.device_ptr(&stream).0;
        let logits = ModelLogits {
            large: Some(address(&large)),
            small: Some(address(&small)),
            experts: of_experts.iter().map(address).collect(),
        };
        let shape = DeviceLogits { rows: cases.len(), vocab_size: WIDTH, stride: WIDTH };
        let mut fusion = CudaFusion::new(ordinal, experts, shape).unwrap();
        let rules: Vec<FusionRule> =
            cases.iter().map(|case| FusionRule::Dynamic(case.rule.clone())).collect();
        let row = |(slot, rule)| FuseRow { slot, step: 0, rule, held: None, choice: Choice::Forced(0) };
        let rows: Vec<FuseRow<'_>> = rules.iter().enumerate().map(row).collect();
        let mut found = Vec::new();
        // SAFETY: the buffers live, with as many rows each; the stream is of the same context.
        unsafe { fusion.fuse(&logits, stream.cu_stream().cast(), &rows, &mut found) }.unwrap();
        found.into_iter().map(Result::unwrap).collect()
    }
}
