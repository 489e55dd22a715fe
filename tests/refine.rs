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
        let grids = ["0:2:0.1", "0:2:0.1", "0:1.5:0.05", "0:2:0.5", "0:2:0.5:inclusive", "0:3.2:0.1", "-1:1:0.1:inclusive"];
        let grids = [&grids[..], &["0:3:1:inclusive", "0.5:1.5:0.25:inclusive"]].concat();
        let grid = grids[rng.below(grids.len())];
        let objective = [Objective::Both, Objective::Both, Objective::Both, Objective::Forward, Objective::Reverse][rng.below(5)];
        let grids = std::iter::once(grid.parse().unwrap()).collect();
        let rule = DynamicRule { grids, objective, mode: SearchMode::Refine, every: 1 };
        let what = format!("seed {seed}: {width} tokens, {experts} experts, scale {scale}, {tails:?}, {relation:?}, {grid} {objective:?}");
        Self { row, rule, what }
    }

    fn fuse(&self, fuser: &mut Fuser) -> Decision {
        let rule = FusionRule::Dynamic(self.rule.clone());
        let row = FuseRow { slot: 0, step: 0, rule: &rule, held: None, choice: Choice::Forced(0) };
        let mut decisions = Vec::new();
        fuser.fuse(&mut sequential, &[row], &|_| self.row.logits(), &mut decisions);
        decisions.remove(0).unwrap()
    }

    /// How far α is off, and what that costs.
    fn error(&self, found: &Decision) -> Off {
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
        let (low, high) = (points[best.saturating_sub(1)], points[(best + 1).min(points.len() - 1)]);
        let (alpha, least) = exact.continuous_search(expert, low, high, objective);
        let (_, forward, reverse) = at(alpha);
        // Where the loss is flat, f32 sums can't tell one α from another: each KL is off by some δ, which moves a loss by
        // 2δ Σ|k − t| ≤ 2δ √(2T·loss), and by 2Tδ². 1e-6 is near their largest error on heavy-tailed rows.
        let (delta, targets) = (1e-6 * (1.0 + forward + reverse), 2.0 * self.row.experts.len() as f64);
        let noise = 2.0 * delta * (targets * least).sqrt() + targets * delta * delta;
        let excess = at(found.alpha[expert]).0 - least;
        let distance = (found.alpha[expert] - alpha).abs();
        let told = if excess <= noise { 0.0 } else { distance };
        // On either side of α = 0 each KL has one of its values again.
        let twin = points[best] == 0.0 && found.alpha[expert] * alpha < 0.0;
        Off { told, distance, excess: excess / least, twin }
    }
}

/// What became of one row.
#[derive(Clone, Copy, Debug)]
struct Off {
    /// The distance to the minimum, 0 where f32 can't tell the losses apart.
    told: f64,
    /// The distance to the minimum.
    distance: f64,
    /// The loss above the least one, relative to that.
    excess: f64,
    /// Whether α and the minimum are on either side of 0.
    twin: bool,
}

/// Searches the rows of some seeds.
fn search(seeds: impl Iterator<Item = u64>) -> Vec<Off> {
    let mut fuser = Fuser::new();
    let one = |seed| {
        let case = Case::new(seed);
        let found = case.fuse(&mut fuser);
        let off = case.error(&found);
        if off.told > 1e-2 {
            println!("{}: {off:?}, {:?}", case.what, found.alpha);
        }
        off
    };
    seeds.map(one).collect()
}

/// Asserts the bounds of `--search refine`.
fn check(mut rows: Vec<Off>) {
    rows.sort_by(|a, b| a.told.total_cmp(&b.told));
    let twins = rows.iter().filter(|row| row.twin && row.told > 1e-2).count();
    rows.retain(|row| !row.twin);
    let at = |part: f64| rows[(part * (rows.len() - 1) as f64) as usize].told;
    let (ninth, worst) = (at(0.9), at(1.0));
    let told = rows.iter().filter(|row| row.distance > 1e-2 && row.told == 0.0).count();
    println!(
        "{} rows: ninth decile {ninth:e}, 99 % {:e}, 99.9 % {:e}, worst {worst:e}; {told} flat, {twins} twins; misses {}",
        rows.len(), at(0.99), at(0.999), rows.iter().filter(|row| row.told > 1e-2).count()
    );
    assert!(ninth <= 1e-3 && worst <= 1e-2, "ninth decile {ninth:e}, worst {worst:e}");
}

#[test]
fn rows_of_many_kinds() {
    check(search(0..1500));
}

#[test]
#[ignore = "minutes"]
fn fifty_thousand_rows_of_many_kinds() {
    check(search(0..50_000));
}
