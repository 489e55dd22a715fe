//! The paper, literally, in f64: from softmaxes and the definition of KL.
//!
//! Slow and plain on purpose: this is what every fast path is checked against, and it shares no arithmetic with
//! them. Equation numbers are the paper's (arXiv 2406.15480).

use super::{DynamicRule, FusionRule, Logits, Objective, PerExpert};
use crate::error::{Error, Result};
use crate::model::Role;

/// What the paper's equations decide for one row.
#[derive(Clone, Debug, PartialEq)]
pub struct ReferenceDecision {
    /// The active expert of the dynamic rule.
    pub expert: Option<usize>,
    /// α of each expert.
    pub alpha: PerExpert<f64>,
    /// Equation 6 at α.
    pub loss: Option<f64>,
    /// The second-least loss of the grid less the least one: how far the choice is from flipping.
    pub margin: Option<f64>,
    /// KL(P̃‖P).
    pub kl_fused_large: Option<f64>,
    /// KL(P‖P̃).
    pub kl_large_fused: Option<f64>,
    /// KL(Q_t‖Q) of each expert.
    pub kl_expert_small: PerExpert<f64>,
    /// KL(Q‖Q_t) of each expert.
    pub kl_small_expert: PerExpert<f64>,
    /// log P̃ `(vocab_size,)`; −∞ for excluded ids.
    pub fused: Vec<f64>,
    /// log P, or the one model's that runs alone.
    pub base: Vec<f64>,
    /// log Q; empty where one model runs alone.
    pub small: Vec<f64>,
    /// log Q_t of each expert; empty where one model runs alone.
    pub experts: Vec<Vec<f64>>,
}

/// Equation 1: KL(p‖q) = Σ p log(p/q) from log-probabilities, with 0·log 0 = 0.
pub fn kl(log_p: &[f64], log_q: &[f64]) -> f64 {
    let mut sum = 0.0;
    for (log_p, log_q) in log_p.iter().zip(log_q) {
        let p = log_p.exp();
        if p > 0.0 {
            sum += p * (log_p - log_q);
        }
    }
    sum
}

/// log softmax(x).
pub fn log_softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum = max + x.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
    x.iter().map(|x| x - log_sum).collect()
}

/// The index of the largest value, the lowest where several tie.
pub fn argmax(x: &[f64]) -> usize {
    let mut best = 0;
    for (i, value) in x.iter().enumerate() {
        if *value > x[best] {
            best = i;
        }
    }
    best
}

/// One row in f64, −∞ in every model where one has it.
#[derive(Clone, Debug)]
pub struct ReferenceRow {
    large: Vec<f64>,
    small: Vec<f64>,
    experts: Vec<Vec<f64>>,
    log_p: Vec<f64>,
    log_q: Vec<f64>,
    log_qt: Vec<Vec<f64>>,
}

impl ReferenceRow {
    /// The row of a rule that combines the models.
    ///
    /// # Errors
    /// [`Error::MissingModel`], [`Error::NotFinite`] and [`Error::NoCandidate`] as
    /// [`Backend::fuse`](crate::backend::Backend::fuse) has them.
    pub fn new(logits: &Logits<'_>, method: &'static str, step: usize) -> Result<Self> {
        let missing = |what: &str| Error::MissingModel { method, what: what.to_owned() };
        let mut models = vec![(Role::Large, logits.large.ok_or_else(|| missing("a large model"))?)];
        models.push((Role::Small, logits.small.ok_or_else(|| missing("a small model"))?));
        models.extend(logits.experts.iter().enumerate().map(|(t, &expert)| (Role::Expert(t), expert)));
        if logits.experts.is_empty() {
            return Err(missing("an expert"));
        }
        let mut rows = included(&models, step)?;
        let experts = rows.split_off(2);
        let (Some(small), Some(large)) = (rows.pop(), rows.pop()) else {
            return Err(missing("a large and a small model"));
        };
        let (log_p, log_q) = (log_softmax(&large), log_softmax(&small));
        let log_qt = experts.iter().map(|expert| log_softmax(expert)).collect();
        Ok(Self { large, small, experts, log_p, log_q, log_qt })
    }

    /// Equation 2, for several experts as in equation 6: log P̃ = log softmax(L + Σ α_t (E_t − S)).
    pub fn fused(&self, alpha: &[f64]) -> Vec<f64> {
        let mut fused = self.large.clone();
        for (x, fused) in fused.iter_mut().enumerate() {
            if *fused > f64::NEG_INFINITY {
                for (expert, alpha) in self.experts.iter().zip(alpha) {
                    *fused += alpha * (expert[x] - self.small[x]);
                }
            }
        }
        log_softmax(&fused)
    }

    /// The loss of equation 6, KL(P̃‖P) and KL(P‖P̃).
    pub fn loss(&self, alpha: &[f64], objective: Objective) -> (f64, f64, f64) {
        let fused = self.fused(alpha);
        let (fused_large, large_fused) = (kl(&fused, &self.log_p), kl(&self.log_p, &fused));
        let mut loss = 0.0;
        for log_qt in &self.log_qt {
            if objective != Objective::Reverse {
                loss += (fused_large - kl(log_qt, &self.log_q)).powi(2);
            }
            if objective != Objective::Forward {
                loss += (large_fused - kl(&self.log_q, log_qt)).powi(2);
            }
        }
        (loss, fused_large, large_fused)
    }

    /// α of each expert where one is active.
    fn one_hot(&self, expert: usize, alpha: f64) -> PerExpert<f64> {
        let mut all: PerExpert<f64> = self.experts.iter().map(|_| 0.0).collect();
        if let Some(active) = all.get_mut(expert) {
            *active = alpha;
        }
        all
    }

    /// Algorithm 1: every candidate of every expert; the least loss, the second least less the least, and where.
    /// Strict `<`: ties go to the lowest expert, then to the lowest α.
    pub fn grid_search(&self, rule: &DynamicRule) -> (usize, f64, f64) {
        let (mut least, mut second) = (f64::INFINITY, f64::INFINITY);
        let mut best = (0, 0.0);
        for t in 0..self.experts.len() {
            for &alpha in rule.grid(t).map_or(&[][..], |grid| grid.candidates()) {
                let (loss, ..) = self.loss(&self.one_hot(t, alpha), rule.objective);
                if loss < least {
                    second = least;
                    (least, best) = (loss, (t, alpha));
                } else {
                    second = second.min(loss);
                }
            }
        }
        (best.0, best.1, second - least)
    }

    /// The minimum of the loss over all α of one expert from `low` to `high`: a dense scan, then a golden
    /// section around its best point.
    pub fn continuous_search(&self, expert: usize, low: f64, high: f64, objective: Objective) -> (f64, f64) {
        const POINTS: usize = 256;
        let loss = |alpha: f64| self.loss(&self.one_hot(expert, alpha), objective).0;
        let at = |i: usize| low + (high - low) * i as f64 / POINTS as f64;
        let mut best = (low, loss(low));
        let mut cell = 0;
        for i in 1..=POINTS {
            let value = loss(at(i));
            if value < best.1 {
                best = (at(i), value);
                cell = i;
            }
        }
        let (mut low, mut high) = (at(cell.saturating_sub(1)), at((cell + 1).min(POINTS)));
        let ratio = (5.0_f64.sqrt() - 1.0) / 2.0;
        for _ in 0..30 {
            let (left, right) = (high - ratio * (high - low), low + ratio * (high - low));
            if loss(left) < loss(right) { high = right } else { low = left }
        }
        let middle = (low + high) / 2.0;
        let value = loss(middle);
        if value < best.1 { (middle, value) } else { best }
    }
}

/// The models' logits in f64, cut to the shortest, with −∞ in all where one has it.
fn included(models: &[(Role, &[f32])], step: usize) -> Result<Vec<Vec<f64>>> {
    let width = models.iter().map(|(_, logits)| logits.len()).min().unwrap_or(0);
    let mut rows = vec![Vec::with_capacity(width); models.len()];
    for token in 0..width {
        for &(role, logits) in models {
            let value = logits[token];
            if value.is_nan() || value == f32::INFINITY {
                return Err(Error::NotFinite { role, step, token: token as u32, value });
            }
        }
        let excluded = models.iter().any(|(_, logits)| logits[token] == f32::NEG_INFINITY);
        for (row, (_, logits)) in rows.iter_mut().zip(models) {
            row.push(if excluded { f64::NEG_INFINITY } else { f64::from(logits[token]) });
        }
    }
    if rows[0].iter().all(|x| *x == f64::NEG_INFINITY) {
        return Err(Error::NoCandidate { step });
    }
    Ok(rows)
}

/// Decides one row by `rule`. `held` is the active expert and its α where an earlier choice is held. Grid search
/// whatever the rule's mode: [`ReferenceRow::continuous_search`] is the other one.
///
/// # Errors
/// [`Error::MissingModel`], [`Error::NotFinite`] and [`Error::NoCandidate`] as
/// [`Backend::fuse`](crate::backend::Backend::fuse) has them.
pub fn decide(
    logits: &Logits<'_>,
    rule: &FusionRule,
    held: Option<(usize, f64)>,
    step: usize,
) -> Result<ReferenceDecision> {
    let missing = |role: Role| Error::MissingModel { method: rule.name(), what: format!("the {role} model") };
    let alone = |role: Role, logits: Option<&[f32]>| {
        let rows = included(&[(role, logits.ok_or_else(|| missing(role))?)], step)?;
        let base = log_softmax(&rows[0]);
        Ok(ReferenceDecision {
            expert: None,
            alpha: PerExpert::new(),
            loss: None,
            margin: None,
            kl_fused_large: None,
            kl_large_fused: None,
            kl_expert_small: PerExpert::new(),
            kl_small_expert: PerExpert::new(),
            fused: base.clone(),
            base,
            small: Vec::new(),
            experts: Vec::new(),
        })
    };
    let row = match *rule {
        FusionRule::Large => return alone(Role::Large, logits.large),
        FusionRule::Small => return alone(Role::Small, logits.small),
        FusionRule::Expert(t) => return alone(Role::Expert(t), logits.experts.get(t).copied()),
        FusionRule::Dynamic(_) | FusionRule::Static(_) => ReferenceRow::new(logits, rule.name(), step)?,
    };
    let (expert, alpha, margin, objective) = match (rule, held) {
        (FusionRule::Dynamic(rule), Some((expert, alpha))) => {
            (Some(expert), row.one_hot(expert, alpha), None, rule.objective)
        }
        (FusionRule::Dynamic(rule), None) => {
            let (expert, alpha, margin) = row.grid_search(rule);
            (Some(expert), row.one_hot(expert, alpha), Some(margin), rule.objective)
        }
        (FusionRule::Static(alpha), _) => {
            let of =
                |t: usize| if alpha.len() == 1 { alpha[0] } else { alpha.get(t).copied().unwrap_or(0.0) };
            (None, (0..row.experts.len()).map(of).collect(), None, Objective::Both)
        }
        _ => (None, PerExpert::new(), None, Objective::Both),
    };
    let (loss, fused_large, large_fused) = row.loss(&alpha, objective);
    Ok(ReferenceDecision {
        expert,
        loss: Some(loss),
        margin,
        kl_fused_large: Some(fused_large),
        kl_large_fused: Some(large_fused),
        kl_expert_small: row.log_qt.iter().map(|log_qt| kl(log_qt, &row.log_q)).collect(),
        kl_small_expert: row.log_qt.iter().map(|log_qt| kl(&row.log_q, log_qt)).collect(),
        fused: row.fused(&alpha),
        alpha,
        base: row.log_p,
        small: row.log_q,
        experts: row.log_qt,
    })
}
